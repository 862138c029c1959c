"""What encoding the images once is worth: ten epochs on cached latents against ten that encode every batch.

    python examples/benchmarks/latent_cache.py

Trains DiffFit on 256 Twemoji with the bundled base, the two ways in turn, and prints the ratio of their times. The way
with a cache pays for encoding once, both mirror images. Epochs of the two take turns.
"""

import argparse
import platform
import tempfile
import time
from pathlib import Path

import torch
from difffit_peft import DiffFitConfig
from difffit_peft.training.images import load_labelled_images, to_pixels
from difffit_peft.training.latents import encode_latents
from difffit_peft.training.losses import diffusion_loss
from difffit_peft.training.sampling import draw, sample_latents
from difffit_peft.training.scripts import positive_int, run_script
from diffusers import DDPMScheduler, DiTPipeline
from peft import get_peft_model
from torch.utils.data import DataLoader
from tqdm import tqdm

AVATARS = Path(__file__).resolve().parents[1] / "avatars"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_images", type=positive_int, default=256)
    parser.add_argument("--epochs", type=positive_int, default=10)
    parser.add_argument("--batch_size", type=positive_int, default=64)
    args = parser.parse_args()

    pipe = DiTPipeline.from_pretrained(AVATARS / "base", dtype=torch.float32)
    model = get_peft_model(pipe.transformer, DiffFitConfig())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    data = load_labelled_images(train_data_dir=AVATARS / "data/far/train.parquet", max_samples=args.num_images, seed=0)
    resolution = pipe.vae.config.sample_size
    images = data.images.cast_column("image", data.images.features["image"].__class__(decode=True))

    def train(step, mean, std, labels) -> None:
        draws = draw(0, step, mean.shape, 1000)
        x_0 = sample_latents(mean, std, draws.view, draws.posterior)
        x_t = scheduler.add_noise(x_0, draws.noise, draws.timesteps)
        output = model(x_t, timestep=draws.timesteps, class_labels=labels).sample
        diffusion_loss(output, x_0, draws.noise, draws.timesteps, scheduler).mean().backward()
        optimizer.step(), optimizer.zero_grad()

    def cached(epoch: int) -> None:
        for step, batch in enumerate(DataLoader(dataset, args.batch_size, shuffle=True)):
            train(1000 * epoch + step, *batch)

    def encoding(epoch: int) -> None:
        for step, rows in enumerate(torch.randperm(len(images)).split(args.batch_size)):
            pixels = torch.stack([to_pixels(images[int(row)]["image"], resolution) for row in rows])
            mirrored = torch.rand(len(rows)) < 0.5
            pixels = torch.where(mirrored.view(-1, 1, 1, 1), pixels.flip(-1), pixels)
            with torch.no_grad():
                posterior = pipe.vae.encode(pixels).latent_dist
            scale = pipe.vae.config.scaling_factor
            batch = ((scale * posterior.mean)[:, None], (scale * posterior.std)[:, None], data.labels[rows])
            train(1000 * epoch + step, *batch)

    seconds = dict.fromkeys(("encoding once", "cached", "encoding"), 0.0)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        dataset = encode_latents(pipe.vae, data, resolution, folder, batch_size=args.batch_size)
        seconds["encoding once"] = time.perf_counter() - start
        cached(0)  # warms up
        for epoch in tqdm(range(args.epochs), desc="epochs"):
            for way in (cached, encoding):
                start = time.perf_counter()
                way(epoch)
                seconds[way.__name__] += time.perf_counter() - start
    once = seconds["encoding once"] + seconds["cached"]
    print(
        f"\n{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}\n"
        f"{args.epochs} epochs of {len(data)} images: {seconds['encoding']:.1f} s encoding every batch, {once:.1f} s "
        f"encoding once ({seconds['encoding once']:.1f} s of them): {seconds['encoding'] / once:.2f} times as fast"
    )


if __name__ == "__main__":
    run_script(main)
