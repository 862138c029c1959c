"""What a training run leaves to look at: grids of samples, the plot of its losses."""

from __future__ import annotations

from pathlib import Path

import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
import torch
from diffusers import DiTPipeline
from diffusers.utils import make_image_grid
from matplotlib.figure import Figure

from ..files import write


def sample_grid(
    pipe: DiTPipeline,
    classes: list[int],
    num_images: int,
    *,
    seed: int = 0,
    guidance_scale: float = 4.0,
    num_inference_steps: int = 50,
) -> PIL.Image.Image:
    """One row of `num_images` samples per class, from the seeds `seed`, `seed` + 1, ..., the same in each row.

    The random state and the mode of the transformer are as they were afterwards.
    """
    transformer = pipe.transformer
    training, device = transformer.training, transformer.device
    transformer.eval()
    images = []
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)  # schedulers that draw without a generator
        for label in classes:
            images += pipe(
                [label] * num_images,
                guidance_scale=guidance_scale,
                num_inference_steps=num_inference_steps,
                generator=[torch.Generator().manual_seed(seed + i) for i in range(num_images)],
            ).images
    transformer.train(training)
    return make_image_grid(images, len(classes), num_images)


def label_rows(grid: PIL.Image.Image, names: list[str]) -> PIL.Image.Image:
    """The grid with a name to the left of each of its rows."""
    side = grid.height // len(names)
    font = PIL.ImageFont.load_default(max(10, side // 8))
    margin = round(max(font.getlength(name) for name in names)) + side // 4
    labelled = PIL.Image.new("RGB", (margin + grid.width, grid.height), "white")
    labelled.paste(grid, (margin, 0))
    draw = PIL.ImageDraw.Draw(labelled)
    for row, name in enumerate(names):
        draw.text((margin - side // 8, (row + 0.5) * side), name, fill="black", anchor="rm", font=font)
    return labelled


def grid_over_time(grids: list[Path], rows: int) -> PIL.Image.Image:
    """The first picture of each of the `rows` classes, one row of them per grid of `sample_grid`."""
    pictures = []
    for path in grids:
        grid = PIL.Image.open(path)
        side = grid.height // rows
        pictures += [grid.crop((0, i * side, side, (i + 1) * side)) for i in range(rows)]
    return make_image_grid(pictures, len(grids), rows)


def plot_losses(history: dict[str, list[tuple[int, float]]], path: Path) -> None:
    """Draws losses, named lists of (step, loss), into the PNG file `path`."""
    figure = Figure(figsize=(7, 4), layout="tight")
    axis = figure.add_subplot(xlabel="step", ylabel="loss", yscale="log")
    for name, points in history.items():
        if points:
            axis.plot(*zip(*points, strict=True), label=name, alpha=0.8)
    axis.legend()
    axis.grid(alpha=0.3)
    write(path, lambda partial: figure.savefig(partial, format="png"))
