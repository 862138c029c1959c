"""Labelled images from a folder, a file or the Hub, and their pixels as a model is trained on them.

data = load_labelled_images(train_data_dir="my_images", max_classes=10)
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps
import pyarrow
import torch
from datasets import ClassLabel, Image, Value, load_dataset
from datasets import Dataset as Table
from datasets.exceptions import DatasetGenerationError
from torch import Tensor

from ..class_names import class_indices, classes_called
from ..config import parse_colour
from .folders import listed, load_local

_MOST_CLASSES = 100_000  # of integer labels, where no model says how many it holds
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
        shown = [f"{name} {count}" for name, count in zip(self.class_names, counts, strict=True)]
        if len(shown) > 20:
            shown[20:] = [f"and {len(shown) - 20:,} more of {min(counts[20:])} to {max(counts[20:])} images each"]
        text = f"{len(self):,} images in {len(self.class_names):,} classes: {', '.join(shown)}"
        empty = [name for name, count in zip(self.class_names, counts, strict=True) if not count]
        return f"{text}\nNo images of {listed(empty)}" if empty else text

    def class_index(self, label: str | int) -> int:
        """The index of a class, given by name or index. What is both counts as a name. Raises as `class_indices`."""
        return class_indices([label], dict(enumerate(self.class_names)), len(self.class_names))[0]

    def classes_agree(self, id2label: dict[int, str]) -> bool:
        """Whether a base has every class under the same name, or one of its names, and the same index."""
        return all(index in classes_called(name, id2label) for index, name in enumerate(self.class_names))


def load_labelled_images(
    dataset_name: str | None = None,
    train_data_dir: str | os.PathLike | None = None,
    *,
    image_column: str = "image",
    label_column: str = "label",
    max_classes: int | None = None,
    max_samples: int | None = None,
    seed: int | None = None,
    **source: Any,
) -> LabelledImages:
    """Loads images and labels through `datasets`, without decoding the images.

    Args:
        dataset_name: a dataset on the Hub. Give this or `train_data_dir`.
        train_data_dir: a folder with one folder of images per class (or `<split>/` with such folders in it), a folder
            with a metadata file as `datasets` reads it, a folder of parquet files, or one parquet file. Links are
            followed. What is left out of a folder is logged.
        image_column: column of images.
        label_column: column of class labels: a `ClassLabel`, strings (classes in sorted order), or integers from 0,
            which are the classes' indices (and names).
        max_classes: most classes the model can hold; `None`: any number, but integers below 100,000.
        max_samples: take only so many images, drawn with `seed`.
        seed: of the draw of `max_samples`.
        source: `split`, by default "train"; `dataset_config_name`, the configuration of the dataset on the Hub;
            `cache_dir`, where `datasets` keeps its files, if not in its own folder.

    Raises:
        ValueError: if there is nothing to load, a column is missing or of the wrong type, a label is missing or out
            of range, or there are more than `max_classes` classes.
    """
    table = _load(dataset_name, train_data_dir, **source)
    _check_columns(table, image_column=image_column, label_column=label_column)
    images = _undecoded(table, image_column)
    labels, class_names = _labels(table, label_column, max_classes)
    if max_classes is not None and len(class_names) > max_classes:
        raise ValueError(
            f"The dataset has {len(class_names)} classes, but the base's class table holds {max_classes}: "
            "merge or drop classes."
        )
    if max_samples is not None:
        rows = _drawn(len(images), max_samples, seed)
        images, labels = images.select(rows), labels[torch.from_numpy(rows)]
    return LabelledImages(images, labels, class_names)


def load_captioned_images(
    *,
    image_column: str = "image",
    caption_column: str = "text",
    max_samples: int | None = None,
    seed: int | None = None,
    **source: Any,
) -> LabelledImages:
    """Images with captions: each caption is a class of its own, so `class_names` are the captions, each once.

    Args:
        image_column: column of images.
        caption_column: column of texts.
        max_samples: take only so many images, drawn with `seed`.
        seed: of the draw of `max_samples`.
        source: `dataset_name`, `train_data_dir`, `split`, `dataset_config_name` and `cache_dir`, as for
            `load_labelled_images`. A folder of images needs a metadata file, `metadata.csv` or `metadata.jsonl`, with a
            column of captions beside `file_name`.

    Raises:
        ValueError: as `load_labelled_images` does, and if the column holds anything but text.
    """
    table = _load(**source, captioned=True)
    _check_columns(table, image_column=image_column, caption_column=caption_column)
    feature = table.features[caption_column]
    if not isinstance(feature, Value) or feature.dtype not in _STRINGS:
        raise ValueError(
            f"caption_column {caption_column!r} holds {feature}: expected one text per image. The columns are "
            f"{table.column_names}."
        )
    if max_samples is not None:
        table = table.select(_drawn(len(table), max_samples, seed))
    values = table.select_columns(caption_column)[:][caption_column]
    empty = [row for row, value in enumerate(values) if not (value or "").strip()]
    if empty:
        raise ValueError(
            f"caption_column {caption_column!r} is empty in row {empty[0]} ({len(empty)} such rows): every image needs "
            "a caption."
        )
    captions = sorted(set(values))
    index = {caption: i for i, caption in enumerate(captions)}
    labels = torch.tensor([index[value] for value in values])
    return LabelledImages(_undecoded(table, image_column), labels, captions)


def _load(
    dataset_name: str | None = None,
    train_data_dir: str | os.PathLike | None = None,
    dataset_config_name: str | None = None,
    split: str = "train",
    cache_dir: str | os.PathLike | None = None,
    captioned: bool = False,
) -> Table:
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
            table = load_local(Path(train_data_dir), split, cache_dir, captioned)
        else:
            table = load_dataset(dataset_name, dataset_config_name, split=split, cache_dir=cache_dir)
    except (DatasetGenerationError, pyarrow.ArrowInvalid) as error:  # they do not say what is wrong, or where
        raise ValueError(f"{dataset_name or train_data_dir} cannot be read: {error.__cause__ or error}") from error
    if len(table) == 0:
        raise ValueError(f"{dataset_name or train_data_dir}: split {split!r} has no rows, so nothing can be trained.")
    return table


def _check_columns(table: Table, **columns: str) -> None:
    for argument, column in columns.items():
        if column not in table.column_names:
            raise ValueError(
                f"{argument} is {column!r}, but the dataset has the columns {table.column_names}: name one of those."
            )


def _drawn(count: int, max_samples: int, seed: int | None) -> np.ndarray:
    """So many rows, drawn with `seed`."""
    if max_samples < 1:
        raise ValueError(f"max_samples is {max_samples}: it must be at least 1.")
    return np.random.default_rng(seed).permutation(count)[:max_samples]


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
    for nothing in (None, ""):  # first: where a row is empty, a CSV file of integers is read as floats
        if nothing in values:
            row = values.index(nothing)
            raise ValueError(f"label_column {column!r} is empty in row {row}: every image needs a class.")
    if not isinstance(feature, ClassLabel) and dtype not in _STRINGS and "int" not in str(dtype):
        raise ValueError(
            f"label_column {column!r} holds {feature}: expected one class per image, as a ClassLabel, a string or an "
            f"integer. The columns are {table.column_names}."
        )
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
        ValueError: if the pixels are floating point numbers, or `background` is not a colour.
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
