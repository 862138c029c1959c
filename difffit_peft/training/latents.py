"""VAE latents of images, encoded once and mapped from disk.

dataset = encode_latents(pipe.vae, data, resolution=256, cache_dir="cache")
"""

import hashlib
import json
import logging
import math
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
import numpy as np
import PIL.Image
import torch
from datasets import Dataset as Table
from datasets import Image
from diffusers import AutoencoderKL
from filelock import FileLock
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ..config import parse_colour, plain
from ..writing import write
from .folders import listed
from .images import LabelledImages, to_pixels
from .vae import moments

logger = logging.getLogger(__name__)

_CACHE_FORMAT = 3  # part of the cache's key: raise it when the pixels or the files' layout change
_HASH_BYTES = 16


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
            return "it is empty, or not an image"
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

    It draws nothing itself, so what a loop draws does not depend on how far its loader runs ahead: see `sampling`.
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
    """BLAKE2 hashes of the bytes of image files. A file that cannot be read counts as empty."""

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
        except (OSError, ValueError):  # a ValueError: not a valid name of a file
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
    """What shapes latents beside the images. Raises `ValueError` if `background` is not a colour."""
    config = {name: value for name, value in vae.config.items() if not name.startswith("_")}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in vae.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
    colour = list(parse_colour(background))
    return {"resolution": resolution, "random_flip": random_flip, "background": colour, "vae": digest.hexdigest()[:32]}


def _describe_images(hashes: Tensor, labels: Tensor, class_names: list[str]) -> dict[str, Any]:
    """Of each class, how many images it has and a hash of their set; and a hash of all in their order."""

    def digest(content: bytes) -> str:
        return hashlib.sha256(content).hexdigest()[:16]

    own: dict[int, list[bytes]] = {label: [] for label in sorted(set(labels.tolist()))}
    for label, image in zip(labels.tolist(), hashes.numpy(), strict=True):
        own[label].append(image.tobytes())
    images = {class_names[label]: [len(rows), digest(b"".join(sorted(rows)))] for label, rows in own.items()}
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
    check: Callable[[dict[str, Any]], None] | None = None,
) -> LatentDataset:
    """Means and standard deviations of the VAE's posterior for every image, normalised as `vae.moments` does.

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
        check: is called with `about` before an image is encoded, to raise if that would be in vain. With
            `skip_broken_images` it has nothing about the images, for nobody knows yet which will be left.

    Returns:
        `mean` and `std` in half precision, each of shape (views, N, channels, height, width), `labels` of shape (N,),
        `key` and `about`. View 0 is the image; with `random_flip`, view 1 is its mirror image. Images left
        out do not count in N.

    Raises:
        ValueError: if `background` is not a colour; if images cannot be read, naming them (with `skip_broken_images`,
            if there are no others); or if the VAE gives latents that are not finite.
    """
    settings = _latent_settings(vae, plain(resolution), random_flip, background)
    cache_dir = Path(cache_dir).expanduser()
    cache_dir.mkdir(parents=True, exist_ok=True)
    hashes = _image_hashes(data.images, cache_dir, num_workers)
    if check is not None:
        images = {} if skip_broken_images else _describe_images(hashes, data.labels, data.class_names)
        check(settings | images)
    what = json.dumps([_CACHE_FORMAT, settings, hashlib.sha256(hashes.numpy().tobytes()).hexdigest()], sort_keys=True)
    key = hashlib.sha256(what.encode()).hexdigest()[:32]
    folder = cache_dir / f"latents-{key}"
    views = 2 if random_flip else 1
    pixels = _PixelDataset(data.images, resolution, background)
    with FileLock(folder.with_suffix(".lock")):
        broken = _read(folder, views, len(data))
        if broken and not skip_broken_images:
            broken = pixels.broken(broken) or None  # they may have been repaired since
        if broken is None:
            loader = DataLoader(pixels, batch_size, num_workers=num_workers, collate_fn=_collate)
            broken = _write(folder, vae, loader, views, skip_broken_images)
        else:
            _report(broken, data.images, skip_broken_images)
        mean, std = _map(folder)
    kept = torch.tensor([row not in broken for row in range(len(data))])
    labels = data.labels[kept]
    if lost := sorted(set(data.labels.tolist()) - set(labels.tolist())):
        logger.warning("No image is left of %s.", listed([data.class_names[i] for i in lost]))
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
    folder: Path, vae: AutoencoderKL, loader: DataLoader, views: int, skip_broken_images: bool
) -> dict[int, str]:
    """Encodes what can be read to `folder`, which appears whole or not at all, and returns what cannot be read."""
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by an encoder that was killed
    partial.mkdir()
    try:
        with open(partial / "latents.bin", "wb") as file:
            shape, broken = _encode(vae, loader, views, skip_broken_images, file)
        _report(broken, loader.dataset.images, skip_broken_images)
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
            seen = [torch.stack(moments(vae, view), dim=1) for view in (pixels, pixels.flip(-1))[:views]]
            latents = torch.stack(seen, dim=2).half()
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
