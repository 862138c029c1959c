"""From a path or an id to an adapter that is checked: what strangers publish is read here, once, and as data."""

from __future__ import annotations

import inspect
import json
import os
import re
from pathlib import Path
from typing import Any, TypedDict

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

from .config import DiffFitConfig, listed

PIPELINE_INDEX = "model_index.json"
HUB_CACHE = re.compile(r"models--(?P<id>[^/\\]+)[/\\]snapshots[/\\](?P<revision>[0-9a-f]{40})([/\\].*)?$")
_MAX_CONFIG_BYTES = 2**20
_REVISION = re.compile(r"(?!.*\.\.)[\w.][\w./-]{0,255}")
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class HubOptions(TypedDict, total=False):
    """Keyword arguments: where on the Hub an adapter is, and how it is downloaded."""

    subfolder: str | None
    revision: str | None
    token: str | bool | None
    cache_dir: str | os.PathLike | None
    local_files_only: bool
    force_download: bool


def is_repo_id(name: Any) -> bool:
    """Whether `name` can be the id of a repository on the Hub."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name is not None


def local_path(path: str | os.PathLike, revision: str | None = None) -> Path | None:
    """The folder or file on this machine that `path` names, or `None` if it is the id of a repository on the Hub.

    What exists here is local, as in Diffusers. `~` is the home folder.

    Raises:
        ValueError: if it is neither, or a local path is given with a revision.
    """
    text = os.path.expanduser(path)
    if os.path.exists(text):
        if revision is not None:
            raise ValueError(f"revision={revision!r}: {text} is on this machine, where there are no revisions.")
        return Path(text)
    if url := re.match(r"\w+://[^/]+/?([^/?#]+/[^/?#]+)?", text):
        raise ValueError(
            f"{text!r} is a URL. Pass the id of the repository"
            + (f", {url[1]!r}." if url[1] else ", such as 'user/name'.")
        )
    if not is_repo_id(text):
        raise ValueError(
            f"There is no file or folder {os.path.abspath(text)}, and {text!r} cannot be the id of a repository on the "
            "Hub, such as 'user/name'."
        )
    return None


def hub_file(repo_id: str, filename: str, **hub: Any) -> Path:
    """A file of a repository on the Hub, in the local cache.

    Raises:
        EntryNotFoundError: if the repository has no such file.
        HfHubHTTPError: if the Hub does not give it.
    """
    try:
        return Path(hf_hub_download(repo_id, filename, **hub))
    except (RepositoryNotFoundError, LocalEntryNotFoundError) as error:  # a folder may have been meant
        tried = f"There is no folder {os.path.abspath(repo_id)}, so the Hub was asked for the repository {repo_id!r}"
        error.args = (f"{tried}: {error}", *error.args[1:])
        raise


def pipeline_index(path: str | os.PathLike, revision: str | None = None, **hub: Any) -> Path | None:
    """`model_index.json` of a pipeline in a folder or on the Hub; `None` where there is none, as of an adapter.

    Raises as `local_path` and `hub_file` do.
    """
    local = local_path(path, revision)
    if local is not None:
        return local / PIPELINE_INDEX if (local / PIPELINE_INDEX).is_file() else None
    try:
        return hub_file(os.fspath(path), PIPELINE_INDEX, revision=revision, **hub)
    except LocalEntryNotFoundError:  # the Hub cannot be asked
        raise
    except EntryNotFoundError:
        return None


def cached_commit(file: Path) -> str | None:
    """The commit that a file of the local cache of the Hub belongs to."""
    cached = HUB_CACHE.search(str(file))
    return cached and cached["revision"]


def adapter_folder(
    path: str | os.PathLike, subfolder: str | None = None, revision: str | None = None, **hub: Any
) -> Path:
    """The local folder of an adapter. From the Hub, its config and weights are downloaded, before a model is touched.

    Args:
        path: a folder, the config or the weights in it, or the id of a repository on the Hub.
        subfolder: where in the folder or repository the adapter is.
        revision: branch, tag or commit of the repository.
        hub: `token`, `cache_dir` and so on, as for `hf_hub_download`.

    Raises:
        TypeError: for an option that `hf_hub_download` does not have.
        ValueError: if there is no adapter at `path`.
        HfHubHTTPError: if the Hub does not give it.
    """
    inspect.signature(hf_hub_download).bind(path, CONFIG_NAME, **hub)  # a folder, too, is refused with another option
    local = local_path(path, revision)
    if local is not None:
        folder = local.parent if local.name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME) and local.is_file() else local
        folder = folder / (subfolder or "")
        if not (folder / CONFIG_NAME).is_file():
            raise ValueError(_no_adapter(folder))
        return folder
    repo_id = os.fspath(path)
    folder = hub_file(repo_id, CONFIG_NAME, subfolder=subfolder, revision=revision, **hub).parent
    revision = cached_commit(folder) or revision  # both of one commit
    try:
        hub_file(repo_id, SAFETENSORS_WEIGHTS_NAME, subfolder=subfolder, revision=revision, **hub)
    except LocalEntryNotFoundError:  # the Hub cannot be asked
        raise
    except EntryNotFoundError:  # see `read_weights`
        pass
    return folder


def _no_adapter(path: Path) -> str:
    """Why there is no adapter at `path`, and where there may be one."""
    if not path.is_dir():
        what = "is a file" if path.is_file() else "does not exist"
        return (
            f"{path} {what}: pass the folder of the adapter, which holds {CONFIG_NAME} and {SAFETENSORS_WEIGHTS_NAME}."
        )
    if (path / PIPELINE_INDEX).is_file():
        what = f"{path} is a pipeline, not an adapter: load it with the pipeline's from_pretrained."
    else:
        what = f"{path} is neither an adapter nor a pipeline: it holds no {CONFIG_NAME} and no {PIPELINE_INDEX}."
    inside = [config.parent for config in sorted([*path.glob(f"*/{CONFIG_NAME}"), *path.glob(f"*/*/{CONFIG_NAME}")])]
    return what + (f" Adapters in it: {listed(str(f.relative_to(path)) for f in inside)}." if inside else "")


def check_base_model_id(name: Any, revision: Any = None) -> tuple[str, str | None]:
    """The base that an adapter names and its revision, if they are those of a repository on the Hub, and no path.

    A name without an owner is that of a local folder (see `base_model_id`).

    Raises:
        ValueError: if they are anything else.
    """
    if not is_repo_id(name) or "/" not in name:
        raise ValueError(
            f"The adapter names the base {str(name)[:200]!r}, which is not the id of a repository on the Hub. (Of a "
            "base in a folder, an adapter keeps the folder's name.) Load the base with from_pretrained, and then the "
            "adapter with load_adapter(pipe, path), or pipe.load_difffit_weights(path)."
        )
    if revision is not None and not (isinstance(revision, str) and _REVISION.fullmatch(revision)):
        raise ValueError(
            f"The adapter names the revision {str(revision)[:200]!r} of its base, which is not a valid revision."
        )
    return name, revision


def read_adapter(folder: Path) -> tuple[DiffFitConfig, dict[str, torch.Tensor]]:
    """The config and the weights of an adapter; raises `ValueError` as `read_config` and `read_weights` do.

    The config carries the shapes of the weights: a model compares them before it is changed.
    """
    weights, config = read_weights(folder), read_config(folder)  # a pickle is refused before all else
    config.weight_shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    return config, weights


def read_config(folder: Path) -> DiffFitConfig:
    """The config of a DiffFit adapter: a JSON object of at most 1 MiB.

    Raises:
        ValueError: if it is anything else, or says what no config may.
    """
    path = folder / CONFIG_NAME
    size = path.stat().st_size
    if size > _MAX_CONFIG_BYTES:
        raise ValueError(f"{path} has {size:,} bytes: the config of an adapter has at most {_MAX_CONFIG_BYTES:,}.")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{path} holds a {type(fields).__name__}: the config of an adapter is a JSON object.")
    if fields.get("peft_type") != "DIFFFIT":
        raise ValueError(f"{path} is of an adapter of {str(fields.get('peft_type'))[:200]}, not of DiffFit.")
    return DiffFitConfig.from_peft_type(**DiffFitConfig.check_kwargs(**fields))


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of an adapter: finite floating point numbers in a safetensors file.

    Raises:
        ValueError: if they are anything else, or the file is missing or truncated.
    """
    path = folder / SAFETENSORS_WEIGHTS_NAME
    if not path.is_file():
        raise ValueError(
            f"{folder} has no {SAFETENSORS_WEIGHTS_NAME}. {WEIGHTS_NAME} is never read, as a pickle can run any code. "
            "Save the adapter as safetensors."
        )
    try:
        with safe_open(path, framework="pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is not a dict)
    except SafetensorError as error:
        raise ValueError(
            f"{path} is truncated, or is not a safetensors file ({error}): save or download the adapter again."
        ) from error
    for name, tensor in weights.items():
        if tensor.dtype not in _DTYPES:
            raise ValueError(f"{path} holds {name} in {tensor.dtype}: weights are in one of {_DTYPES}.")
        if not tensor.isfinite().all():
            raise ValueError(f"{path} holds values that are not finite, in {name}: the training run diverged.")
    return weights
