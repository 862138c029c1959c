"""Builds the emoji datasets of the examples from the npm packages the pictures are published in.

The same emoji are drawn in three styles: Noto (Google, Apache 2.0), on which the bundled base is pre-trained, and the
domains it is adapted to, Twemoji (CC BY 4.0) and OpenMoji (CC BY-SA 4.0). Needs `npm`, the network and a rasteriser of
vector art:

    pip install resvg-py
    python examples/emoji/build_dataset.py

Writes `data/noto/train.parquet` (every Noto emoji, skin tones included), and `train.parquet` and `test.parquet` in
`data/twemoji` and `data/openmoji` (without skin tones; the same 200 emoji held out), with columns `image` (RGB on
white; OpenMoji 128x128, the others 64x64), `label` (`ClassLabel` of the 98 Unicode subcategories) and `name`.
"""

import argparse
import hashlib
import io
import json
import subprocess
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

import resvg_py
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as PILImage
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
VERSIONS = {"emoji-datasource-google": "16.0.0", "emoji-datasource-twitter": "16.0.0", "openmoji": "17.0.0"}
NUM_HELD_OUT = 200


def npm_package(name: str, cache_dir: Path) -> tarfile.TarFile:
    """Downloads one package with npm (which verifies its checksum), unless it is in `cache_dir` already."""
    archive = cache_dir / f"{name}-{VERSIONS[name]}.tgz"
    if not archive.exists():
        with tempfile.TemporaryDirectory(dir=cache_dir) as folder:
            subprocess.run(["npm", "pack", "--silent", f"{name}@{VERSIONS[name]}"], cwd=folder, check=True)
            (Path(folder) / archive.name).rename(archive)
    return tarfile.open(archive)


def read(archive: tarfile.TarFile, name: str) -> bytes:
    return archive.extractfile(f"package/{name}").read()


def on_white(png: bytes) -> bytes:
    """RGBA artwork composited on white, as lossless WebP."""
    image = PILImage.open(io.BytesIO(png)).convert("RGBA")
    image = PILImage.alpha_composite(PILImage.new("RGBA", image.size, "white"), image).convert("RGB")
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", lossless=True)
    return buffer.getvalue()


def openmoji_png(archive: tarfile.TarFile, files: set[str], emoji: dict) -> bytes:
    """One emoji rasterised at 128x128. OpenMoji leaves out most variation selectors that Unicode's names have."""
    names = (emoji["unified"], emoji["non_qualified"], emoji["unified"].replace("-FE0F", ""))
    name = next(f"color/svg/{name}.svg" for name in names if f"package/color/svg/{name}.svg" in files)
    return bytes(resvg_py.svg_to_bytes(svg_string=read(archive, name).decode(), width=128, height=128))


def build(archive: tarfile.TarFile, style: str, picture: Callable[[dict], bytes], skin_tones: bool = False) -> Dataset:
    """All emoji of one style, one row per picture, in Unicode order.

    `archive` lists the emoji; `picture` gives the PNG of one of its entries.
    """
    emoji = json.loads(read(archive, "emoji.json"))
    emoji = sorted((e for e in emoji if e["category"] != "Component"), key=lambda e: e["sort_order"])
    rows = {"image": [], "label": [], "name": []}
    for e in tqdm(emoji, desc=style):
        tones = list(e.get("skin_variations", {}).values()) if skin_tones else []
        for variant in [e, *tones]:
            rows["image"].append({"bytes": on_white(picture(variant)), "path": None})
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
    partial.replace(path)
    print(f"{path}: {len(dataset)} images, {path.stat().st_size:,} bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=HERE / "data")
    parser.add_argument("--cache_dir", type=Path, default=Path("runs/npm"), help="where the npm archives are kept")
    args = parser.parse_args()
    args.cache_dir.mkdir(parents=True, exist_ok=True)

    google, twitter, openmoji = (npm_package(name, args.cache_dir) for name in VERSIONS)
    vectors = set(openmoji.getnames())
    noto = build(google, "Noto", lambda e: read(google, f"img/google/64/{e['image']}"), skin_tones=True)
    write(noto, args.output_dir / "noto/train.parquet")
    for folder, dataset in {
        "twemoji": build(twitter, "Twemoji", lambda e: read(twitter, f"img/twitter/64/{e['image']}")),
        "openmoji": build(twitter, "OpenMoji", lambda e: openmoji_png(openmoji, vectors, e)),
    }.items():
        train, test = hold_out(dataset)
        write(train, args.output_dir / folder / "train.parquet")
        write(test, args.output_dir / folder / "test.parquet")


if __name__ == "__main__":
    main()
