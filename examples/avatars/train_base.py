"""Trains the bundled base from scratch: a small VAE, then a small class-conditional DiT on 42 styles of avatars.

    pip install -e ".[avatars]"
    python examples/avatars/train_base.py

Three stages (VAE; its decoder once more, on fixed latents; DiT), each checkpointed in `--work_dir`: run the command
again and it goes on where it was stopped. Every batch is drawn from a generator seeded with its step, so an interrupted
run sees the same batches. The VAE sees the styles of the base and the training split of Twemoji, as a published VAE
sees images of every kind; the DiT sees the styles alone. Writes a half-precision `DiTPipeline` folder.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from datasets import load_dataset
from difffit_peft.training.losses import diffusion_loss
from difffit_peft.training.scripts import (
    non_negative_int,
    positive_float,
    positive_int,
    run_script,
    seed_int,
    user_path,
)
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel, DPMSolverMultistepScheduler
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from diffusers.utils import make_image_grid
from render import BASE, CACHE, pictures
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
NULL_CLASS = 1000
PREVIEW = ["adventurer", "big-smile", "lorelei", "pixel-art", "notionists", "toon-head", "fun-emoji", "landscape"]
BATCH_OF_VAE = 8


def to_float(pixels: np.ndarray) -> Tensor:
    """uint8 (N, side, side, 3) to float32 (N, 3, side, side) between -1 and 1."""
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1


def save(state: dict | Tensor, path: Path) -> None:
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


def keep(checkpoint: Path, step: int, **parts: Any) -> None:
    """Writes the state of a stage after `step` steps."""
    save({"step": step} | {name: part.state_dict() for name, part in parts.items()}, checkpoint)


def resumed(checkpoint: Path, **parts: Any) -> int:
    """Loads what `keep` wrote, if it did; the number of steps done."""
    if not checkpoint.exists():
        return 0
    state = torch.load(checkpoint)
    for name, part in parts.items():
        part.load_state_dict(state[name])
    return state["step"]


def new_vae() -> AutoencoderKL:
    """To 16x16x8 latents: thin lines need more than the four channels that are usual."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 96),
        layers_per_block=1,
        norm_num_groups=16,
        latent_channels=8,
        sample_size=64,
        scaling_factor=1.0,
    )


def train_vae(styles: list[np.ndarray], args: argparse.Namespace) -> AutoencoderKL:
    """A VAE whose latents have mean 0 and variance 1 in every channel.

    What a DiT draws is never exact, so the decoder sees latents with noise of a tenth of their deviation. A latent at
    half the side must decode to the picture at half the side: such latents are easier to learn (Skorokhodov et al.
    2025, "Improving the Diffusability of Autoencoders").
    """
    torch.manual_seed(args.seed)
    vae = new_vae()
    if args.vae_init:
        vae.load_state_dict(AutoencoderKL.from_pretrained(args.vae_init).state_dict())
    optimizer = torch.optim.AdamW(vae.parameters(), lr=4e-4, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=100, num_training_steps=args.vae_steps)
    checkpoint = args.work_dir / "vae.pt"
    step = resumed(checkpoint, model=vae, optimizer=optimizer, schedule=schedule)

    bar = tqdm(range(step, args.vae_steps), desc="VAE", initial=step, total=args.vae_steps, mininterval=5)
    average = None
    for step in bar:
        generator = torch.Generator().manual_seed(step)
        style = torch.randint(len(styles), (BATCH_OF_VAE,), generator=generator).tolist()
        row = torch.rand(BATCH_OF_VAE, generator=generator).tolist()
        batch = to_float(np.stack([styles[s][int(r * len(styles[s]))] for s, r in zip(style, row, strict=True)]))
        if torch.rand((), generator=generator) < 0.5:
            batch = batch.flip(-1)
        posterior = vae.encode(batch).latent_dist
        latent = posterior.sample(generator)
        deviation = latent.detach().std((0, 2, 3), keepdim=True)
        latent = latent + 0.1 * deviation * torch.randn(latent.shape, generator=generator)
        decoded = vae.decode(latent).sample
        mse = F.mse_loss(decoded, batch)
        small, small_batch = vae.decode(F.avg_pool2d(latent[::2], 2)).sample, F.avg_pool2d(batch[::2], 2)
        loss = F.l1_loss(decoded, batch) + mse + 0.5 * (F.l1_loss(small, small_batch) + F.mse_loss(small, small_batch))
        learn(loss + 1e-5 * posterior.kl().mean() / posterior.mean[0].numel(), vae, optimizer, schedule)
        psnr = -10 * torch.log10(mse.detach() / 4).item()
        average = psnr if average is None else 0.98 * average + 0.02 * psnr
        bar.set_postfix(psnr=f"{average:.1f} dB")
        if (step + 1) % 250 == 0 or step + 1 == args.vae_steps:
            keep(checkpoint, step + 1, model=vae, optimizer=optimizer, schedule=schedule)
            with torch.no_grad():
                shown = torch.cat([batch[:8], decoded[:8]]).add(1).div(2).clamp(0, 1).permute(0, 2, 3, 1)
            make_image_grid(DiTPipeline.numpy_to_pil(shown.numpy()), 2, 8).save(args.work_dir / "vae.png")
    vae.eval().requires_grad_(False)
    whiten(vae, torch.cat([encode(vae, style[:50]) for style in styles]).float())
    return vae


def whiten(vae: AutoencoderKL, latents: Tensor) -> None:
    """Folds each latent channel's mean and deviation into the 1x1 convolutions around the latent."""
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    quant, post_quant, c = vae.quant_conv, vae.post_quant_conv, len(mean)
    quant.weight[:c] /= std.view(-1, 1, 1, 1)
    quant.bias[:c] = (quant.bias[:c] - mean) / std
    quant.bias[c:] -= 2 * std.log()
    post_quant.bias += post_quant.weight[:, :, 0, 0] @ mean
    post_quant.weight *= std.view(1, -1, 1, 1)


@torch.no_grad()
def encode(vae: AutoencoderKL, pixels: np.ndarray) -> Tensor:
    """uint8 (N, 64, 64, 3) to latents (N, 8, 16, 16) in half precision."""
    starts = range(0, len(pixels), 10)
    return torch.cat([vae.encode(to_float(pixels[i : i + 10])).latent_dist.mean.half() for i in starts])


def latents_of(vae: AutoencoderKL, args: argparse.Namespace) -> list[Tensor]:
    """The latents of each style, (N, 8, 16, 16) in half precision, encoded once and kept in `--work_dir`."""
    latents = []
    for style in tqdm(BASE, desc="Latents"):
        path = args.work_dir / f"{style}-{args.pictures_per_style}.pt"
        if not path.exists():
            save(encode(vae, pictures(style, 5000, cache_dir=args.cache_dir)[: args.pictures_per_style]), path)
        latents.append(torch.load(path))
    return latents


def initialise(dit: DiTTransformer2DModel) -> None:
    """adaLN-zero (Peebles & Xie 2023): every block starts as the identity, the output as zero."""
    for block in dit.transformer_blocks:
        block.norm1.linear.weight.data.zero_(), block.norm1.linear.bias.data.zero_()
    for layer in (dit.proj_out_1, dit.proj_out_2):
        layer.weight.data.zero_(), layer.bias.data.zero_()
    embedder = dit.transformer_blocks[0].norm1.emb
    torch.nn.init.normal_(embedder.class_embedder.embedding_table.weight, std=0.02)
    for block in dit.transformer_blocks:  # one embedder, as in the paper; saved below as equal copies
        block.norm1.emb = embedder


def new_dit() -> DiTTransformer2DModel:
    """Width 288 in heads of 72, as DiT-XL/2's; 6 blocks."""
    return DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=72,
        in_channels=8,
        out_channels=16,
        num_layers=6,
        sample_size=16,
        patch_size=2,
        num_embeds_ada_norm=NULL_CLASS,
    ).eval()  # train mode would drop labels in every block apart; they are dropped below, once per sample


def varied(batch: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures unlike any style, (N, 3, side, side): colours change places; half of them are four, at half the side."""
    batch = batch[:, torch.randperm(3, generator=generator)]
    half = F.avg_pool2d(batch, 2)
    order = [torch.randperm(len(batch), generator=generator)[: len(batch) // 2] for _ in range(4)]
    rows = [torch.cat([half[a], half[b].flip(-1)], -1) for a, b in (order[:2], order[2:])]
    return torch.cat([torch.cat(rows, -2), batch[len(batch) // 2 :]])


def refine_decoder(vae: AutoencoderKL, styles: list[np.ndarray], args: argparse.Namespace) -> None:
    """Trains the decoder alone, so that the latents that the DiT learns to draw stay as they are.

    Half of each batch is made unlike the styles, so that the decoder is good at what it has never seen.
    """
    torch.manual_seed(args.seed)
    decoder = torch.nn.ModuleList([vae.post_quant_conv, vae.decoder]).requires_grad_(True)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=5e-4, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=50, num_training_steps=args.decoder_steps)
    checkpoint = args.work_dir / "decoder.pt"
    step = resumed(checkpoint, model=decoder, optimizer=optimizer, schedule=schedule)

    bar = tqdm(range(step, args.decoder_steps), desc="Decoder", initial=step, total=args.decoder_steps, mininterval=5)
    average = None
    for step in bar:
        generator = torch.Generator().manual_seed(step)
        style = torch.randint(len(styles), (BATCH_OF_VAE,), generator=generator).tolist()
        row = torch.rand(BATCH_OF_VAE, generator=generator).tolist()
        batch = to_float(np.stack([styles[s][int(r * len(styles[s]))] for s, r in zip(style, row, strict=True)]))
        half = BATCH_OF_VAE // 2
        batch = torch.cat([batch[:half], varied(batch[half:], generator)])
        with torch.no_grad():
            latent = vae.encode(batch).latent_dist.mean
        decoded = vae.decode(latent + 0.03 * torch.randn(latent.shape, generator=generator)).sample
        mse = F.mse_loss(decoded, batch)
        learn(F.l1_loss(decoded, batch) + 2 * mse, decoder, optimizer, schedule)
        psnr = -10 * torch.log10(mse.detach() / 4).item()
        average = psnr if average is None else 0.98 * average + 0.02 * psnr
        bar.set_postfix(psnr=f"{average:.1f} dB")
        if (step + 1) % 100 == 0 or step + 1 == args.decoder_steps:
            keep(checkpoint, step + 1, model=decoder, optimizer=optimizer, schedule=schedule)
    decoder.requires_grad_(False)


def warm_up_hold_and_fall(optimizer: torch.optim.Optimizer, steps: int) -> LambdaLR:
    """Falls to 1 % over the last quarter: the number of steps may be changed until then."""
    return LambdaLR(optimizer, lambda step: min((step + 1) / 300, 1, max(0.01, 4 * (1 - step / steps))))


def learn(loss: Tensor, model: torch.nn.Module, optimizer: torch.optim.Optimizer, schedule: LambdaLR) -> None:
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step(), schedule.step(), optimizer.zero_grad()


def draw_timesteps(count: int, generator: torch.Generator) -> Tensor:
    """One from each of `count` parts of equal probability, (count,), most where pictures take shape.

    The logarithm of t / (1000 - t) is normal (Esser et al. 2024, "Scaling Rectified Flow Transformers"), with its mean
    at t = 330: at the DiT's schedule, latents of t > 700 are noise alone.
    """
    quantiles = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    return (1000 * torch.sigmoid(-0.7 + 1.2 * torch.special.ndtri(quantiles))).long().clamp(0, 999)


def train_dit(
    latents: list[Tensor], scheduler: DDIMScheduler, vae: AutoencoderKL, args: argparse.Namespace
) -> DiTTransformer2DModel:
    """The DiT with its averaged weights; what it draws on the way is kept in `--work_dir`."""
    torch.manual_seed(args.seed)
    dit = new_dit()
    initialise(dit)
    optimizer = torch.optim.AdamW(dit.parameters(), lr=args.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = warm_up_hold_and_fall(optimizer, args.dit_steps)
    ema = EMAModel(dit.parameters(), decay=0.9995, use_ema_warmup=True, power=0.75)
    checkpoint = args.work_dir / "dit.pt"
    step = resumed(checkpoint, model=dit, optimizer=optimizer, ema=ema, schedule=schedule)

    bar = tqdm(range(step, args.dit_steps), desc="DiT", initial=step, total=args.dit_steps, mininterval=5)
    average = None
    for step in bar:
        generator = torch.Generator().manual_seed(step)
        y = torch.randint(len(latents), (args.batch_size,), generator=generator)
        rows = torch.rand(args.batch_size, generator=generator).tolist()
        x_0 = torch.stack([latents[c][int(r * len(latents[c]))] for c, r in zip(y.tolist(), rows, strict=True)]).float()
        noise = torch.randn(x_0.shape, generator=generator)
        timesteps = draw_timesteps(len(y), generator)
        y = torch.where(torch.rand(y.shape, generator=generator) < 0.1, NULL_CLASS, y)
        output = dit(scheduler.add_noise(x_0, noise, timesteps), timestep=timesteps, class_labels=y).sample
        loss = diffusion_loss(output, x_0, noise, timesteps, scheduler, snr_gamma=5).mean()
        learn(loss, dit, optimizer, schedule)
        ema.step(dit.parameters())
        average = loss.item() if average is None else 0.99 * average + 0.01 * loss.item()
        bar.set_postfix(loss=f"{average:.4f}")
        if (step + 1) % 250 == 0 or step + 1 == args.dit_steps:
            keep(checkpoint, step + 1, model=dit, optimizer=optimizer, ema=ema, schedule=schedule)
            print(f"\nstep {step + 1}: loss {average:.4f}", flush=True)
        if (step + 1) % args.saving_steps == 0 or step + 1 == args.dit_steps:
            ema.store(dit.parameters()), ema.copy_to(dit.parameters())
            write(dit, vae, scheduler, args.work_dir / f"step-{step + 1:06d}")
            ema.restore(dit.parameters())
    ema.copy_to(dit.parameters())
    return dit


def write(trained: DiTTransformer2DModel, vae: AutoencoderKL, scheduler: DDIMScheduler, folder: Path) -> None:
    """Saves a half-precision pipeline, and a grid of its samples beside it."""
    dit = new_dit()  # a plain model again, with its own copy of the embedder in every block
    dit.load_state_dict(trained.state_dict())
    id2label = dict(enumerate(BASE))
    pipe = DiTPipeline(dit.half(), copy.deepcopy(vae).half(), scheduler, id2label=id2label)
    pipe.register_to_config(id2label=id2label)  # DiTPipeline does not, and would save no labels
    pipe.save_pretrained(folder)
    pipe = DiTPipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(leave=False, desc="Preview")
    labels = [BASE.index(name) for name in PREVIEW for _ in range(8)]
    generator = torch.Generator().manual_seed(0)
    images = pipe(labels, guidance_scale=1.5, num_inference_steps=15, generator=generator).images
    make_image_grid(images, len(PREVIEW), 8).save(folder.with_suffix(".png"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=user_path, default=Path("runs/avatars/pipeline"))
    parser.add_argument(
        "--work_dir", type=user_path, default=Path("runs/avatars/base"), help="checkpoints and previews"
    )
    parser.add_argument("--cache_dir", type=user_path, default=CACHE, help="rendered pictures")
    parser.add_argument("--vae_init", help="an AutoencoderKL of the same widths to start from")
    parser.add_argument("--vae_steps", type=non_negative_int, default=2400)
    parser.add_argument("--decoder_steps", type=non_negative_int, default=2400)
    parser.add_argument(
        "--stage", choices=["all", "decoder", "dit"], default="all", help="decoder and dit can run at once; then all"
    )
    parser.add_argument("--pictures_per_style", type=positive_int, default=5000)
    parser.add_argument("--dit_steps", type=positive_int, default=40000)
    parser.add_argument("--batch_size", type=positive_int, default=64)
    parser.add_argument("--learning_rate", type=positive_float, default=6e-4)
    parser.add_argument("--saving_steps", type=positive_int, default=1000)
    parser.add_argument("--num_threads", type=positive_int, default=2, help="one, where other programs run beside")
    parser.add_argument("--seed", type=seed_int, default=0)
    args = parser.parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.num_threads)

    twemoji = load_dataset("parquet", data_files=str(HERE / "data/far/train.parquet"), split="train")
    styles = [pictures(style, 5000, cache_dir=args.cache_dir) for style in BASE]
    styles.append(np.stack(list(twemoji.with_format("numpy")["image"])))
    vae = train_vae(styles, args)
    scheduler = DDIMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=False)
    latents = latents_of(vae, args)
    if args.stage != "dit":
        refine_decoder(vae, styles, args)
    if args.stage != "decoder":
        write(train_dit(latents, scheduler, vae, args), vae, scheduler, args.output_dir)
        size = sum(f.stat().st_size for f in args.output_dir.rglob("*") if f.is_file())
        print(f"{args.output_dir}: {size:,} bytes")


if __name__ == "__main__":
    run_script(main)
