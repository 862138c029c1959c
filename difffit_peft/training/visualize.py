"""What a training run leaves to look at: grids of samples, the plot of its losses."""

from __future__ import annotations

import unicodedata
from pathlib import Path
from typing import Any

import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import make_image_grid
from matplotlib import font_manager
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font

from ..writing import write
from .sampling import null_class


def sample_grid(
    pipe: DiffusionPipeline,
    classes: list[int],
    num_images: int,
    *,
    seed: int = 0,
    **options: Any,
) -> PIL.Image.Image:
    """One row of `num_images` samples per class, from the seeds `seed`, `seed` + 1, ..., the same in each row.

    The pipeline is a class-conditional one, called with `options`, such as `guidance_scale`. Its transformer's mode and
    the random state are as before afterwards.

    Raises:
        ValueError: for no pictures, or a class that the model's class table does not hold.
    """
    null = null_class(pipe.transformer)
    assert null is not None  # a class-conditional transformer has one
    wrong = [label for label in classes if not 0 <= label <= null]
    if wrong or not classes or num_images < 1:
        raise ValueError(
            f"Classes {wrong or classes} with {num_images} pictures each cannot be sampled: give classes from 0 to "
            f"{null - 1}, and at least one picture."
        )
    calls = [{"class_labels": [label] * num_images} | options for label in classes]
    return grid_of_calls(pipe, pipe.transformer, calls, num_images, seed=seed)


def grid_of_calls(
    pipe: DiffusionPipeline, model: Any, calls: list[dict[str, Any]], num_images: int, *, seed: int = 0
) -> PIL.Image.Image:
    """One row of `num_images` pictures per call of the pipeline, from the seeds `seed`, `seed` + 1, ..., in each row.

    The mode of `model`, which is a part of the pipeline, and the random state are as before afterwards.
    """
    training, device = model.training, model.device
    model.eval()
    images = []
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)  # schedulers that draw without a generator
        for call in calls:
            generator = [torch.Generator().manual_seed(seed + i) for i in range(num_images)]
            images += pipe(**call, generator=generator).images
    model.train(training)
    return make_image_grid(images, len(calls), num_images)


def label_rows(grid: PIL.Image.Image, names: list[str]) -> PIL.Image.Image:
    """The grid with a name to the left of each row. Characters that no installed font can draw are put in words."""
    side = grid.height // len(names)
    captions = [_drawable(name) for name in names]
    fonts = [PIL.ImageFont.truetype(path, max(10, side // 8)) for _, path in captions]
    margin = round(max(font.getlength(text) for (text, _), font in zip(captions, fonts, strict=True))) + side // 4
    labelled = PIL.Image.new("RGB", (margin + grid.width, grid.height), "white")
    labelled.paste(grid, (margin, 0))
    draw = PIL.ImageDraw.Draw(labelled)
    for row, ((text, _), font) in enumerate(zip(captions, fonts, strict=True)):
        draw.text((margin - side // 8, (row + 0.5) * side), text, fill="black", anchor="rm", font=font)
    return labelled


def _drawable(name: str) -> tuple[str, str]:
    """A name in one line, and the file of a font that has all its characters.

    Where no font has them all, a symbol becomes its name in Unicode and any other character its code.
    """
    name = " ".join(name.split())
    default = font_manager.findfont("DejaVu Sans")  # matplotlib brings it
    installed = sorted(
        (font.name, font.fname)
        for font in font_manager.fontManager.ttflist
        if font.style == "normal" and font.weight == 400 and "Last Resort" not in font.name and "Color" not in font.name
    )
    for path in (default, *(path for _, path in installed)):
        if {ord(c) for c in name} <= FT2Font(path).get_charmap().keys():
            return name, path
    known = FT2Font(default).get_charmap()
    words = [c if ord(c) in known else f" {_in_words(c)} " for c in name if unicodedata.category(c) not in ("Cf", "Mn")]
    return " ".join("".join(words).split()), default


def _in_words(character: str) -> str:
    code = f"U+{ord(character):04X}"
    return unicodedata.name(character, code).lower() if unicodedata.category(character) == "So" else code


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
