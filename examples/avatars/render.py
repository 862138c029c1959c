"""Renders the avatars of the examples: the styles the bundled base is trained on, and the domains it is adapted to.

    pip install -e ".[avatars]"
    python examples/avatars/render.py            # what train_base.py needs, 42 x 5,000 pictures
    python examples/avatars/render.py --domains  # data/*/train.parquet, the domains as they are bundled

DiceBear draws a picture from a style and a seed, and the same seed gives the same picture, so sets of any size cost
nothing to ship. Each style varies all that it can vary (hair, eyes, mouths, glasses, colours ...); a style without a
background of its own gets one of six colours. A picture takes 3 ms; what is drawn is kept in `--cache_dir`.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import resvg_py
from dicebear import Avatar, Style
from difffit_peft.training.scripts import positive_int, run_script, user_path
from difffit_peft.writing import write
from PIL import Image
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
CACHE = Path("runs/avatars/pictures")
PASTELS = ["ffffff", "b6e3f4", "c0aede", "d1d4f9", "ffd5dc", "ffdfbf"]  # DiceBear's own, and white

# Left out of all: avataaars, bottts and their neutral forms (neither CC0, CC BY nor MIT), initials (letters need a
# font), and four whose lines are finer than 64 pixels show (constellation, disco, icons, weave).
BASE = [
    "adventurer",
    "adventurer-neutral",
    "big-ears-neutral",
    "big-smile",
    "blobs",
    "cameo",
    "clay",
    "critters",
    "croodles",
    "croodles-neutral",
    "cutouts",
    "fun-emoji",
    "gaze",
    "glass",
    "glyphs",
    "identicon",
    "initial-face",
    "landscape",
    "line-face",
    "loops",
    "lorelei",
    "lorelei-neutral",
    "miniavs",
    "notionists",
    "notionists-neutral",
    "open-peeps",
    "pixel-art",
    "pixel-art-neutral",
    "pixelbot",
    "rings",
    "shadows",
    "shape-grid",
    "shapes",
    "slice",
    "squircles",
    "stack",
    "stripes",
    "thumbs",
    "toon-head",
    "triangles",
    "voxel-art",
    "waves",
]

# What the base is adapted to: for each domain its classes, each a style and the options that narrow it.
DOMAINS: dict[str, dict[str, tuple[str, dict[str, Any]]]] = {
    "inside": {  # new combinations of what the base knows, in styles that it draws well
        "red curls and glasses": (
            "miniavs",
            {"hairVariant": ["curly"], "hairColor": ["c1301c", "e0561b"], "glassesProbability": 100},
        ),
        "zombies": ("voxel-art", {"skinColor": ["7fb069", "93c47d"], "backgroundColor": ["1f2a44", "3b2a4d"]}),
        "vikings": (
            "toon-head",
            {
                "hairColor": ["b5401b", "d98b2b"],
                "rearHairProbability": 100,
                "beardProbability": 100,
                "beardVariant": ["fullBeard", "longBeard"],
            },
        ),
        "landscape at dusk": (
            "landscape",
            {
                "backgroundColor": ["2b1b4d", "3a1f5d"],
                "orbColor": ["ffe08a"],
                "hill1Color": ["5b2a86"],
                "hill2Color": ["7b3fa0"],
                "hill3Color": ["a05cb5"],
                "hill4Color": ["ff8fb1"],
            },
        ),
    },
    "near": {style: (style, {}) for style in ("big-ears", "dylan", "marbles", "micah", "moods", "personas")},  # faces
    "middle": {style: (style, {}) for style in ("patchwork", "planets", "sprouts", "voxel-bot")},
}
BUNDLED = {"inside": 60, "near": 200, "middle": 200}  # pictures of each class in data/*/train.parquet


@cache
def _style(name: str) -> Style:
    return Style(json.loads(files("dicebear_styles").joinpath(f"{name}.json").read_text("utf-8")))


@cache
def _own_background(name: str) -> bool:
    return "background" in json.loads(files("dicebear_styles").joinpath(f"{name}.json").read_text("utf-8"))["colors"]


def draw(seed: str, style: str, size: int = 64, **options: Any) -> np.ndarray:
    """One avatar, (size, size, 3), uint8. The options are DiceBear's, such as `hairColor=["cb6820"]`."""
    background = {} if _own_background(style) else {"backgroundColor": PASTELS}
    svg = Avatar(_style(style), {"seed": seed, "size": size, **background, **options}).to_string()
    png = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, skip_system_fonts=True)
    picture = Image.open(io.BytesIO(png)).convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    return np.asarray(Image.alpha_composite(white, picture).convert("RGB"))


def pictures(
    style: str, count: int, split: str = "train", cache_dir: Path = CACHE, size: int = 64, **options: Any
) -> np.ndarray:
    """`count` avatars of a style, (count, size, size, 3), uint8, drawn once and then mapped from `cache_dir`.

    Splits have seeds of their own: nothing in "test" is drawn for "train".
    """
    key = hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()[:8] if options else "all"
    path = cache_dir / f"{style}-{key}-{size}-{split}-{count}.npy"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        seeds = [f"{split}-{i}" for i in range(count)]
        with ProcessPoolExecutor() as pool:
            drawn = pool.map(partial(draw, style=style, size=size, **options), seeds, chunksize=100)
            drawn = np.stack(list(tqdm(drawn, desc=f"{style}, {split}", total=count, leave=False)))
        write(path, lambda partial: np.save(partial, drawn))
    return np.load(path, mmap_mode="r")


def bundle(path: Path, domain: str, count: int, split: str, cache_dir: Path = CACHE, size: int = 64) -> None:
    """Writes `count` pictures of each class as parquet: columns `image` (lossless WebP) and `label` (`ClassLabel`)."""
    rows: dict[str, list] = {"image": [], "label": []}
    for label, (style, options) in enumerate(DOMAINS[domain].values()):
        for picture in pictures(style, count, split, cache_dir, size, **options):
            buffer = io.BytesIO()
            Image.fromarray(picture).save(buffer, "WEBP", lossless=True)
            rows["image"].append({"bytes": buffer.getvalue(), "path": None})
            rows["label"].append(label)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(DOMAINS[domain]))})
    write(path, datasets.Dataset.from_dict(rows, features=features).to_parquet)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache_dir", type=user_path, default=CACHE)
    parser.add_argument("--count", type=positive_int, default=5000, help="pictures of each style of the base")
    parser.add_argument("--domains", action="store_true", help="the bundled domains in the place of the base's styles")
    args = parser.parse_args()
    if args.domains:
        for domain in tqdm(DOMAINS, desc="Domains"):
            path = HERE / "data" / domain / "train.parquet"
            bundle(path, domain, BUNDLED[domain], "train", args.cache_dir)
        return
    for style in tqdm(BASE, desc="Styles"):
        pictures(style, args.count, cache_dir=args.cache_dir)


if __name__ == "__main__":
    run_script(main)
