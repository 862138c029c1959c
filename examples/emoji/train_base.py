"""Trains the demo's base from scratch: a small VAE, then a small class-conditional DiT on Noto emoji.

    python examples/emoji/train_base.py --compile
    python examples/emoji/train_base.py --compile --dit_steps 17000 --emphasis animal=3 food=3 country=0.3

Two stages, each checkpointed in `--work_dir`: run the command again and it goes on where it was stopped. Every batch
is drawn from a generator seeded with its step, so an interrupted run sees the same batches. The VAE sees Noto and the
training split of Twemoji, as a published VAE sees images of every kind; the DiT sees Noto alone. Writes a
half-precision `DiTPipeline` folder.
"""

import argparse
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from datasets import Dataset, load_dataset
from difffit_peft.training.losses import diffusion_loss
from difffit_peft.training.scripts import run_script
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from diffusers.utils import make_image_grid
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
NULL_CLASS = 1000
PREVIEW_CLASSES = ["face-smiling", "country-flag", "food-fruit", "animal-mammal", "person-role", "heart"]


def load_images(path: Path) -> tuple[Tensor, Dataset]:
    """Images as uint8 (N, 3, 64, 64), and the dataset of a parquet file."""
    dataset = load_dataset("parquet", data_files=str(path), split="train")
    return torch.stack(list(dataset.with_format("torch")["image"])), dataset


def to_float(pixels: Tensor) -> Tensor:
    return pixels.float() / 127.5 - 1


def save(state: dict, path: Path) -> None:
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


def train_vae(pixels: Tensor, args: argparse.Namespace) -> AutoencoderKL:
    """An `AutoencoderKL` to 16x16x4 latents, whose latents have mean 0 and variance 1 in every channel."""
    torch.manual_seed(args.seed)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 96),
        layers_per_block=1,
        norm_num_groups=16,
        sample_size=64,
        scaling_factor=1.0,
    )
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=100, num_training_steps=args.vae_steps)
    checkpoint, step = args.work_dir / "vae.pt", 0
    if checkpoint.exists():
        state = torch.load(checkpoint)
        vae.load_state_dict(state["model"]), optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        step = state["step"]

    bar = tqdm(range(step, args.vae_steps), desc="VAE", initial=step, total=args.vae_steps, mininterval=5)
    for step in bar:
        generator = torch.Generator().manual_seed(step)
        batch = to_float(pixels[torch.randint(len(pixels), (16,), generator=generator)])
        if torch.rand((), generator=generator) < 0.5:
            batch = batch.flip(-1)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(batch).latent_dist
            decoded = vae.decode(posterior.sample(generator)).sample.float()
            kl = posterior.kl().float().mean() / posterior.mean[0].numel()
        mse = F.mse_loss(decoded, batch)
        loss = F.l1_loss(decoded, batch) + mse + 1e-4 * kl
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step(), schedule.step(), optimizer.zero_grad()
        bar.set_postfix(psnr=f"{-10 * torch.log10(mse.detach() / 4).item():.1f} dB")
        if (step + 1) % 250 == 0 or step + 1 == args.vae_steps:
            state = {"model": vae.state_dict(), "optimizer": optimizer.state_dict()}
            save({**state, "schedule": schedule.state_dict(), "step": step + 1}, checkpoint)
            with torch.no_grad():
                pictures = torch.cat([batch[:8], decoded[:8]]).add(1).div(2).clamp(0, 1).permute(0, 2, 3, 1)
            make_image_grid(DiTPipeline.numpy_to_pil(pictures.numpy()), 2, 8).save(args.work_dir / "vae.png")
    vae.eval().requires_grad_(False)
    whiten(vae, encode(vae, pixels[:2000]))
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
def encode(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    batches = tqdm(pixels.split(64), desc="latents")
    return torch.cat([vae.encode(to_float(batch)).latent_dist.mean for batch in batches])


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
    return DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=64,
        in_channels=4,
        out_channels=8,
        num_layers=8,
        sample_size=16,
        patch_size=2,
        num_embeds_ada_norm=NULL_CLASS,
    ).eval()  # train mode would drop labels in every block apart; they are dropped below, once per sample


def train_dit(
    latents: Tensor, labels: Tensor, weights: Tensor, scheduler, preview, args: argparse.Namespace
) -> DiTTransformer2DModel:
    """weights (N,): how often each image is drawn from step `--even_from` on."""
    torch.manual_seed(args.seed)
    dit = new_dit()
    initialise(dit)
    optimizer = torch.optim.AdamW(dit.parameters(), lr=8e-4, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    # warm up, hold, and fall to 1 % over the last quarter: --dit_steps may be changed until then
    schedule = LambdaLR(optimizer, lambda step: min((step + 1) / 300, 1, max(0.01, 4 * (1 - step / args.dit_steps))))
    ema = EMAModel(dit.parameters(), decay=0.9995, use_ema_warmup=True, power=0.75)
    checkpoint, step = args.work_dir / "dit.pt", 0
    if checkpoint.exists():
        state = torch.load(checkpoint)
        dit.load_state_dict(state["model"]), optimizer.load_state_dict(state["optimizer"])
        ema.load_state_dict(state["ema"]), schedule.load_state_dict(state["schedule"])
        step = state["step"]

    forward = torch.compile(dit) if args.compile else dit
    bar = tqdm(range(step, args.dit_steps), desc="DiT", initial=step, total=args.dit_steps, mininterval=5)
    average = None
    for step in bar:
        generator = torch.Generator().manual_seed(step)
        if step < args.even_from:
            rows = torch.randint(len(latents), (args.batch_size,), generator=generator)
        else:
            rows = torch.multinomial(weights, args.batch_size, replacement=True, generator=generator)
        x_0, y = latents[rows], labels[rows]
        noise = torch.randn(x_0.shape, generator=generator)
        timesteps = torch.randint(1000, y.shape, generator=generator)
        y = torch.where(torch.rand(y.shape, generator=generator) < 0.1, NULL_CLASS, y)
        x_t = scheduler.add_noise(x_0, noise, timesteps)
        with torch.autocast("cpu", torch.bfloat16):
            output = forward(x_t, timestep=timesteps, class_labels=y).sample
        loss = diffusion_loss(output, x_0, noise, timesteps, scheduler, snr_gamma=5).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(dit.parameters(), 1.0)
        optimizer.step(), schedule.step(), optimizer.zero_grad()
        ema.step(dit.parameters())
        average = loss.item() if average is None else 0.99 * average + 0.01 * loss.item()
        bar.set_postfix(loss=f"{average:.4f}")
        if (step + 1) % 500 == 0 or step + 1 == args.dit_steps:
            state = {"model": dit.state_dict(), "optimizer": optimizer.state_dict(), "ema": ema.state_dict()}
            save({**state, "schedule": schedule.state_dict(), "step": step + 1}, checkpoint)
            print(f"\nstep {step + 1}: loss {average:.4f}", flush=True)
            if (step + 1) % 1000 == 0:
                ema.store(dit.parameters()), ema.copy_to(dit.parameters())
                preview(dit).save(args.work_dir / f"dit-{step + 1:06d}.png")
                ema.restore(dit.parameters())
    ema.copy_to(dit.parameters())
    return dit


def pipeline(dit: DiTTransformer2DModel, vae: AutoencoderKL, scheduler, names: list[str]) -> DiTPipeline:
    id2label = dict(enumerate(names))
    pipe = DiTPipeline(dit, vae, scheduler, id2label=id2label)
    pipe.register_to_config(id2label=id2label)  # DiTPipeline does not, and would save no labels
    return pipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, default=HERE / "data")
    parser.add_argument("--output_dir", type=Path, default=HERE / "base")
    parser.add_argument("--work_dir", type=Path, default=Path("runs/emoji_base"), help="checkpoints and previews")
    parser.add_argument("--vae_steps", type=int, default=2400)
    parser.add_argument("--dit_steps", type=int, default=8500)
    parser.add_argument(
        "--even_from",
        type=int,
        default=4000,
        help="step from which every emoji is drawn as often as every other, however many skin tones it has",
    )
    parser.add_argument(
        "--emphasis",
        nargs="*",
        default=[],
        metavar="GROUP=FACTOR",
        help="draw the classes of these groups (the class name up to its first hyphen) so many times as often",
    )
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="torch.compile the DiT")
    args = parser.parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)

    noto, dataset = load_images(args.data_dir / "noto/train.parquet")
    twemoji, _ = load_images(args.data_dir / "twemoji/train.parquet")
    names, variants = dataset.features["label"].names, Counter(dataset["name"])
    vae = train_vae(torch.cat([noto, twemoji]), args)
    latents = encode(vae, torch.cat([noto, noto.flip(-1)]))
    labels = torch.tensor(dataset["label"]).repeat(2)
    factors = dict(pair.split("=") for pair in args.emphasis)
    weights = torch.tensor(
        [
            float(factors.get(names[label].split("-")[0], 1)) / variants[name]
            for label, name in zip(dataset["label"], dataset["name"], strict=True)
        ]
    ).repeat(2)

    scheduler = DDIMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=False)
    class_labels = [names.index(name) for name in PREVIEW_CLASSES for _ in range(6)]

    def preview(dit):
        images = pipeline(dit, vae, scheduler, names)(
            class_labels, guidance_scale=3.0, num_inference_steps=50, generator=torch.Generator().manual_seed(0)
        ).images
        return make_image_grid(images, len(PREVIEW_CLASSES), 6)

    trained = train_dit(latents, labels, weights, scheduler, preview, args)
    dit = new_dit()  # a plain model again, with its own copy of the embedder in every block
    dit.load_state_dict(trained.state_dict())
    pipe = pipeline(dit, vae, scheduler, names).to(torch.float16)
    pipe.save_pretrained(args.output_dir)
    print(f"{args.output_dir}: {sum(f.stat().st_size for f in args.output_dir.rglob('*') if f.is_file()):,} bytes")


if __name__ == "__main__":
    run_script(main)
