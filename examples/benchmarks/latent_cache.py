"""Latents that are encoded once: what that is worth, and whether a training step ever waits for them.

    python examples/benchmarks/latent_cache.py [--short]

- Ten epochs on cached latents against ten that encode every batch: DiffFit on 256 Twemoji with the bundled base, epochs
  of the two in turn. The way with a cache pays for encoding once, both mirror images.
- 1,000 and 200,000 synthetic images (8 x 8 pixels, in parquet), encoded by a tiny VAE with random weights into latents
  of the size that the bundled base takes: seconds to open the data set with an empty cache and again with a full one;
  seconds to load a batch of 64, over an epoch; those of a training step of the bundled base on such a batch; and by how
  much the process's anonymous memory has grown after the epoch. (Latents are mapped from disk: pages of the file come
  and go, and are not counted.) Each in a fresh process.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import torch
from accelerate import Accelerator
from device import in_fresh_process, resident
from difffit_peft import DiffFitConfig
from difffit_peft.training.images import LabelledImages, load_labelled_images, to_pixels
from difffit_peft.training.latents import encode_latents
from difffit_peft.training.loop import TrainingLoop
from difffit_peft.training.losses import diffusion_loss
from difffit_peft.training.objective import class_conditional
from difffit_peft.training.prepare import make_loader, split
from difffit_peft.training.sampling import draw, sample_latents
from difffit_peft.training.scripts import run_script
from diffusers import AutoencoderKL, DDPMScheduler, DiTPipeline
from peft import get_peft_model
from report import output_dir, parser, publish, spread, table, target
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

AVATARS = Path(__file__).resolve().parents[1] / "avatars"
BATCH = 64


def worth(num_images: int, epochs: int) -> dict[str, float]:
    """Seconds of encoding once, and of the epochs on cached latents and with encoding."""
    pipe = DiTPipeline.from_pretrained(AVATARS / "base", dtype=torch.float32)
    model = get_peft_model(pipe.transformer, DiffFitConfig())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    data = load_labelled_images(train_data_dir=AVATARS / "data/far/train.parquet", max_samples=num_images, seed=0)
    resolution = pipe.vae.config.sample_size
    images = data.images.cast_column("image", data.images.features["image"].__class__(decode=True))

    def train(step: int, mean: torch.Tensor, std: torch.Tensor, labels: torch.Tensor) -> None:
        draws = draw(0, step, mean.shape, 1000)
        x_0 = sample_latents(mean, std, draws.view, draws.posterior)
        x_t = scheduler.add_noise(x_0, draws.noise, draws.timesteps)
        output = model(x_t, timestep=draws.timesteps, class_labels=labels).sample
        diffusion_loss(output, x_0, draws.noise, draws.timesteps, scheduler).mean().backward()
        optimizer.step(), optimizer.zero_grad()

    def cached(epoch: int) -> None:
        for step, batch in enumerate(DataLoader(dataset, BATCH, shuffle=True)):
            train(1000 * epoch + step, *batch)

    def encoding(epoch: int) -> None:
        for step, rows in enumerate(torch.randperm(len(images)).split(BATCH)):
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
        dataset = encode_latents(pipe.vae, data, resolution, folder, batch_size=BATCH)
        seconds["encoding once"] = time.perf_counter() - start
        cached(0)  # warms up
        for epoch in tqdm(range(epochs), desc="epochs"):
            for way in (cached, encoding):
                start = time.perf_counter()
                way(epoch)
                seconds[way.__name__] += time.perf_counter() - start
    return seconds


def synthetic_images(folder: Path, count: int, num_classes: int = 100) -> LabelledImages:
    """Images of random pixels, no two alike, as a data set in parquet."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (count, 8 * 8 * 3), dtype=torch.uint8, generator=generator).numpy()
    contents = [{"bytes": b"P6 8 8 255\n" + row.tobytes(), "path": None} for row in pixels]
    columns = {"image": contents, "label": [f"class {index % num_classes:02}" for index in range(count)]}
    pyarrow.parquet.write_table(pyarrow.table(columns), folder / "images.parquet")
    return load_labelled_images(train_data_dir=folder / "images.parquet", cache_dir=folder / "datasets")


def tiny_vae(channels: int) -> AutoencoderKL:
    """Halves the sides of an image, with random weights."""
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return AutoencoderKL(**kinds, block_out_channels=(4, 4), norm_num_groups=2, latent_channels=channels).eval()


def seconds_of_steps(model: nn.Module, loader: DataLoader) -> list[float]:
    """Of a training step on each batch, of the script's own loop."""
    adapted = get_peft_model(model, DiffFitConfig())
    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-3)
    prepared = accelerator.prepare(adapted, optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer))
    loop = TrainingLoop(accelerator, *prepared, class_conditional(adapted, DDPMScheduler()), seed=0, ema_decay=0.9999)
    list(loop.steps(loader))
    return loop.seconds[1:]  # without the first one, which warms up


def loading(num_images: int, num_steps: int, model: nn.Module | None = None, batch: int = BATCH) -> dict[str, Any]:
    """What it takes to open, load and train on so many images; for a fresh process. `None`: the bundled base."""
    if model is None:
        model = DiTPipeline.from_pretrained(AVATARS / "base", dtype=torch.float32).transformer
    vae, resolution = tiny_vae(model.config.in_channels), 2 * model.config.sample_size
    with tempfile.TemporaryDirectory() as name:
        data = synthetic_images(Path(name), num_images)
        opening = []
        for _ in range(2):  # with an empty cache, and with a full one
            start = time.perf_counter()
            latents = encode_latents(vae, data, resolution, name, random_flip=False, batch_size=BATCH)
            train, _ = split(latents, 0, seed=0)
            opening.append(time.perf_counter() - start)
        waits, before = [], 0
        batches = iter(make_loader(train, batch, num_images, seed=0))
        while True:
            start = time.perf_counter()
            if next(batches, None) is None:
                break
            waits.append(time.perf_counter() - start)
            before = before or resident("RssAnon")  # after the first, which allocates what the others use again
        grown = resident("RssAnon") - before
        steps = seconds_of_steps(model, make_loader(train, batch, (num_steps + 1) * batch, seed=0))
    return {"images": num_images, "opening": opening, "batches": waits, "grown_bytes": grown, "steps": steps}


def share(found: dict[str, Any]) -> float:
    """Of a step, the part that is waiting for its batch, in percent."""
    return 100 * statistics.median(found["batches"]) / statistics.median(found["steps"])


def loading_table(results: list[dict[str, Any]]) -> str:
    columns = (
        "images",
        "open, empty cache, s",
        "open, full cache, s",
        f"load a batch of {BATCH}, ms",
        "a step, s",
        "of it waiting, %",
        "memory after an epoch, MB",
    )
    rows = [
        [
            f"{found['images']:,}",
            *(f"{seconds:.2f}" for seconds in found["opening"]),
            f"{1000 * statistics.median(found['batches']):.2f}",
            spread(found["steps"]),
            f"{share(found):.2f}",
            f"{found['grown_bytes'] / 1e6:+.1f}",
        ]
        for found in results
    ]
    return table(columns, rows)


def main() -> None:
    args = parser(__doc__).parse_args()
    folder = output_dir(args)
    num_images, epochs, counts, num_steps = (64, 1, (100, 2_000), 3) if args.short else (256, 10, (1_000, 200_000), 10)
    os.environ["OMP_NUM_THREADS"] = "2"  # of the processes started here, as in the other benchmarks
    torch.set_num_threads(2)
    seconds = worth(num_images, epochs)
    once = seconds["encoding once"] + seconds["cached"]
    results = [in_fresh_process(loading, count, num_steps) for count in counts]
    most = f"{counts[-1]:,} images"
    about = (
        f"{epochs} epochs of {num_images} images on the bundled base: {seconds['encoding']:.1f} s if every batch is "
        f"encoded, {once:.1f} s if all are encoded once ({seconds['encoding once']:.1f} s of them): "
        f"{seconds['encoding'] / once:.2f} times as fast."
    )
    loads = (
        "Synthetic images through the loader of the training scripts, without worker processes; the step is one of the "
        "bundled base in float32:"
    )
    publish(
        folder,
        "latent_cache",
        "Latents that are encoded once",
        "\n\n".join([about, loads, loading_table(results)]),
        {"worth": seconds, "loading": results},
        targets=[
            target(f"of a step, waiting for the loader, {most}, %", "≤", 1, share(results[-1])),
            target(f"memory grown by an epoch, {most}, MB", "≤", 20, results[-1]["grown_bytes"] / 1e6),
        ],
    )


if __name__ == "__main__":
    run_script(main)
