"""Labelled images for a training loop, as VAE latents that are encoded once and kept on disk.

data = load_labelled_images(train_data_dir="my_images", max_classes=1000)
dataset = encode_latents(pipe.vae, data, resolution=256, cache_dir="cache")
"""

import glob
import hashlib
import json
import logging
import math
import os
import shutil
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import PIL.Image
import PIL.ImageColor
import PIL.ImageOps
import torch
from datasets import ClassLabel, Image, Value, load_dataset
from datasets import Dataset as Table
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from diffusers import AutoencoderKL
from filelock import FileLock
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

logger = logging.getLogger(__name__)

_CACHE_FORMAT = 2  # part of the cache's key: raise it when the pixels or the files' layout change
_STRINGS = ("string", "large_string")


@dataclass(frozen=True)
class LabelledImages:
    """Images and their classes.

    `images` has one column, "image", still undecoded; `labels` has shape (N,) and holds indices into `class_names`.
    """

    images: Table
    labels: Tensor
    class_names: list[str]

    def __len__(self) -> int:
        return len(self.images)

    def class_index(self, label: str) -> int:
        """The index of a class given by its name, or by its index as a string."""
        if label in self.class_names:
            return self.class_names.index(label)
        if label.isdecimal() and int(label) < len(self.class_names):
            return int(label)
        near = get_close_matches(label, self.class_names, n=1)
        raise ValueError(
            f"{label!r} is no class of the dataset: give the name of one of its {len(self.class_names)} classes, or an "
            f"index below that. {f'Did you mean {near[0]!r}?' if near else f'Names are {self.class_names[:10]}.'}"
        )

    def classes_agree(self, labels: dict[str, int]) -> bool:
        """Whether `DiTPipeline.labels` has every class under the same name and index.

        The pipeline splits a name with commas in it into several names of one class.
        """
        names = [(part.strip(), index) for index, name in enumerate(self.class_names) for part in name.split(",")]
        return all(labels.get(name) == index for name, index in names)


def load_labelled_images(
    dataset_name: str | None = None,
    train_data_dir: str | os.PathLike | None = None,
    *,
    dataset_config_name: str | None = None,
    split: str = "train",
    image_column: str = "image",
    label_column: str = "label",
    max_classes: int | None = None,
    max_samples: int | None = None,
    seed: int | None = None,
    cache_dir: str | os.PathLike | None = None,
) -> LabelledImages:
    """Loads images and labels through `datasets`, without decoding the images.

    Args:
        dataset_name: a dataset on the Hub. Give this or `train_data_dir`.
        train_data_dir: a folder with one folder of images per class (or `<split>/` with such folders in it), a folder
            with a metadata file as `datasets` reads it, a folder of parquet files, or one parquet file.
        dataset_config_name: the configuration of the dataset on the Hub.
        split: which split to load.
        image_column: column of images.
        label_column: column of class labels: a `ClassLabel`, strings (classes in sorted order), or integers from 0
            (classes named after them).
        max_classes: most classes the model can hold; `None` checks nothing.
        max_samples: take only so many images, drawn with `seed`.
        seed: of the draw of `max_samples`.
        cache_dir: where `datasets` keeps its files; `None`: its default.

    Raises:
        ValueError: if there is nothing to load, a column is missing or of the wrong type, a label is missing or out
            of range, or there are more than `max_classes` classes.
    """
    if (dataset_name is None) == (train_data_dir is None):
        raise ValueError(
            f"dataset_name is {dataset_name!r} and train_data_dir is {train_data_dir!r}: give exactly one of them."
        )
    cache_dir = None if cache_dir is None else str(cache_dir)
    if train_data_dir is not None:
        table = _load_local(Path(train_data_dir), split, cache_dir)
    else:
        table = load_dataset(dataset_name, dataset_config_name, split=split, cache_dir=cache_dir)
    if len(table) == 0:
        raise ValueError(f"{dataset_name or train_data_dir}: split {split!r} has no rows, so nothing can be trained.")
    for argument, column in (("image_column", image_column), ("label_column", label_column)):
        if column not in table.column_names:
            raise ValueError(
                f"{argument} is {column!r}, but the dataset has the columns {table.column_names}: name one of those."
            )
    images = _undecoded(table, image_column)
    labels, class_names = _labels(table, label_column)
    if max_classes is not None and len(class_names) > max_classes:
        raise ValueError(
            f"The dataset has {len(class_names)} classes, but the base's class table holds {max_classes}: "
            "merge or drop classes."
        )
    if max_samples is not None:
        if max_samples < 1:
            raise ValueError(f"max_samples is {max_samples}: it must be at least 1.")
        rows = np.random.default_rng(seed).permutation(len(images))[:max_samples]
        images, labels = images.select(rows), labels[torch.from_numpy(rows)]
    return LabelledImages(images, labels, class_names)


def _load_local(path: Path, split: str, cache_dir: str | None) -> Table:
    path = path.expanduser().resolve()
    if not path.exists():
        raise ValueError(
            f"train_data_dir {path} does not exist: give a folder of images or parquet, or a .parquet file."
        )
    if path.is_file():
        if path.suffix.lower() != ".parquet":
            raise ValueError(f"train_data_dir {path} is a file but not .parquet: give a folder, or a .parquet file.")
        files = {split: glob.escape(str(path))}
        return load_dataset("parquet", data_files=files, split=split, cache_dir=cache_dir)

    nested = path / split
    root = nested if nested.is_dir() and any(child.is_dir() for child in nested.iterdir()) else path
    found = [Path(name) for name in sorted(glob.glob("**", root_dir=root, recursive=True))]
    pictures = [file for file in found if file.suffix.lower() in ImageFolder.EXTENSIONS and (root / file).is_file()]
    if not pictures:
        if any(file.suffix.lower() == ".parquet" for file in found):
            return load_dataset("parquet", data_dir=glob.escape(str(path)), split=split, cache_dir=cache_dir)
        raise ValueError(
            f"train_data_dir {root} holds neither images nor parquet files: "
            "expected one folder of images per class, <class>/<image>."
        )
    with_metadata = any(file.name in ImageFolder.METADATA_FILENAMES for file in found)
    misplaced = [file for file in pictures if len(file.parts) != 2]
    if misplaced and not with_metadata:
        raise ValueError(
            f"{root / misplaced[0]} does not lie in a class's folder: expected {root}/<class>/<image> for every image "
            f"({len(misplaced)} of {len(pictures)} lie elsewhere). One class needs its folder too."
        )
    # An explicit pattern: left to itself, `datasets` takes a class called "train" or "test" for a split.
    return load_dataset(
        "imagefolder",
        data_files={split: os.path.join(glob.escape(str(root)), "**")},
        drop_labels=None if with_metadata else False,
        split=split,
        cache_dir=cache_dir,
    )


def _undecoded(table: Table, column: str) -> Table:
    feature = table.features[column]
    holds_bytes = isinstance(feature, dict) and "bytes" in feature or feature == Value("binary")
    if not isinstance(feature, Image) and not holds_bytes:
        raise ValueError(
            f"image_column {column!r} holds {feature}: expected images (datasets.Image) or the bytes of image files."
        )
    images = table.select_columns(column).cast_column(column, Image(decode=False))
    return images if column == "image" else images.rename_column(column, "image")


def _labels(table: Table, column: str) -> tuple[Tensor, list[str]]:
    feature = table.features[column]
    values = table.select_columns(column)[:][column]
    dtype = feature.dtype if isinstance(feature, Value) else None
    if not isinstance(feature, ClassLabel) and dtype not in _STRINGS and "int" not in str(dtype):
        raise ValueError(
            f"label_column {column!r} holds {feature}: expected one class per image, as a ClassLabel, a string or an "
            f"integer. The columns are {table.column_names}."
        )
    if None in values:
        raise ValueError(f"label_column {column!r} is empty in row {values.index(None)}: every image needs a class.")
    if dtype in _STRINGS:
        names = sorted(set(values))
        index = {name: i for i, name in enumerate(names)}
        values = [index[value] for value in values]
    elif isinstance(feature, ClassLabel):
        names = feature.names
    else:
        names = [str(i) for i in range(max(values) + 1)]
    labels = torch.tensor(values, dtype=torch.int64)
    wrong = ((labels < 0) | (labels >= len(names))).nonzero()
    if len(wrong):
        row = int(wrong[0])
        raise ValueError(
            f"label_column {column!r} is {values[row]} in row {row} ({len(wrong)} such rows): labels must lie in 0 to "
            f"{max(len(names) - 1, 0)}. A negative label usually marks an unlabelled split."
        )
    return labels, names


def center_crop(image: PIL.Image.Image, size: int) -> PIL.Image.Image:
    """Resizes the shorter side to `size` and crops the centre square, as DiT (`center_crop_arr`) prepares images."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), PIL.Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), PIL.Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def parse_colour(name: str) -> tuple[int, int, int]:
    """Red, green and blue of a colour that is a name Pillow knows, or #rrggbb; another is a `ValueError`."""
    try:
        colour = PIL.ImageColor.getrgb(name)
    except ValueError:
        colour = (0, 0, 0, 0)
    if len(colour) != 3:
        raise ValueError(f"background is {name!r}, which is no colour: give a name such as white, or #rrggbb.")
    return colour


def to_rgb(image: PIL.Image.Image, background: str = "white") -> PIL.Image.Image:
    """Any image as 8-bit RGB: turned as its EXIF says, 16 bits reduced to 8, transparency composited on `background`.

    Raises:
        ValueError: if the pixels are floating point numbers, or `background` is no colour.
    """
    image = PIL.ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("its pixels are floating point numbers, whose range is unknown: convert it to 8 or 16 bits")
    if image.mode.startswith("I"):
        image = PIL.Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, parse_colour(background)), image)
    return image.convert("RGB")


def to_pixels(image: PIL.Image.Image, resolution: int, background: str = "white") -> Tensor:
    """The centre of an image as float32 of shape (3, resolution, resolution), in [-1, 1]. Raises as `to_rgb` does."""
    image = center_crop(to_rgb(image, background), resolution)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


class _PixelDataset(Dataset):
    """Pixels of shape (3, resolution, resolution); of a broken image, a line that names it and the reason."""

    def __init__(self, images: Table, resolution: int, background: str):
        self.images, self.resolution, self.background = images, resolution, background

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> Tensor | str:
        value = self.images[row]["image"] or {"path": None, "bytes": b""}
        try:
            return to_pixels(Image().decode_example(value), self.resolution, self.background)
        except PIL.UnidentifiedImageError:
            reason = "it is empty, or no image"
        except Exception as error:  # Pillow raises a dozen types for broken files
            reason = str(error) or type(error).__name__
        return f"{value['path']} (row {row}): {reason}" if value["path"] else f"row {row}: {reason}"

    def broken(self, rows: Iterable[int]) -> dict[int, str]:
        """Those of the rows that cannot be read, with their lines."""
        items = ((row, self[row]) for row in rows)
        return {row: item for row, item in items if isinstance(item, str)}


def _collate(items: list[Tensor | str]) -> tuple[Tensor | None, list[str | None]]:
    """A batch of the pixels, if there are any, and for every item what is wrong with it."""
    pixels = [item for item in items if isinstance(item, Tensor)]
    return torch.stack(pixels) if pixels else None, [item if isinstance(item, str) else None for item in items]


class LatentDataset(Dataset):
    """Triples of mean and std, each (views, channels, height, width) in half precision, and a class.

    It draws nothing itself, so what a loop draws does not depend on how far its loader runs ahead: see `draws`.
    The tensors that `encode_latents` gives are mapped from disk and read-only. Worker processes map them again.

    Args:
        mean: of the posteriors, shape (views, N, channels, height, width).
        std: the same.
        labels: shape (N,).
        key: the `latents_key` of the images.

    Raises:
        ValueError: if the shapes do not fit together.
    """

    _folder: Path | None = None

    def __init__(self, mean: Tensor, std: Tensor, labels: Tensor, key: str = ""):
        if mean.shape != std.shape or mean.shape[1] != len(labels):
            raise ValueError(
                f"mean has shape {tuple(mean.shape)}, std {tuple(std.shape)}, and there are {len(labels)} labels: "
                "mean and std need equal shapes (views, N, channels, height, width), with N labels."
            )
        self.mean, self.std, self.labels, self.key = mean, std, labels, key

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor, Tensor]:
        return self.mean[:, row], self.std[:, row], self.labels[row]

    def __getstate__(self) -> dict[str, Any]:
        mapped = () if self._folder is None else ("mean", "std")
        return {name: value for name, value in self.__dict__.items() if name not in mapped}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self._folder is not None:
            self.mean, self.std = _map(self._folder)


def latents_key(
    vae: AutoencoderKL, images: Table, resolution: int, random_flip: bool, background: str = "white"
) -> str:
    """A hash of what shapes the latents: images, resolution, mirroring, background, and the VAE's config and weights.

    Labels are no part of it. Raises `ValueError` if `background` is no colour.
    """
    config = {name: value for name, value in vae.config.items() if not name.startswith("_")}
    what = [_CACHE_FORMAT, images._fingerprint, resolution, random_flip, parse_colour(background), config]
    digest = hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode())
    for name, tensor in vae.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:32]


def encode_latents(
    vae: AutoencoderKL,
    data: LabelledImages,
    resolution: int,
    cache_dir: str | os.PathLike,
    *,
    random_flip: bool = True,
    skip_broken_images: bool = False,
    background: str = "white",
    batch_size: int = 16,
    num_workers: int = 0,
) -> LatentDataset:
    """Means and standard deviations of the VAE's posterior for every image, times its scaling factor.

    They are kept in `cache_dir` in one folder per `latents_key` and mapped from there the next time; a folder that
    cannot be read is written anew. Processes that need the same one wait for the first. Runs on the VAE's device and
    in its dtype.

    Args:
        vae: the frozen autoencoder of the base.
        data: N images and their labels.
        resolution: side of the square images in pixels.
        cache_dir: folder of the cached folders.
        random_flip: encode the mirror images too.
        skip_broken_images: leave out images that cannot be read, and log which.
        background: colour under transparent pixels: a name that Pillow knows, or #rrggbb.
        batch_size: images encoded at once.
        num_workers: processes that decode images.

    Returns:
        `mean` and `std` in half precision, each of shape (views, N, channels, height, width), `labels` of shape (N,),
        and `key`, the `latents_key`. View 0 is the image; with `random_flip`, view 1 is its mirror image. Images left
        out do not count in N.

    Raises:
        ValueError: if `background` is no colour; naming the images that cannot be read, if there are any (with
            `skip_broken_images`, if there are no others); or if the VAE gives latents that are not finite.
    """
    key = latents_key(vae, data.images, resolution, random_flip, background)
    folder = Path(cache_dir) / f"latents-{key}"
    views = 2 if random_flip else 1
    pixels = _PixelDataset(data.images, resolution, background)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        broken = _read(folder, views, len(data))
        if broken and not skip_broken_images:
            broken = pixels.broken(broken) or None  # they may have been repaired since
        if broken is None:
            broken = _write(folder, vae, pixels, views, skip_broken_images, batch_size, num_workers)
        else:
            _report(broken, len(data), skip_broken_images)
        mean, std = _map(folder)
    kept = torch.tensor([row not in broken for row in range(len(data))])
    dataset = LatentDataset(mean, std, data.labels[kept], key)
    dataset._folder = folder
    return dataset


def _report(broken: dict[int, str], count: int, skip: bool) -> None:
    if not broken:
        return
    lines = [f"{len(broken)} of {count} images cannot be read:", *list(broken.values())[:20]]
    if len(broken) > 20:
        lines.append(f"and {len(broken) - 20} more")
    listing = "\n  ".join(lines)
    if len(broken) == count:
        raise ValueError(f"{listing}\nNone is left to train on.")
    if not skip:
        raise ValueError(
            f"{listing}\nRepair or remove them, or leave them out with --skip_broken_images (skip_broken_images=True)."
        )
    logger.warning("%s\nThey are left out.", listing)


def _write(
    folder: Path,
    vae: AutoencoderKL,
    pixels: _PixelDataset,
    views: int,
    skip_broken_images: bool,
    batch_size: int,
    num_workers: int,
) -> dict[int, str]:
    """Encodes what can be read to `folder`, which appears whole or not at all, and returns what cannot be read."""
    loader = DataLoader(pixels, batch_size, num_workers=num_workers, collate_fn=_collate)
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by an encoder that was killed
    partial.mkdir()
    try:
        with open(partial / "latents.bin", "wb") as file:
            shape, broken = _encode(vae, loader, views, skip_broken_images, file)
        _report(broken, len(pixels), skip_broken_images)
        (partial / "about.json").write_text(json.dumps({"shape": shape, "broken": list(broken.items())}))
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return broken


@torch.no_grad()
def _encode(
    vae: AutoencoderKL, loader: DataLoader, views: int, skip_broken_images: bool, file: BinaryIO
) -> tuple[list[int], dict[int, str]]:
    """Appends latents to a file; returns their shape, (N, 2, views, channels, height, width), and what is broken."""
    count, shape, broken = 0, [], {}
    with tqdm(total=len(loader.dataset), desc="Encoding images", unit="image") as bar:
        for pixels, problems in loader:
            rows = range(bar.n, bar.n + len(problems))
            broken.update({row: problem for row, problem in zip(rows, problems, strict=True) if problem})
            bar.update(len(rows))
            if pixels is None or (broken and not skip_broken_images):
                continue  # only to find all that is broken
            pixels = pixels.to(vae.device, vae.dtype)
            posteriors = [vae.encode(seen).latent_dist for seen in (pixels, pixels.flip(-1))[:views]]
            latents = torch.stack([torch.stack([p.mean, p.std], dim=1) for p in posteriors], dim=2)
            latents = (latents.float() * vae.config.scaling_factor).half()
            if not latents.isfinite().all():
                raise ValueError(
                    f"The VAE in {vae.dtype} gives latents that are not finite for rows {rows[0]} to {rows[-1]}: "
                    "load it in float32."
                )
            file.write(latents.cpu().numpy().tobytes())
            count, shape = count + len(latents), list(latents.shape[1:])
    return [count, *shape], broken


def _read(folder: Path, views: int, count: int) -> dict[int, str] | None:
    """What the cached latents leave out; `None` if there are none that can be used."""
    if not folder.exists():
        return None
    try:
        about = json.loads((folder / "about.json").read_text())
        broken = dict(about["broken"])
        length, moments, *rest = about["shape"]
        size = (folder / "latents.bin").stat().st_size
        if (length, moments, rest[0], size) == (count - len(broken), 2, views, 2 * math.prod(about["shape"])):
            return broken
        reason = "its shapes are not those of the dataset"
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        reason = repr(error)
    logger.warning("The cached latents %s cannot be used (%s); encoding the images again.", folder, reason)
    return None


def _map(folder: Path) -> Tensor:
    """The cached latents, shape (2, views, N, channels, height, width)."""
    shape = tuple(json.loads((folder / "about.json").read_text())["shape"])
    array = np.memmap(folder / "latents.bin", np.float16, "r", shape=shape)  # copy-on-write is limited to free memory
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(array).permute(1, 2, 0, 3, 4, 5)


def sample_latents(mean: Tensor, std: Tensor, view: Tensor, noise: Tensor) -> Tensor:
    """A latent for every sample of a batch: a draw from the posterior of one of its views.

    Args:
        mean: shape (batch, views, channels, height, width), as `LatentDataset` gives it.
        std: the same.
        view: shape (batch,), which view to take: `Draws.view`.
        noise: shape (batch, channels, height, width), standard normal: `Draws.posterior`.

    Returns:
        float32 of shape (batch, channels, height, width).
    """
    rows = torch.arange(len(mean), device=mean.device)
    return mean[rows, view].float() + std[rows, view].float() * noise
