"""Labelled images for a training loop, as VAE latents that are encoded once and kept on disk.

data = load_labelled_images(train_data_dir="my_images", max_classes=1000)
mean, std = encode_latents(pipe.vae, data.images, resolution=256, cache_dir="cache")
dataset = LatentDataset(mean, std, data.labels)
"""

import glob
import hashlib
import json
import logging
import os
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from datasets import ClassLabel, Image, Value, load_dataset
from datasets import Dataset as Table
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from diffusers import AutoencoderKL
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

logger = logging.getLogger(__name__)

_CACHE_FORMAT = 1  # part of the cache's key: raise it when the pixels or the file's layout change
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


def to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """Any image as 8-bit RGB: turned as its EXIF says, transparency composited on white, 16 bits reduced to 8."""
    image = PIL.ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("its pixels are floating point numbers, whose range is unknown: convert it to 8 or 16 bits")
    if image.mode.startswith("I"):
        image = PIL.Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def to_pixels(image: PIL.Image.Image, resolution: int) -> Tensor:
    """The centre of an image as float32 of shape (3, resolution, resolution), in [-1, 1]."""
    image = center_crop(to_rgb(image), resolution)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


class _PixelDataset(Dataset):
    def __init__(self, images: Table, resolution: int):
        self.images, self.resolution = images, resolution

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> Tensor:
        value = self.images[row]["image"]
        try:
            return to_pixels(Image().decode_example(value), self.resolution)
        except Exception as error:  # Pillow raises a dozen types for broken files
            path = value.get("path") if isinstance(value, dict) else None
            name = f"Image {path} (row {row})" if path else f"The image of row {row}"
            raise ValueError(f"{name} cannot be read: {error}. Repair or remove it.") from error


def latents_key(vae: AutoencoderKL, images: Table, resolution: int, random_flip: bool) -> str:
    """A hash of what shapes the latents: images, resolution, mirroring, and the VAE's config and weights."""
    config = {name: value for name, value in vae.config.items() if not name.startswith("_")}
    what = [_CACHE_FORMAT, images._fingerprint, resolution, random_flip, config]
    digest = hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode())
    for name, tensor in vae.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:32]


def encode_latents(
    vae: AutoencoderKL,
    images: Table,
    resolution: int,
    cache_dir: str | os.PathLike,
    random_flip: bool = True,
    batch_size: int = 16,
    num_workers: int = 0,
) -> tuple[Tensor, Tensor]:
    """Means and standard deviations of the VAE's posterior for every image, times its scaling factor.

    They are kept in `cache_dir` in one file per `latents_key` and read from there the next time; a file that cannot
    be read is written anew. Runs on the VAE's device and in its dtype.

    Args:
        vae: the frozen autoencoder of the base.
        images: `LabelledImages.images`.
        resolution: side of the square images in pixels.
        cache_dir: folder of the cached files.
        random_flip: encode the mirror images too.
        batch_size: images encoded at once.
        num_workers: processes that decode images.

    Returns:
        Mean and standard deviation in half precision, each of shape (views, N, channels, height, width). View 0 is
        the image; with `random_flip`, view 1 is its mirror image.

    Raises:
        ValueError: naming the file or the row of an image that cannot be read.
    """
    views = 2 if random_flip else 1
    path = Path(cache_dir) / f"latents-{latents_key(vae, images, resolution, random_flip)}.safetensors"
    latents = _read(path, views, len(images))
    if latents is None:
        latents = _encode(vae, images, resolution, views, batch_size, num_workers)
        _write(latents, path)
    return latents["mean"], latents["std"]


@torch.no_grad()
def _encode(
    vae: AutoencoderKL, images: Table, resolution: int, views: int, batch_size: int, num_workers: int
) -> dict[str, Tensor]:
    loader = DataLoader(_PixelDataset(images, resolution), batch_size, num_workers=num_workers)
    latents: dict[str, Tensor] = {}
    with tqdm(total=len(images), desc="Encoding images", unit="image") as bar:
        for pixels in loader:
            pixels = pixels.to(vae.device, vae.dtype)
            rows = slice(bar.n, bar.n + len(pixels))
            for view in range(views):
                posterior = vae.encode(pixels.flip(-1) if view else pixels).latent_dist
                for name, value in (("mean", posterior.mean), ("std", posterior.std)):
                    value = (value.float() * vae.config.scaling_factor).half()
                    if not value.isfinite().all():
                        raise ValueError(
                            f"The VAE in {vae.dtype} gives latents that are not finite for rows {rows.start} to "
                            f"{rows.stop - 1}: load it in float32."
                        )
                    if name not in latents:
                        latents[name] = torch.empty(views, len(images), *value.shape[1:], dtype=torch.float16)
                    latents[name][view, rows] = value.cpu()
            bar.update(len(pixels))
    return latents


def _read(path: Path, views: int, count: int) -> dict[str, Tensor] | None:
    if not path.exists():
        return None
    try:
        latents = load_file(path)
        if all(latents[name].shape[:2] == (views, count) for name in ("mean", "std")):
            return latents
        reason = "its shapes are not those of the dataset"
    except (OSError, KeyError, SafetensorError) as error:
        reason = str(error)
    logger.warning("The cached latents %s cannot be used (%s); encoding the images again.", path, reason)
    return None


def _write(latents: dict[str, Tensor], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    try:
        save_file(latents, partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


class LatentDataset(Dataset):
    """Triples of mean and std, each (views, channels, height, width) in half precision, and a class.

    It draws nothing itself, so what a loop draws does not depend on how far its loader runs ahead: `sample_latents`.

    Args:
        mean: from `encode_latents`, shape (views, N, channels, height, width).
        std: the same.
        labels: shape (N,).
    """

    def __init__(self, mean: Tensor, std: Tensor, labels: Tensor):
        if mean.shape != std.shape or mean.shape[1] != len(labels):
            raise ValueError(
                f"mean has shape {tuple(mean.shape)}, std {tuple(std.shape)}, and there are {len(labels)} labels: "
                "mean and std need equal shapes (views, N, channels, height, width), with N labels."
            )
        self.mean, self.std, self.labels = mean, std, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor, Tensor]:
        return self.mean[:, row], self.std[:, row], self.labels[row]


def sample_latents(mean: Tensor, std: Tensor) -> Tensor:
    """A latent for every sample of a batch: one of its views, and a draw from that view's posterior.

    `mean` and `std` have shape (batch, views, channels, height, width); returns float32 of shape (batch, channels,
    height, width), drawn from torch's global generator.
    """
    rows = torch.arange(len(mean), device=mean.device)
    views = torch.randint(mean.shape[1], rows.shape, device=mean.device)
    mean, std = mean[rows, views].float(), std[rows, views].float()
    return mean + std * torch.randn_like(std)
