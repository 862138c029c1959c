"""Adapters as others publish them: how they name their base, and whether their files can be trusted."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import validate_repo_id
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

_MAX_CONFIG_BYTES = 2**20

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_HUB_CACHE = re.compile(r"models--(?P<id>[^/\\]+)[/\\]snapshots[/\\](?P<revision>[0-9a-f]{40})([/\\].*)?$")
_HUB_ID = re.compile(r"\w[\w.-]*(/[\w.-]+)?")


def base_model_id(name_or_path: str) -> tuple[str, str | None]:
    """The Hub id and commit of a base, from what Diffusers remembers of where a model was loaded from.

    A pipeline loaded from the Hub remembers a folder of the local cache. Of a folder that is not in the cache only the
    pipeline folder's name is kept: an adapter never publishes a local path.
    """
    cached = _HUB_CACHE.search(name_or_path)
    if cached:
        return cached["id"].replace("--", "/"), cached["revision"]
    path = Path(name_or_path)
    if _HUB_ID.fullmatch(name_or_path) and not path.exists():
        return name_or_path, None
    path = path.resolve()
    return (path.parent if path.name == "transformer" else path).name, None


def check_base_model_id(name: Any) -> str:
    """The base that an adapter names, if it is the name of a repository on the Hub, and no path or address.

    Raises:
        ValueError: if it is anything else.
    """
    try:
        validate_repo_id(name)
    except HFValidationError:
        raise ValueError(
            f"The adapter names the base {str(name)[:200]!r}, which is no id of the Hub. Load the base with "
            "from_pretrained, and then the adapter with load_difffit_weights."
        ) from None
    return name


def adapter_folder(path: str | os.PathLike, subfolder: str | None = None, **hub: Any) -> Path:
    """The local folder of an adapter. From the Hub, its config and weights are downloaded, before a model is touched.

    Raises:
        ValueError: if it has no config, or its weights are a pickle.
        HfHubHTTPError: if the Hub does not give it.
    """
    folder = Path(path, subfolder or "")
    if not os.path.isdir(path):
        try:
            for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME):
                folder = Path(hf_hub_download(str(path), name, subfolder=subfolder, **hub)).parent
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError as error:
            if name == SAFETENSORS_WEIGHTS_NAME:
                raise ValueError(f"{path} holds no {name}. {_NO_PICKLES}") from error
            raise
    if not (folder / CONFIG_NAME).is_file():
        raise ValueError(f"{folder} holds no {CONFIG_NAME}.")
    if (folder / WEIGHTS_NAME).is_file() and not (folder / SAFETENSORS_WEIGHTS_NAME).is_file():
        raise ValueError(f"{folder} holds no {SAFETENSORS_WEIGHTS_NAME}, but {WEIGHTS_NAME}. {_NO_PICKLES}")
    return folder


_NO_PICKLES = f"{WEIGHTS_NAME} is never read: a pickle can run any code. Save the adapter as safetensors."


def read_adapter_config(path: Path) -> dict[str, Any]:
    """The `adapter_config.json` of a DiffFit adapter: a JSON object of at most 1 MiB.

    Raises:
        ValueError: if it is not.
    """
    size = path.stat().st_size
    if size > _MAX_CONFIG_BYTES:
        raise ValueError(f"{path} has {size:,} bytes: the config of an adapter has at most {_MAX_CONFIG_BYTES:,}.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds a {type(config).__name__}: the config of an adapter is a JSON object.")
    if config.get("peft_type") != "DIFFFIT":
        raise ValueError(f"{path} is of an adapter of {str(config.get('peft_type'))[:200]}, not of DiffFit.")
    return config


def check_adapter_file(path: Path) -> dict[str, tuple[int, ...]]:
    """Reads an adapter's weights once, before anything is changed for their sake, and returns their names and shapes.

    Raises:
        ValueError: if the file is truncated, no safetensors file, or holds values that are not finite floating point
            numbers.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
    except SafetensorError as error:
        raise ValueError(
            f"{path} is truncated or no safetensors file ({error}): save or download the adapter again."
        ) from error
    other = next((name for name, tensor in tensors.items() if tensor.dtype not in _DTYPES), None)
    if other:
        raise ValueError(f"{path} holds {other} in {tensors[other].dtype}: weights are in one of {_DTYPES}.")
    broken = next((name for name, tensor in tensors.items() if not tensor.isfinite().all()), None)
    if broken:
        raise ValueError(f"{path} holds values that are not finite, in {broken}: the training run diverged.")
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}
