"""Embeddings of prompts, encoded once and mapped from disk: one safetensors file a prompt.

prompts = encode_prompts(["a red bird", ""], encode, key, "cache")
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from ..writing import write

Embeddings = dict[str, Tensor]


class Prompts:
    """Embeddings of each prompt of a list, by its index, as tensors without a dimension of the batch."""

    def __init__(self, files: list[Path]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Embeddings:
        return _read(self.files[index])


def _read(file: Path) -> Embeddings:
    with safe_open(file, "pt") as tensors:
        return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118


def encode_prompts(
    prompts: Sequence[str],
    encode: Callable[[str], Embeddings],
    key: str,
    cache_dir: str | os.PathLike,
    *,
    hidden: bool = False,
) -> Prompts:
    """Encodes those prompts whose embeddings `cache_dir` does not hold.

    Args:
        prompts: may be empty strings, and the same more than once.
        encode: gives the embeddings of one prompt.
        key: a hash of all that shapes embeddings beside the prompt.
        hidden: show no progress.

    Raises:
        ValueError: if embeddings are not finite.
    """
    folder = Path(cache_dir).expanduser() / f"prompts-{key}"
    folder.mkdir(parents=True, exist_ok=True)
    names = [hashlib.sha256(prompt.encode()).hexdigest()[:32] for prompt in prompts]
    files = [folder / f"{name}.safetensors" for name in names]
    with FileLock(folder.with_suffix(".lock")):
        missing = {file: prompt for file, prompt in zip(files, prompts, strict=True) if not _is_whole(file)}
        for file, prompt in tqdm(missing.items(), desc="Encoding prompts", disable=hidden or not missing):
            embeddings = {name: tensor.contiguous().cpu() for name, tensor in encode(prompt).items()}
            if not all(tensor.isfinite().all() for tensor in embeddings.values()):
                dtypes = ", ".join(sorted({str(tensor.dtype) for tensor in embeddings.values()}))
                raise ValueError(
                    f"The text encoder gives embeddings that are not finite ({dtypes}) for {prompt[:200]!r}: use "
                    "--mixed_precision bf16 or no."
                )
            write(file, partial(save_file, embeddings))
    return Prompts(files)


def _is_whole(file: Path) -> bool:
    """Whether a file is there, and can be read: a damaged one is written anew."""
    try:
        with safe_open(file, "pt") as tensors:
            return len(tensors.keys()) > 0
    except (OSError, SafetensorError):
        return False


def stacked(embeddings: Sequence[Embeddings], device: torch.device | str) -> Embeddings:
    """A batch of embeddings of one length."""
    return {name: torch.stack([each[name] for each in embeddings]).to(device) for name in embeddings[0]}
