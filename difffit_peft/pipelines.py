"""Whole pipelines with their adapters: loaded, and pipeline classes that have the verbs as methods."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError

from . import loader
from .components import ACTIVE, ADAPTERS, activate, attach, models, push_pipeline, save_pipeline, saved_adapters
from .merging import check_names
from .reading import (
    PIPELINE_INDEX,
    adapter_folder,
    cached_commit,
    check_base_model_id,
    local_path,
    pipeline_index,
    read_adapter,
)


def load_pipeline(pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Any:
    """Loads a stock pipeline with its adapters, or the base of an adapter and the adapter.

    What `save_pipeline` or `push_to_hub` wrote comes with its adapters. Of an adapter (a folder or Hub id without
    `model_index.json`, or with `subfolder`), the base and its revision are those its config names.

    Args:
        pretrained_model_name_or_path: folder or Hub id of the pipeline or the adapter.
        kwargs: as for `DiffusionPipeline.from_pretrained`. `revision` and `subfolder` of an adapter are its own; other
            keyword arguments go to the base.

    Raises:
        ValueError: if it is neither, or an adapter that names no base, or one that is not an id of the Hub.
        HfHubHTTPError: of `huggingface_hub`, or one of its subclasses, if the Hub does not give it.
    """
    return _load(diffusers.DiffusionPipeline.from_pretrained, pretrained_model_name_or_path, **kwargs)


def _load(load: Callable[..., Any], pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Any:
    """As `load_pipeline`, with the function that loads the pipeline itself."""
    path, names = os.fspath(pretrained_model_name_or_path), ("cache_dir", "token", "local_files_only")
    hub = {name: kwargs[name] for name in (*names, "force_download") if name in kwargs}
    revision, subfolder = kwargs.pop("revision", None), kwargs.pop("subfolder", None)
    local = local_path(path, revision)
    try:
        index = pipeline_index(path, revision, **hub)
    except LocalEntryNotFoundError:  # but an adapter may be in the cache
        index = None
    if local is None and index is not None:
        revision = cached_commit(index) or revision  # all files of one commit
    if subfolder or index is None:
        config, weights = read_adapter(adapter_folder(path, subfolder, revision, **hub))
        if not config.base_model_name_or_path:
            raise ValueError(
                f"{path} is an adapter that names no base: load the base with from_pretrained, and then the adapter "
                f"with load_adapter(pipe, {path!r}), or pipe.load_difffit_weights({path!r})."
            )
        base, revision = check_base_model_id(config.base_model_name_or_path, config.revision)
        pipe = load(base, revision=revision, **kwargs)
        attach(pipe, config, weights)
        return pipe
    pipe = load(path if local is None else str(local), revision=revision, **kwargs)
    if local is None:  # Diffusers downloads the parts alone
        wanted = [PIPELINE_INDEX, f"{ADAPTERS}/*.json", f"{ADAPTERS}/*.safetensors"]
        local = Path(snapshot_download(path, revision=revision, allow_patterns=wanted, **hub))
    _load_adapters(pipe, local / ADAPTERS)
    return pipe


def _load_adapters(pipe: Any, folder: Path) -> None:
    """Loads the adapters of a saved pipeline, and makes those active that were."""
    for adapter in sorted(path for path in folder.glob("*") if path.is_dir()):
        name, _, component = adapter.name.partition(".")
        loader.load_adapter(pipe, adapter, name, component=component or None)
    state, saved = folder / ACTIVE, saved_adapters(pipe)
    if not saved or not state.is_file():
        return
    active = json.loads(state.read_text())
    if not isinstance(active, dict):
        raise ValueError(f"{state} holds a {type(active).__name__}, not an object of names and scales.")
    check_names(active, saved)
    if not active:
        loader.disable_adapters(pipe)
        return
    for key, scale in active.items():
        model, name = saved[key]
        model.set_scale(name, scale)
    for model in models(pipe).values():
        activate(model, [saved[key][1] for key in active if saved[key][0] is model])


class DiffFitLoaderMixin:
    """Loads, blends, fuses and saves DiffFit adapters; verbs as for LoRA in Diffusers.

    For a pipeline class of your own: `class MyPipeline(DiffFitLoaderMixin, SanaPipeline)`. The verbs are the functions
    of `difffit_peft` that take any pipeline.
    """

    load_difffit_weights, unload_difffit_weights = loader.load_adapter, loader.unload_adapters
    set_adapters, delete_adapters = loader.set_adapters, loader.delete_adapters
    get_active_adapters, get_list_adapters = loader.get_active_adapters, loader.get_list_adapters
    enable_difffit, disable_difffit = loader.enable_adapters, loader.disable_adapters
    fuse_difffit, unfuse_difffit = loader.fuse_adapters, loader.unfuse_adapters
    save_difffit_weights, push_difffit_to_hub = loader.save_adapter, loader.push_adapter
    save_pretrained = save_pipeline
    push_to_hub = push_pipeline

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Any:
        """Loads a pipeline of this class with its adapters, or the base of an adapter and the adapter.

        As `load_pipeline`, which takes the class that the pipeline names.
        """
        return _load(super().from_pretrained, pretrained_model_name_or_path, **kwargs)  # type: ignore[misc]
