"""A small text-to-image base, trained from scratch on avatars with captions, and pictures of what adapting it does.

    pip install -e ".[avatars]"
    python examples/avatars/text_to_image.py base --output_dir runs/avatars/pixart
    python examples/avatars/text_to_image.py images --output_dir runs/avatars/zombies
    python examples/train_text_to_image.py --pretrained_model_name_or_path runs/avatars/pixart ...
    python examples/avatars/text_to_image.py picture --base runs/avatars/pixart --adapter my_adapter --output it.png

Captions are such as "a person with red hair and glasses, style lorelei". `base` writes a `PixArtAlphaPipeline`: with
the VAE of the bundled base, and a random T5 of one layer as text encoder, which stays as it is. Its checkpoints and
pictures on the way are in `--work_dir`: run it again and it goes on. `images` writes a folder of captioned pictures of
zombies, which the base never saw. docs/text-to-image.md has the whole of it.
"""

from __future__ import annotations

import argparse
import json
import random
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import demo
import difffit_peft
import numpy as np
import torch
from difffit_peft.training.objective import noising
from difffit_peft.training.sampling import Draws
from difffit_peft.training.scripts import positive_float, positive_int, run_script, seed_int, user_path
from difffit_peft.training.text_to_image import PixArt
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel
from diffusers.training_utils import EMAModel
from diffusers.utils import make_image_grid
from PIL import Image
from render import draw
from torch import Tensor
from tqdm import tqdm
from train_base import HERE, draw_timesteps, encode, keep, learn, resumed, save, warm_up_hold_and_fall
from transformers import T5Config, T5EncoderModel, T5Tokenizer

HAIR = {
    "black": "16130f",
    "brown": "7a4a21",
    "blond": "ecc94b",
    "red": "c42a1c",
    "green": "3eac2c",
    "blue": "2f6fe0",
    "pink": "f57fb8",
    "purple": "6a2c9c",
}
STYLES = {"lorelei": ["glasses", "beard"], "miniavs": ["glasses"], "toon-head": ["beard"]}  # and what some wear
ZOMBIE = {"skinColor": ["7fb069", "93c47d"], "backgroundColor": ["1f2a44", "3b2a4d"]}
ZOMBIE_STYLE, ZOMBIE_HAIR = "miniavs", ["black", "brown", "blond", "red"]  # all that is shown in training
WORDS = {"glasses": "glasses", "beard": "a beard"}
SHOWN = [  # hair, what is worn, style
    ("red", [], "miniavs"),
    ("black", ["glasses"], "miniavs"),
    ("blue", [], "miniavs"),
    ("pink", ["glasses"], "miniavs"),
    ("green", [], "toon-head"),
]


def caption(who: str, colour: str, worn: list[str], style: str) -> str:
    return f"a {who} with {' and '.join([f'{colour} hair', *(WORDS[thing] for thing in worn)])}, style {style}"


def drawn(seed: str, who: str, colour: str, worn: list[str], style: str) -> np.ndarray:
    options = {f"{thing}Probability": 100 * (thing in worn) for thing in STYLES[style]}
    return draw(seed, style, hairColor=[HAIR[colour]], **options, **(ZOMBIE if who == "zombie" else {}))


def portrait(seed: str, who: str, style: str, hair: list[str]) -> tuple[np.ndarray, str]:
    """A picture and its caption."""
    choose = random.Random(f"{style}-{seed}")
    colour = choose.choice(hair)
    worn = [thing for thing in STYLES[style] if choose.random() < 0.4]
    return drawn(seed, who, colour, worn, style), caption(who, colour, worn, style)


def portraits(count: int, who: str, style: str, hair: list[str]) -> tuple[list[np.ndarray], list[str]]:
    seeds = [f"train-{i}" for i in range(count)]
    with ProcessPoolExecutor() as pool:
        made = pool.map(portrait, seeds, [who] * count, [style] * count, [hair] * count, chunksize=100)
        pictures, captions = zip(*tqdm(made, desc=style, total=count, leave=False), strict=True)
    return list(pictures), list(captions)


def text_encoder(captions: list[str]) -> tuple[T5Tokenizer, T5EncoderModel]:
    """Random. Each word is a token; words of no caption are spelled."""
    words = sorted({word for caption in captions for word in caption.replace(",", " ,").split()} - {","})
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -99.0), ("▁", -9.0), (",", -1.0)]
    pieces += [(letter, -9.0) for letter in "abcdefghijklmnopqrstuvwxyz-"] + [(f"▁{word}", -1.0) for word in words]
    tokenizer = T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=120)
    config = T5Config(vocab_size=len(tokenizer), d_model=64, d_kv=32, d_ff=128, num_layers=1, num_heads=2)
    return tokenizer, T5EncoderModel(config).eval().requires_grad_(False)


def new_pipeline(captions: list[str]) -> PixArtAlphaPipeline:
    tokenizer, encoder = text_encoder(captions)
    transformer = PixArtTransformer2DModel(
        num_attention_heads=5,
        attention_head_dim=32,
        cross_attention_dim=160,
        in_channels=8,
        out_channels=16,
        num_layers=4,
        sample_size=16,
        caption_channels=64,
    )
    for block in transformer.transformer_blocks:  # as PixArt starts: no block heeds the caption
        torch.nn.init.zeros_(block.attn2.to_out[0].weight)
    torch.nn.init.zeros_(transformer.proj_out.weight)
    return PixArtAlphaPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=AutoencoderKL.from_pretrained(HERE / "base" / "vae", dtype=torch.float32).eval().requires_grad_(False),
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear"),
    )


def sample(pipe: PixArtAlphaPipeline, prompts: list[str]) -> list[Image.Image]:
    pipe.set_progress_bar_config(disable=True)
    how = {"guidance_scale": 2.0, "num_inference_steps": 15, "use_resolution_binning": False}
    return pipe(prompts, negative_prompt="", generator=torch.Generator().manual_seed(0), **how).images


def latents_of(args: argparse.Namespace) -> tuple[Tensor, list[str]]:
    """Of all pictures, (N, 8, 16, 16) in half precision, with their captions; made once and kept in `--work_dir`."""
    path = args.work_dir / f"latents-{args.pictures_per_style}.pt"
    if not path.exists():
        vae = AutoencoderKL.from_pretrained(HERE / "base" / "vae", dtype=torch.float32)
        latents, captions = [], []
        for style in STYLES:
            pictures, of_style = portraits(args.pictures_per_style, "person", style, list(HAIR))
            latents.append(encode(vae, np.stack(pictures)))
            captions += of_style
        save({"latents": torch.cat(latents), "captions": captions}, path)
    return tuple(torch.load(path).values())


def train_base(args: argparse.Namespace) -> None:
    """Trains with the package's own objective of PixArt; the rest is as the bundled base is trained."""
    args.work_dir.mkdir(parents=True, exist_ok=True)
    latents, captions = latents_of(args)
    texts = [*sorted(set(captions)), ""]
    labels = torch.tensor([texts.index(caption) for caption in captions])

    torch.manual_seed(args.seed)
    pipe = new_pipeline(captions)
    model = pipe.transformer
    family = PixArt(pipe)
    prompts = [family.encode(text, max_sequence_length=20) for text in texts]
    objective = family.objective(noising(pipe.scheduler, snr_gamma=5), prompts, texts.index(""), 0.1)
    adam = {"betas": (0.9, 0.99), "weight_decay": 0.0, "fused": True}
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, **adam)
    schedule = warm_up_hold_and_fall(optimizer, args.steps)
    ema = EMAModel(model.parameters(), decay=0.999, use_ema_warmup=True, power=0.75)
    checkpoint = args.work_dir / "pixart.pt"
    step = resumed(checkpoint, model=model, optimizer=optimizer, ema=ema, schedule=schedule)
    bar = tqdm(range(step, args.steps), initial=step, total=args.steps, mininterval=5)
    average = None
    for step in bar:
        generator = torch.Generator().manual_seed(step)
        rows = torch.randint(len(latents), (args.batch_size,), generator=generator)
        x_0 = latents[rows].float()
        noise = torch.randn(x_0.shape, generator=generator)
        timesteps = draw_timesteps(len(rows), generator)
        dropped = torch.rand(len(rows), generator=generator) < objective.dropout
        draws = Draws(torch.zeros_like(rows), torch.zeros_like(noise), noise, timesteps, dropped)
        loss = objective.losses(model, draws, x_0, objective.drop(draws, labels[rows])).mean()
        learn(loss, model, optimizer, schedule)
        ema.step(model.parameters())
        average = loss.item() if average is None else 0.99 * average + 0.01 * loss.item()
        bar.set_postfix(loss=f"{average:.4f}")
        if (step + 1) % 250 == 0 or step + 1 == args.steps:
            keep(checkpoint, step + 1, model=model, optimizer=optimizer, ema=ema, schedule=schedule)
            ema.store(model.parameters()), ema.copy_to(model.parameters())
            pipe.save_pretrained(args.output_dir)
            images = sample(pipe, [caption("person", hair, [], style) for style in STYLES for hair in HAIR])
            make_image_grid(images, len(STYLES), len(HAIR)).save(args.work_dir / f"step-{step + 1:05d}.png")
            ema.restore(model.parameters())


def write_images(args: argparse.Namespace) -> None:
    """Zombies and `metadata.jsonl`, as `train_text_to_image.py` takes them."""
    args.output_dir.mkdir(parents=True)
    lines = []
    made = portraits(args.count, "zombie", ZOMBIE_STYLE, ZOMBIE_HAIR)
    for i, (picture, text) in enumerate(zip(*made, strict=True)):
        Image.fromarray(picture).save(args.output_dir / f"{i:03}.png")
        lines.append(json.dumps({"file_name": f"{i:03}.png", "text": text}) + "\n")
    (args.output_dir / "metadata.jsonl").write_text("".join(lines))


def show(args: argparse.Namespace) -> None:
    """The base and the adapter at the same prompts and noise, and real pictures that were not trained on."""
    pipe = PixArtAlphaPipeline.from_pretrained(args.base)
    prompts = [caption("zombie", *shown) for shown in SHOWN for _ in range(demo.SHOWN)]
    rows = {"base": sample(pipe, prompts)}
    difffit_peft.load_adapter(pipe, args.adapter)
    rows["DiffFit"] = sample(pipe, prompts)
    rows["real"] = [drawn(f"test-{i}", "zombie", *shown) for shown in SHOWN for i in range(demo.SHOWN)]
    pictures = {
        name: torch.from_numpy(np.stack([*map(np.asarray, row)])).permute(0, 3, 1, 2) for name, row in rows.items()
    }
    titles = [caption("zombie", *shown).removeprefix("a zombie with ").replace("style ", "") for shown in SHOWN]
    demo.draw(pictures, titles, args.output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    base = commands.add_parser("base", help="trains the base")
    base.add_argument("--output_dir", type=user_path, required=True)
    base.add_argument(
        "--work_dir", type=user_path, default=Path("runs/avatars/text-to-image"), help="checkpoints, previews"
    )
    base.add_argument("--pictures_per_style", type=positive_int, default=1000)
    base.add_argument("--steps", type=positive_int, default=2600)
    base.add_argument("--batch_size", type=positive_int, default=16)
    base.add_argument("--learning_rate", type=positive_float, default=1e-3)
    base.add_argument("--seed", type=seed_int, default=0)
    base.set_defaults(command=train_base)
    images = commands.add_parser("images", help="draws zombies, which the base never saw")
    images.add_argument("--output_dir", type=user_path, required=True)
    images.add_argument("--count", type=positive_int, default=120)
    images.set_defaults(command=write_images)
    picture = commands.add_parser("picture", help="the base, the adapter and real pictures side by side")
    for name in ("base", "adapter", "output"):
        picture.add_argument(f"--{name}", type=user_path, required=True)
    picture.set_defaults(command=show)
    args = parser.parse_args()
    args.command(args)


if __name__ == "__main__":
    run_script(main)
