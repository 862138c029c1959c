"""Checkpoints of a few megabytes: what is trained and what trains it, never the base.

A checkpoint is a folder `checkpoint-<step>` that is written under another name and renamed when it is whole, so that a
run killed at any moment, or a full disk, leaves the ones before it as they are.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

_NAME = re.compile(r"checkpoint-(\d+)")


def fingerprint(model: nn.Module) -> str:
    """A hash of a model's parameter names, shapes and first values: enough to tell one base from another."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten()[:64].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:32]


def checkpoints(output_dir: str | os.PathLike) -> list[Path]:
    """The whole checkpoints in a folder, oldest first."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def save_checkpoint(
    output_dir: str | os.PathLike,
    step: int,
    state: dict[str, Any],
    run: dict[str, Any],
    total_limit: int | None = None,
    save_adapter: Callable[[Path], None] | None = None,
) -> Path:
    """Writes `checkpoint-<step>` and then removes the oldest ones beyond `total_limit`.

    Args:
        state: tensors and plain values, all that the run needs to go on.
        run: what the run is, as JSON: data (`LatentDataset.about`), base, settings. `load_checkpoint` compares it.
        save_adapter: writes the adapter of this step beside them, so that the checkpoint is one to load, too.

    Raises:
        OSError: if it cannot be written. Earlier checkpoints are then as they were.
    """
    path = Path(output_dir) / f"checkpoint-{step}"
    partial = path.with_name(f"partial-{path.name}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        torch.save(state, partial / "state.pt")
        (partial / "run.json").write_text(json.dumps(run, indent=2))
        if save_adapter is not None:
            save_adapter(partial)
        shutil.rmtree(path, ignore_errors=True)
        partial.rename(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    for old in checkpoints(output_dir)[: -total_limit if total_limit else 0]:
        shutil.rmtree(old)
    return path


def remove_later(output_dir: str | os.PathLike, step: int) -> None:
    """Removes the checkpoints after `step`, for a run that goes on from there."""
    for path in checkpoints(output_dir):
        if int(path.name.split("-")[1]) > step:
            shutil.rmtree(path)


def load_checkpoint(path: str | os.PathLike, run: dict[str, Any]) -> dict[str, Any]:
    """The state that `save_checkpoint` wrote, if it belongs to the same run. Raises as `check_checkpoint` does."""
    check_checkpoint(path, run, whole=True)
    return torch.load(Path(path) / "state.pt", map_location="cpu", weights_only=True)


def check_checkpoint(path: str | os.PathLike, run: dict[str, Any], whole: bool = False) -> None:
    """Compares what is known of a run with the run that wrote the checkpoint.

    Args:
        whole: `run` is all that there is to know. Otherwise what it lacks is not compared.

    Raises:
        ValueError: if there is no checkpoint at `path`, or if it is of a run with other data, another base or other
            settings, saying which.
    """
    path = Path(path)
    if not (path / "run.json").is_file() or not (path / "state.pt").is_file():
        raise ValueError(f"{path} is not a checkpoint: it needs the files run.json and state.pt.")
    saved = json.loads((path / "run.json").read_text())
    saved = {name: value for name, value in saved.items() if whole or name in run}
    differing = _differences(saved, json.loads(json.dumps(run)))
    if differing:
        raise ValueError(
            f"{path} belongs to another run: {'; '.join(differing)}. Resume with the same data, base and settings, or "
            "start anew in another --output_dir."
        )


_CONDITIONS = ("classes", "captions")  # what images come with
_IN_WORDS = {
    "base": "the base's weights are others",
    "vae": "the VAE's weights or config are others",
    "prompts": "the text encoders or tokenizers are others",
    "order": "the images come in another order",
}


def _differences(saved: dict[str, Any], run: dict[str, Any]) -> list[str]:
    """What differs between two runs, in words."""
    differing = [name for name in sorted(saved.keys() | run.keys()) if saved.get(name) != run.get(name)]
    if {"images", *_CONDITIONS} & {*differing}:  # the order is then another too
        differing = [name for name in differing if name != "order"]
    words = []
    for name in differing:
        old, new = saved.get(name), run.get(name)
        if name == "images" and old and new:
            other = {c for kind in _CONDITIONS for c in {*saved.get(kind, [])} ^ {*run.get(kind, [])}}
            words += _differing_images(old, new, sorted((old.keys() | new.keys()) - other))
        elif name in _CONDITIONS and old and new:
            added, gone = [c for c in new if c not in old], [c for c in old if c not in new]
            words += [f"new {name}: {', '.join(added[:5])}"] if added else []
            words += [f"{name} that are gone: {', '.join(gone[:5])}"] if gone else []
            words += [] if added or gone else [f"the {name} come in another order"]
        else:
            words.append(_IN_WORDS.get(name) or f"{name} was {_short(old)} and is {_short(new)}")
    return words


def _differing_images(old: dict[str, list], new: dict[str, list], classes: list[str]) -> list[str]:
    words = []
    for name in classes:
        (had, hash_then), (has, hash_now) = old.get(name, [0, ""]), new.get(name, [0, ""])
        if had != has:
            words.append(f"{name} had {had} images and has {has}")
        elif hash_then != hash_now:
            words.append(f"of the {has} images of {name} some are others")
    return words if len(words) <= 5 else [*words[:5], f"the images of {len(words) - 5} more classes differ"]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
