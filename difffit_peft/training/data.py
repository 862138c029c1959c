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
import re
import shutil
import time
import warnings
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
import numpy as np
import PIL.Image
import PIL.ImageOps
import pyarrow
import torch
from datasets import ClassLabel, Features, Image, Value, load_dataset, load_dataset_builder
from datasets import Dataset as Table
from datasets.data_files import EmptyDatasetError
from datasets.exceptions import DatasetGenerationError
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from diffusers import AutoencoderKL
from filelock import FileLock
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ..class_names import class_indices, classes_called
from ..config import parse_colour
from ..files import write

logger = logging.getLogger(__name__)

_CACHE_FORMAT = 3  # part of the cache's key: raise it when the pixels or the files' layout change
_HASH_BYTES = 16
_MOST_CLASSES = 100_000  # of integer labels, where no model says how many it holds
_SHOWN = 5  # so many examples in a message
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

    def summary(self) -> str:
        """How many images there are of each class, in words: the first 20 classes, and those without any."""
        counts = torch.bincount(self.labels, minlength=len(self.class_names)).tolist()
        listed = [f"{name} {count}" for name, count in zip(self.class_names, counts, strict=True)]
        if len(listed) > 20:
            listed[20:] = [f"and {len(listed) - 20:,} more of {min(counts[20:])} to {max(counts[20:])} images each"]
        text = f"{len(self):,} images in {len(self.class_names):,} classes: {', '.join(listed)}"
        empty = [name for name, count in zip(self.class_names, counts, strict=True) if not count]
        return f"{text}\nNo images of {_listed(empty)}" if empty else text

    def class_index(self, label: str | int) -> int:
        """The index of a class given by its name or its index; what is both is a name. Raises as `class_indices`."""
        return class_indices([label], dict(enumerate(self.class_names)), len(self.class_names))[0]

    def classes_agree(self, id2label: dict[int, str]) -> bool:
        """Whether a base has every class under the same name, or one of its names, and the same index."""
        return all(index in classes_called(name, id2label) for index, name in enumerate(self.class_names))


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
            with a metadata file as `datasets` reads it, a folder of parquet files, or one parquet file. Links are
            followed. What is left out of a folder is logged.
        dataset_config_name: the configuration of the dataset on the Hub.
        split: which split to load.
        image_column: column of images.
        label_column: column of class labels: a `ClassLabel`, strings (classes in sorted order), or integers from 0,
            which are the classes' indices (and names).
        max_classes: most classes the model can hold; `None`: any number, but integers below 100,000.
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
    if dataset_name is not None and Path(dataset_name).exists():  # `datasets` would read it, by rules of its own
        raise ValueError(
            f"dataset_name {dataset_name!r} is a folder or file here: give it as train_data_dir. If the dataset of "
            "that name on the Hub is meant, give its full id, user/name, or call the script in another folder."
        )
    cache_dir = None if cache_dir is None else str(cache_dir)
    try:
        if train_data_dir is not None:
            table = _load_local(Path(train_data_dir), split, cache_dir)
        else:
            table = load_dataset(dataset_name, dataset_config_name, split=split, cache_dir=cache_dir)
    except (DatasetGenerationError, pyarrow.ArrowInvalid) as error:  # they do not say what is wrong, or where
        raise ValueError(f"{dataset_name or train_data_dir} cannot be read: {error.__cause__ or error}") from error
    if len(table) == 0:
        raise ValueError(f"{dataset_name or train_data_dir}: split {split!r} has no rows, so nothing can be trained.")
    for argument, column in (("image_column", image_column), ("label_column", label_column)):
        if column not in table.column_names:
            raise ValueError(
                f"{argument} is {column!r}, but the dataset has the columns {table.column_names}: name one of those."
            )
    images = _undecoded(table, image_column)
    labels, class_names = _labels(table, label_column, max_classes)
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
            raise ValueError(
                f"train_data_dir {path} is a file but not .parquet: give a folder (unpack archives) or a .parquet file."
            )
        files = {split: glob.escape(str(path))}
        return load_dataset("parquet", data_files=files, split=split, cache_dir=cache_dir)

    nested = path / split
    divided = nested.is_dir() and any(_divides(child) for child in nested.iterdir())
    root = nested if divided else path
    scan = _scan(root)
    if not scan.images:
        if scan.parquet:
            return _load_parquet(path, split, cache_dir)
        raise ValueError(
            f"train_data_dir {root} holds neither images nor parquet files: "
            f"expected one folder of images per class, <class>/<image>.{_told(scan.left_out)}"
        )
    if scan.parquet:
        raise ValueError(
            f"train_data_dir {root} holds images ({_listed(scan.images)}) and parquet files ({_listed(scan.parquet)}): "
            "give a folder that holds only one of the two, or one .parquet file."
        )
    if not divided and split != "train":
        raise ValueError(
            f"split is {split!r}, but {nested} is no folder with classes or metadata in it. Without it, all of {path} "
            "is the split 'train': leave split out, or give another folder."
        )
    if divided:
        left_out = [child.name for child in sorted(path.iterdir()) if child != nested and not _hidden(child)]
        scan.left_out[f"what lies beside {split}/"] = left_out
    table = _load_metadata(root, scan, split, cache_dir) if scan.metadata else _load_classes(root, scan)
    if told := _told(scan.left_out):
        logger.warning("%s: this is left out.%s", root, told)
    return table


def _divides(child: Path) -> bool:
    """Whether a folder that is named as a split is one, and no class, as `child` lies in it."""
    return child.is_dir() and not _hidden(child) or child.name in ImageFolder.METADATA_FILENAMES


def _hidden(path: Path) -> bool:
    return path.name.startswith(".")


@dataclass
class _Scan:
    """What lies in a folder: paths relative to it, in sorted order."""

    images: list[str]
    metadata: list[str]
    parquet: list[str]
    folders: list[str]  # right in it
    left_out: dict[str, list[str]]  # by the reason


def _scan(root: Path) -> _Scan:
    """Follows links. Leaves out what is hidden, and files that do not end as those of images do."""
    scan = _Scan([], [], [], [], defaultdict(list))

    def visit(folder: str, above: set[str]) -> None:
        for entry in sorted(os.scandir(root / folder), key=lambda entry: entry.name):
            path, suffix = os.path.join(folder, entry.name), os.path.splitext(entry.name)[1].lower()
            is_folder = os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()
            real = os.path.realpath(entry.path) if is_folder else ""
            if entry.name.startswith("."):
                if is_folder or suffix in ImageFolder.EXTENSIONS:
                    scan.left_out["hidden"].append(path)
            elif real in above:
                scan.left_out["links to a folder that they lie in"].append(path)
            elif is_folder:
                if not folder:
                    scan.folders.append(path)
                visit(path, above | {real})
            elif entry.name in ImageFolder.METADATA_FILENAMES:
                scan.metadata.append(path)
            elif suffix in ImageFolder.EXTENSIONS:
                scan.images.append(path)
            elif suffix == ".parquet":
                scan.parquet.append(path)
            elif not os.path.exists(entry.path):
                scan.left_out["links to nothing"].append(path)
            else:
                scan.left_out[f"{suffix or 'other'} files"].append(path)

    visit("", {str(root), *map(str, root.parents)})
    no_text = [file for file in scan.images if re.search("[\ud800-\udfff]", file)]
    if no_text:
        raise ValueError(f"The names of {_listed(no_text)} in {root} are not UTF-8: rename them.")
    return scan


def _listed(names: list[str]) -> str:
    names = [name.encode(errors="backslashreplace").decode() for name in names]  # names of files may be no text
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else "")


def _told(left_out: dict[str, list[str]]) -> str:
    """A line for each reason to leave something out; nothing where nothing is."""
    lines = [f"\n  {reason}: {_listed(names)}" for reason, names in left_out.items() if names]
    if any(reason.endswith(" files") for reason in left_out):
        lines.append("\nFiles that belong to the data must be converted to another format, or unpacked.")
    return "".join(lines)


def _load_classes(root: Path, scan: _Scan) -> Table:
    """Every folder with images is a class, whatever its name."""
    misplaced = [file for file in scan.images if len(Path(file).parts) != 2]
    if misplaced:
        raise ValueError(
            f"{root / misplaced[0]} does not lie in a class's folder: expected {root}/<class>/<image> for every image "
            f"({len(misplaced)} of {len(scan.images)} lie elsewhere). One class needs its folder too."
        )
    folders = [os.path.dirname(file) for file in scan.images]
    names = sorted(set(folders))
    scan.left_out["folders without images, which become no classes"] = sorted(set(scan.folders) - set(names))
    rows = {"image": [str(root / file) for file in scan.images], "label": folders}
    return Table.from_dict(rows, features=Features({"image": Image(), "label": ClassLabel(names=names)}))


def _load_metadata(root: Path, scan: _Scan, split: str, cache_dir: str | None) -> Table:
    """The rows of the metadata files, which alone decide what is read."""
    files = [glob.escape(str(root / file)) for file in scan.metadata]
    try:
        table = load_dataset("imagefolder", data_files={split: files}, split=split, cache_dir=cache_dir)
    except ValueError as error:
        raise ValueError(f"{_listed(scan.metadata)} in {root} cannot be read as metadata of images: {error}") from error
    columns = [name for name, feature in table.features.items() if isinstance(feature, Image)]
    named = {
        path for name in columns for path in table.cast_column(name, Image(decode=False)).flatten()[f"{name}.path"][:]
    }
    unnamed = [file for file in scan.images if str(root / file) not in named]
    scan.left_out[f"images that {_listed(scan.metadata)} does not name"] = unnamed
    return table


def _load_parquet(path: Path, split: str, cache_dir: str | None) -> Table:
    """What `datasets` takes for the files of a split, and a warning if it finds fewer than there are."""
    files = _scan(path).parquet
    why = "it follows no links to folders, and passes over names that start with __"
    try:
        builder = load_dataset_builder("parquet", data_dir=glob.escape(str(path)), cache_dir=cache_dir)
    except EmptyDatasetError as error:
        raise ValueError(
            f"train_data_dir {path} holds parquet files ({_listed(files)}) that `datasets` does not find: {why}. Give "
            "the folder that they lie in, or one of the files."
        ) from error
    found = {file for files in builder.config.data_files.values() for file in files}
    if missed := [file for file in files if str(path / file) not in found]:
        logger.warning("%s: `datasets` does not find %s, which are left out: %s.", path, _listed(missed), why)
    builder.download_and_prepare()
    return builder.as_dataset(split=split)


def _undecoded(table: Table, column: str) -> Table:
    feature = table.features[column]
    holds_bytes = isinstance(feature, dict) and "bytes" in feature or feature == Value("binary")
    if not isinstance(feature, Image) and not holds_bytes:
        raise ValueError(
            f"image_column {column!r} holds {feature}: expected images (datasets.Image) or the bytes of image files."
        )
    images = table.select_columns(column).cast_column(column, Image(decode=False))
    return images if column == "image" else images.rename_column(column, "image")


def _labels(table: Table, column: str, max_classes: int | None) -> tuple[Tensor, list[str]]:
    feature = table.features[column]
    values = table.select_columns(column)[:][column]
    dtype = feature.dtype if isinstance(feature, Value) else None
    if not isinstance(feature, ClassLabel) and dtype not in _STRINGS and "int" not in str(dtype):
        raise ValueError(
            f"label_column {column!r} holds {feature}: expected one class per image, as a ClassLabel, a string or an "
            f"integer. The columns are {table.column_names}."
        )
    for nothing in (None, ""):
        if nothing in values:
            row = values.index(nothing)
            raise ValueError(f"label_column {column!r} is empty in row {row}: every image needs a class.")
    if dtype in _STRINGS:
        names = sorted(set(values))
        index = {name: i for i, name in enumerate(names)}
        values = [index[value] for value in values]
    elif isinstance(feature, ClassLabel):
        names = feature.names
    else:
        low, high, most = min(values), max(values), max_classes or _MOST_CLASSES
        if high >= most:
            shifted = f" Subtract {low} from each, so that they start at 0." if low > 0 and high - low < most else ""
            raise ValueError(
                f"label_column {column!r} holds integers from {low} to {high}, and integers are indices of classes: "
                f"here they must lie in 0 to {most - 1}.{shifted or ' Make them strings if they are names.'}"
            )
        names = [str(i) for i in range(high + 1)]
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
    """Pixels of shape (3, resolution, resolution); of a broken image, the reason why it cannot be read."""

    def __init__(self, images: Table, resolution: int, background: str):
        self.images, self.resolution, self.background = images, resolution, background

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> Tensor | str:
        value = self.images[row]["image"] or {"path": None, "bytes": b""}
        try:
            return to_pixels(Image().decode_example(value), self.resolution, self.background)
        except PIL.UnidentifiedImageError:
            return "it is empty, or no image"
        except Exception as error:  # Pillow raises a dozen types for broken files
            return str(error) or type(error).__name__

    def broken(self, rows: Iterable[int]) -> dict[int, str]:
        """Those of the rows that cannot be read, with the reasons."""
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
        key: a hash of the images and of what shaped their latents.
        about: the same to compare with another data set's: resolution and the like, and for each class how many images
            it has and a hash of them. JSON.

    Raises:
        ValueError: if the shapes do not fit together.
    """

    _folder: Path | None = None

    def __init__(self, mean: Tensor, std: Tensor, labels: Tensor, key: str = "", about: dict[str, Any] | None = None):
        if mean.shape != std.shape or mean.shape[1] != len(labels):
            raise ValueError(
                f"mean has shape {tuple(mean.shape)}, std {tuple(std.shape)}, and there are {len(labels)} labels: "
                "mean and std need equal shapes (views, N, channels, height, width), with N labels."
            )
        self.mean, self.std, self.labels, self.key, self.about = mean, std, labels, key, about or {}

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


class _HashDataset(Dataset):
    """BLAKE2 hashes of the bytes of image files. What cannot be read is as good as empty."""

    def __init__(self, images: Table):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, rows: list[int]) -> list[Tensor]:
        contents = (self._read(value or {"path": None, "bytes": None}) for value in self.images[rows]["image"])
        hashes = (hashlib.blake2b(content, digest_size=_HASH_BYTES).digest() for content in contents)
        return [torch.frombuffer(bytearray(digest), dtype=torch.uint8) for digest in hashes]

    def _read(self, value: dict[str, Any]) -> bytes:
        if value["path"] is None or value["bytes"] is not None:
            return value["bytes"] or b""
        try:  # a path with :// leads into an archive that `datasets` downloaded
            with fsspec.open(value["path"]) if "://" in value["path"] else open(value["path"], "rb") as file:
                return file.read()
        except (OSError, ValueError):  # a ValueError: no name of a file
            return b""


def _image_hashes(images: Table, cache_dir: Path, num_workers: int) -> Tensor:
    """Hashes of the images' bytes, (N, 16). `cache_dir` keeps them until the table, or the time of a file, is new."""
    start, newest = time.time_ns(), 0
    known = hashlib.blake2b(images._fingerprint.encode(), digest_size=_HASH_BYTES)
    for path in images.flatten()["image.path"][:]:
        if path is not None and os.path.exists(path):
            stat = os.stat(path)
            known.update(f"{path} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}".encode())
            newest = max(newest, stat.st_mtime_ns)
    file = cache_dir / f"hashes-{known.hexdigest()}"
    with FileLock(file.with_suffix(".lock")):
        content = file.read_bytes() if file.exists() else b""
        if len(content) != _HASH_BYTES * len(images):
            loader = DataLoader(_HashDataset(images), 64, num_workers=num_workers)
            content = torch.cat(list(tqdm(loader, desc="Reading images", unit="batch", delay=2))).numpy().tobytes()
            unreadable = hashlib.blake2b(b"", digest_size=_HASH_BYTES).digest() in content
            # what cannot be read now may be later, and a file that is written twice in a moment may keep its time
            if not unreadable and newest < start - 2 * 10**9:
                write(file, lambda partial: partial.write_bytes(content))
    return torch.frombuffer(bytearray(content), dtype=torch.uint8).view(-1, _HASH_BYTES)


def _latent_settings(vae: AutoencoderKL, resolution: int, random_flip: bool, background: str) -> dict[str, Any]:
    """What shapes latents beside the images. Raises `ValueError` if `background` is no colour."""
    config = {name: value for name, value in vae.config.items() if not name.startswith("_")}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in vae.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
    colour = list(parse_colour(background))
    return {
        "resolution": resolution,
        "random_flip": random_flip,
        "background": colour,
        "vae": digest.hexdigest()[:32],
    }


def _latents_key(settings: dict[str, Any], hashes: Tensor) -> str:
    images = hashlib.sha256(hashes.numpy().tobytes()).hexdigest()
    what = json.dumps([_CACHE_FORMAT, settings, images], sort_keys=True)
    return hashlib.sha256(what.encode()).hexdigest()[:32]


def _describe_images(hashes: Tensor, labels: Tensor, class_names: list[str]) -> dict[str, Any]:
    """Of each class, how many images it has and a hash of their set; and a hash of all in their order."""

    def digest(content: bytes) -> str:
        return hashlib.sha256(content).hexdigest()[:16]

    images = {}
    for i, name in enumerate(class_names):
        own = hashes[labels == i]
        if len(own):
            images[name] = [len(own), digest(b"".join(sorted(map(bytes, own.numpy()))))]
    return {"images": images, "order": digest(hashes.numpy().tobytes() + labels.numpy().tobytes())}


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

    They are kept in `cache_dir` in one folder per `key` and mapped from there the next time; a folder that cannot be
    read is written anew. The key holds the bytes of the images in their order, and no names or times: a copy of a data
    set is the same data. Processes that need the same one wait for the first. Runs on the VAE's device and in its
    dtype.

    Args:
        vae: the frozen autoencoder of the base.
        data: N images and their labels.
        resolution: side of the square images in pixels.
        cache_dir: folder of the cached folders.
        random_flip: encode the mirror images too.
        skip_broken_images: leave out images that cannot be read, and log which.
        background: colour under transparent pixels: a name that Pillow knows, or #rrggbb.
        batch_size: images encoded at once.
        num_workers: processes that read images.

    Returns:
        `mean` and `std` in half precision, each of shape (views, N, channels, height, width), `labels` of shape (N,),
        `key` and `about`. View 0 is the image; with `random_flip`, view 1 is its mirror image. Images left
        out do not count in N.

    Raises:
        ValueError: if `background` is no colour; naming the images that cannot be read, if there are any (with
            `skip_broken_images`, if there are no others); or if the VAE gives latents that are not finite.
    """
    settings = _latent_settings(vae, resolution, random_flip, background)
    Path(cache_dir).mkdir(parents=True, exist_ok=True)
    hashes = _image_hashes(data.images, Path(cache_dir), num_workers)
    key = _latents_key(settings, hashes)
    folder = Path(cache_dir) / f"latents-{key}"
    views = 2 if random_flip else 1
    pixels = _PixelDataset(data.images, resolution, background)
    with FileLock(folder.with_suffix(".lock")):
        broken = _read(folder, views, len(data))
        if broken and not skip_broken_images:
            broken = pixels.broken(broken) or None  # they may have been repaired since
        if broken is None:
            broken = _write(folder, vae, pixels, views, skip_broken_images, batch_size, num_workers)
        else:
            _report(broken, data.images, skip_broken_images)
        mean, std = _map(folder)
    kept = torch.tensor([row not in broken for row in range(len(data))])
    labels = data.labels[kept]
    if lost := sorted(set(data.labels.tolist()) - set(labels.tolist())):
        logger.warning("No image is left of %s.", _listed([data.class_names[i] for i in lost]))
    dataset = LatentDataset(mean, std, labels, key, settings | _describe_images(hashes[kept], labels, data.class_names))
    dataset._folder = folder
    return dataset


def _report(broken: dict[int, str], images: Table, skip: bool) -> None:
    if not broken:
        return
    count = len(images)
    lines = [f"{len(broken)} of {count} images cannot be read:"]
    for row, reason in list(broken.items())[:20]:
        path = (images[row]["image"] or {}).get("path")
        lines.append(f"{path} (row {row}): {reason}" if path else f"row {row}: {reason}")
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
        _report(broken, pixels.images, skip_broken_images)
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
