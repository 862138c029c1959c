"""Builds the domain that is farthest from avatars, Twemoji, from the npm package the pictures are published in.

    python examples/avatars/twemoji.py

Needs `npm` and the network. Writes `train.parquet` and `test.parquet` to `data/far`: Twemoji (CC BY 4.0) without skin
tones, 200 of them held out, with columns `image` (RGB on white, 64x64), `label` (`ClassLabel` of the 98 Unicode
subcategories) and `name`.
"""

import argparse
import hashlib
import io
import json
import subprocess
import tarfile
import tempfile
from pathlib import Path

from datasets import ClassLabel, Dataset, Features, Image, Value
from difffit_peft.training.scripts import run_script, user_path
from difffit_peft.writing import write
from PIL import Image as PILImage
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
PACKAGE = "emoji-datasource-twitter@16.0.0"
NUM_HELD_OUT = 200


def read(archive: tarfile.TarFile, name: str) -> bytes:
    return archive.extractfile(f"package/{name}").read()


def on_white(png: bytes) -> bytes:
    """RGBA artwork composited on white, as lossless WebP."""
    image = PILImage.open(io.BytesIO(png)).convert("RGBA")
    image = PILImage.alpha_composite(PILImage.new("RGBA", image.size, "white"), image).convert("RGB")
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", lossless=True)
    return buffer.getvalue()


def build(archive: tarfile.TarFile) -> Dataset:
    """One row per picture, in Unicode order."""
    emoji = json.loads(read(archive, "emoji.json"))
    emoji = sorted((e for e in emoji if e["category"] != "Component"), key=lambda e: e["sort_order"])
    rows = {"image": [], "label": [], "name": []}
    for e in tqdm(emoji, desc="Twemoji"):
        rows["image"].append({"bytes": on_white(read(archive, f"img/twitter/64/{e['image']}")), "path": None})
        rows["label"].append(e["subcategory"])
        rows["name"].append(e["name"] or e["short_name"])
    classes = sorted(set(rows["label"]))
    features = Features({"image": Image(), "label": ClassLabel(names=classes), "name": Value("string")})
    rows["label"] = [classes.index(label) for label in rows["label"]]
    return Dataset.from_dict(rows, features=features)


def hold_out(dataset: Dataset) -> dict[str, Dataset]:
    """Splits off `NUM_HELD_OUT` emoji by a hash of their name: the same ones in every version."""
    digest = [hashlib.sha256(name.encode()).digest() for name in dataset["name"]]
    order = sorted(range(len(dataset)), key=digest.__getitem__)
    parts = {"train": order[NUM_HELD_OUT:], "test": order[:NUM_HELD_OUT]}
    return {split: dataset.select(sorted(rows)) for split, rows in parts.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=user_path, default=HERE / "data/far")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["npm", "pack", "--silent", PACKAGE], cwd=folder, check=True)  # npm verifies its checksum
        (path,) = Path(folder).iterdir()
        with tarfile.open(path) as archive:
            dataset = build(archive)
    for split, part in hold_out(dataset).items():
        path = args.output_dir / f"{split}.parquet"
        write(path, part.to_parquet)
        print(f"{path}: {len(part)} images, {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    run_script(main)
