"""Builds the two emoji datasets of the demo from the npm packages they are published in.

The same emoji are drawn in two styles: Noto (Google, Apache 2.0), on which the bundled base is pre-trained, and
Twemoji (CC BY 4.0), the domain the demo adapts it to. Needs `npm` and the network:

    python examples/emoji/build_dataset.py

Writes `data/noto/train.parquet` (every Noto emoji, skin tones included) and `data/twemoji/{train,test}.parquet`
(without skin tones; 200 emoji held out), with columns `image` (64x64 RGB on white), `label` (`ClassLabel` of the 98
Unicode subcategories) and `name`.
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
from PIL import Image as PILImage
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
VERSION = "16.0.0"
NUM_HELD_OUT = 200


def npm_package(name: str, cache_dir: Path) -> tarfile.TarFile:
    """Downloads one package with npm (which verifies its checksum), unless it is in `cache_dir` already."""
    archive = cache_dir / f"{name}-{VERSION}.tgz"
    if not archive.exists():
        with tempfile.TemporaryDirectory(dir=cache_dir) as folder:
            subprocess.run(["npm", "pack", "--silent", f"{name}@{VERSION}"], cwd=folder, check=True)
            (Path(folder) / archive.name).rename(archive)
    return tarfile.open(archive)


def on_white(png: bytes) -> bytes:
    """RGBA artwork composited on white, as lossless WebP."""
    image = PILImage.open(io.BytesIO(png)).convert("RGBA")
    image = PILImage.alpha_composite(PILImage.new("RGBA", image.size, "white"), image).convert("RGB")
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", lossless=True)
    return buffer.getvalue()


def build(package: str, style: str, skin_tones: bool, cache_dir: Path) -> Dataset:
    """All emoji of one style, one row per picture, in Unicode order."""
    with npm_package(package, cache_dir) as archive:
        emoji = json.load(archive.extractfile("package/emoji.json"))
        emoji = sorted((e for e in emoji if e["category"] != "Component"), key=lambda e: e["sort_order"])
        files = {m.name: m for m in archive.getmembers() if m.name.startswith(f"package/img/{style}/64/")}
        rows = {"image": [], "label": [], "name": []}
        for e in tqdm(emoji, desc=style):
            tones = list(e.get("skin_variations", {}).values()) if skin_tones else []
            for picture in [e, *tones]:
                member = files[f"package/img/{style}/64/{picture['image']}"]
                rows["image"].append({"bytes": on_white(archive.extractfile(member).read()), "path": None})
                rows["label"].append(e["subcategory"])
                rows["name"].append(e["name"] or e["short_name"])
    classes = sorted(set(rows["label"]))
    features = Features({"image": Image(), "label": ClassLabel(names=classes), "name": Value("string")})
    rows["label"] = [classes.index(label) for label in rows["label"]]
    return Dataset.from_dict(rows, features=features)


def hold_out(dataset: Dataset) -> tuple[Dataset, Dataset]:
    """Splits off `NUM_HELD_OUT` emoji by a hash of their name: the same ones in every style and version."""
    digest = [hashlib.sha256(name.encode()).digest() for name in dataset["name"]]
    order = sorted(range(len(dataset)), key=digest.__getitem__)
    return dataset.select(sorted(order[NUM_HELD_OUT:])), dataset.select(sorted(order[:NUM_HELD_OUT]))


def write(dataset: Dataset, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    dataset.to_parquet(partial)
    partial.rename(path)
    print(f"{path}: {len(dataset)} images, {path.stat().st_size:,} bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=HERE / "data")
    parser.add_argument("--cache_dir", type=Path, default=Path("runs/npm"), help="where the npm archives are kept")
    args = parser.parse_args()
    args.cache_dir.mkdir(parents=True, exist_ok=True)

    write(build("emoji-datasource-google", "google", True, args.cache_dir), args.output_dir / "noto/train.parquet")
    train, test = hold_out(build("emoji-datasource-twitter", "twitter", False, args.cache_dir))
    write(train, args.output_dir / "twemoji/train.parquet")
    write(test, args.output_dir / "twemoji/test.parquet")


if __name__ == "__main__":
    main()
