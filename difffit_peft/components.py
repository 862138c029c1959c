"""The models of a pipeline that take adapters: how one comes onto a model and off it, and how the whole is saved.

A pipeline may have two such models, as Wan has `transformer` and `transformer_2`. An adapter is of one of them.
"""

from __future__ import annotations

import copy
import inspect
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from huggingface_hub import HfApi, create_repo
from peft import PeftModel, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .config import COMPONENTS, DiffFitConfig, nearest, short
from .families import family_name
from .layer import DiffFitLayer
from .model import DiffFitModel
from .publishing import save_adapter
from .reading import PIPELINE_INDEX
from .writing import write

ADAPTERS = "adapters"
"""The folder of a saved pipeline that holds its adapters, beside those of its parts."""
ACTIVE = "active.json"


def components(pipe: Any) -> list[str]:
    """What a pipeline calls its models that take adapters, the main one first.

    Raises:
        ValueError: if it has none.
    """
    names = [name for name in COMPONENTS if getattr(pipe, name, None) is not None]
    if not names:
        instead = " For a model, use PeftModel.from_pretrained(model, path)." if isinstance(pipe, nn.Module) else ""
        raise ValueError(
            f"This {type(pipe).__name__} takes no adapters: it has none of {', '.join(COMPONENTS)}. Pass a pipeline."
            + instead
        )
    return names


def models(pipe: Any) -> dict[str, PeftModel]:
    """The models that have DiffFit adapters, also inside of `torch.compile`, by their component.

    Of what is left of a `PeftModel` when `merge_and_unload()` or `unload()` was called, and what they return was not
    put in its place, the plain model is put there.
    """
    found = {name: _inner(getattr(pipe, name, None)) for name in COMPONENTS}
    adapted = {n: m for n, m in found.items() if isinstance(m, PeftModel) and isinstance(m.base_model, DiffFitModel)}
    for name, model in [*adapted.items()]:
        if not any(isinstance(module, DiffFitLayer) for module in model.modules()):
            with _not_offloaded(pipe):
                setattr(pipe, name, adapted.pop(name).get_base_model())
    return adapted


def fused(model: PeftModel) -> list[str]:
    """The adapters of one model that are part of its weights."""
    # PEFT's get_model_status says it too, but takes twice as long as switching adapters does
    return next((m.merged_adapters for m in model.modules() if isinstance(m, DiffFitLayer)), [])


def disabled(model: PeftModel) -> bool:
    return next((m.disable_adapters for m in model.modules() if isinstance(m, BaseTunerLayer)), False)


def in_effect(model: PeftModel) -> list[str]:
    """The adapters of one model that have an effect."""
    return [] if disabled(model) else list(fused(model) or model.base_model.active_adapters)


def activate(model: PeftModel, names: list[str]) -> None:
    """Makes these adapters of one model the active ones. With none, it computes with its base."""
    if names:
        model.active_adapter = names[0]  # PeftModel's own note of it, which holds one name
    model.base_model.enable_adapter_layers()
    model.base_model.set_adapter(names, inference_mode=True)


def attach(
    pipe: Any,
    config: DiffFitConfig,
    weights: dict[str, torch.Tensor],
    adapter_name: str | None = None,
    component: str | None = None,
) -> None:
    """Adds an adapter that was read, and makes it the active one of its model; arguments as for `load_adapter`."""
    if config.task_type is not None:
        raise ValueError(f"task_type={config.task_type}: this adapter is for another task than a pipeline's.")
    component = component_for(pipe, config) if component is None else component
    adapted = models(pipe)
    if adapter_name is None:
        taken = [name for model in adapted.values() for name in model.peft_config]
        adapter_name = next(f"default_{i}" for i in range(len(taken) + 1) if f"default_{i}" not in taken)
    check_free(pipe, adapter_name, component)
    if any(parameter.is_meta for parameter in _base(pipe, component).parameters()):
        raise ValueError(
            f"The weights of {component} are not where they are computed with: enable_sequential_cpu_offload(), or a "
            "device_map, keeps them elsewhere, and an adapter would be lost. Use enable_model_cpu_offload(), or load "
            "and fuse the adapter first."
        )
    config.inference_mode, config.component, model = True, component, adapted.get(component)
    if model is None:
        with _not_offloaded(pipe):
            model = PeftModel(getattr(pipe, component), config, adapter_name)
            setattr(pipe, component, model)
        if type(pipe).save_pretrained is diffusers.DiffusionPipeline.save_pretrained:  # which leaves out a PeftModel
            pipe.save_pretrained, pipe.push_to_hub = partial(save_pipeline, pipe), partial(push_pipeline, pipe)
    else:
        model.add_adapter(adapter_name, config)
    try:
        set_peft_model_state_dict(model, weights, adapter_name)
    except BaseException:  # whatever it is, Ctrl-C too, it goes on when the pipeline is as it was
        if len(model.peft_config) == 1:
            take_off(pipe, component)
        else:
            model.delete_adapter(adapter_name)
        raise
    model.eval()
    activate(model, [adapter_name])


def component_for(pipe: Any, config: DiffFitConfig) -> str:
    """The model of a pipeline that an adapter is for: the one that it was trained on.

    Raises:
        ValueError: if the pipeline has none of that name; names both models.
    """
    names = components(pipe)
    if config.component is None or config.component in names:
        return config.component or names[0]
    own = (config.base_config or {}).get("model_class", "model")
    there = [f"{name}, a {family_name(_base(pipe, name))}" for name in names]
    raise ValueError(
        f"This adapter belongs to a {short(own)} that is the {config.component} of its pipeline, and the "
        f"{type(pipe).__name__} has {' and '.join(there)}. Load it onto "
        f"{config.base_model_name_or_path or 'the base it was trained on'}, or name the model to load it onto with "
        "`component`."
    )


def check_component(pipe: Any, component: str | None) -> None:
    names = components(pipe)
    if component is not None and component not in names:
        raise ValueError(f"component={short(component)}: the pipeline has {names}.{nearest(component, names)}")


def check_free(pipe: Any, adapter_name: str | None, component: str) -> None:
    """Refuses a name that an adapter of the model has."""
    model = models(pipe).get(component)
    if model is not None and adapter_name in model.peft_config:
        raise ValueError(
            f"The name {adapter_name!r} is taken: choose another, delete the adapter {adapter_name!r} first, or pass "
            "hotswap=True to put the new values in its place."
        )


def take_off(pipe: Any, component: str) -> None:
    """Takes all adapters off one model, which is then the base's again."""
    with _not_offloaded(pipe):
        setattr(pipe, component, models(pipe)[component].unload())
    if not models(pipe):
        for verb in ("save_pretrained", "push_to_hub"):
            vars(pipe).pop(verb, None)


def save_pipeline(pipe: Any, save_directory: str | os.PathLike, **kwargs: Any) -> None:
    """Saves the base and, in `adapters/`, the adapters; fused adapters are saved as part of the weights instead.

    `load_pipeline` gives all of it back. A stock pipeline loads what this writes too, without the adapters. While a
    stock pipeline has adapters that `load_adapter` loaded, its own `save_pretrained` is this.

    Args:
        pipe: the pipeline.
        save_directory: each adapter in it is written whole or not at all.
        kwargs: as for every `save_pretrained` of Diffusers' pipelines.

    Raises:
        ValueError: with `push_to_hub`; and if the folder holds adapters that this would not write over, which
            would be loaded with what it does write. Nothing is then changed.
        TypeError: for a keyword argument that Diffusers does not know, and would pass over.
    """
    if unknown := kwargs.keys() - inspect.signature(diffusers.DiffusionPipeline.save_pretrained).parameters.keys():
        raise TypeError(f"save_pretrained() got unexpected keyword arguments: {', '.join(sorted(unknown))}.")
    save_directory = os.path.expanduser(save_directory)
    adapted, saved = models(pipe), saved_adapters(pipe)
    folder = Path(save_directory, ADAPTERS)
    refuse_others(str(folder), {f.name for f in folder.glob("*") if f.is_dir()}, saved)
    if kwargs.get("push_to_hub"):
        raise ValueError("push_to_hub=True: call push_to_hub(repo_id), which uploads the adapters too.")
    keys, active = {(id(model), name): key for key, (model, name) in saved.items()}, {}
    for model in adapted.values():
        for name in [] if fused(model) else in_effect(model):  # in their order, on which the last bits depend
            layers = model.base_model._difffit_layers()
            scale = next(float(layer.scale[name]) for layer in layers if name in layer.scale)
            active[keys[id(model), name]] = scale
    before = {component: getattr(pipe, component) for component in adapted}
    try:
        for component, model in adapted.items():
            other, names = copy.deepcopy(model), fused(model)
            setattr(pipe, component, other.merge_and_unload(adapter_names=names) if names else other.unload())
        diffusers.DiffusionPipeline.save_pretrained(pipe, save_directory, **kwargs)
    finally:
        for component, part in before.items():
            setattr(pipe, component, part)
    index = Path(save_directory, PIPELINE_INDEX)
    stock = next(cls.__name__ for cls in type(pipe).__mro__ if cls.__module__.startswith("diffusers."))
    text = json.dumps(json.loads(index.read_text()) | {"_class_name": stock}, indent=2)
    write(index, lambda partial: partial.write_text(text + "\n"))
    for key, (model, name) in saved.items():
        save_adapter(model, folder / key, name)
    if saved:
        write(folder / ACTIVE, lambda partial: partial.write_text(json.dumps(active)))
    else:
        folder.joinpath(ACTIVE).unlink(missing_ok=True)


def push_pipeline(
    pipe: Any,
    repo_id: str,
    commit_message: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    **kwargs: Any,
) -> str:
    """Uploads what `save_pretrained` writes, in one commit: `load_pipeline(repo_id)` gives it back.

    Keyword arguments as for every pipeline of Diffusers. While a stock pipeline has adapters that `load_adapter`
    loaded, its own `push_to_hub` is this.

    Raises:
        ValueError: if the repository holds adapters that this would not write over. Nothing is then uploaded.
        HfHubHTTPError: of `huggingface_hub`, if the Hub refuses.
    """
    repo_id = create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
    parts = [file.split("/") for file in HfApi(token=token).list_repo_files(repo_id)]
    there = {part[1] for part in parts if part[0] == ADAPTERS and len(part) > 2}
    refuse_others(repo_id, there, saved_adapters(pipe))
    return diffusers.DiffusionPipeline.push_to_hub(pipe, repo_id, commit_message, private, token, **kwargs)


def saved_adapters(pipe: Any) -> dict[str, tuple[PeftModel, str]]:
    """The adapters that are saved with a pipeline, by the folders they are saved in: none of a model that is fused.

    An adapter of the pipeline's main model has its own name, one of another model "name.component".
    """
    adapted = {component: model for component, model in models(pipe).items() if not fused(model)}
    return {
        (name if component == components(pipe)[0] else f"{name}.{component}"): (model, name)
        for component, model in adapted.items()
        for name in model.peft_config
    }


def refuse_others(place: str, there: set[str], saved: dict[str, tuple[PeftModel, str]]) -> None:
    """Refuses a place with other adapters than those to save, which would be loaded with them."""
    if others := sorted(there - {*saved}):
        raise ValueError(
            f"{place} holds the adapters {others}, which this pipeline has not to save: they would be loaded with "
            "it. Remove them, or choose another place."
        )


def _inner(model: Any) -> Any:
    return getattr(model, "_orig_mod", model)


def _base(pipe: Any, component: str) -> Any:
    model = _inner(getattr(pipe, component))
    return model.get_base_model() if isinstance(model, PeftModel) else model


@contextmanager
def _not_offloaded(pipe: Any) -> Iterator[None]:
    """Takes off what `enable_model_cpu_offload` put on a model while another takes its place.

    Accelerate cannot take its hooks off a `PeftModel` around a transformer that has them.
    """
    offloaded = bool(getattr(pipe, "_all_hooks", None))
    if offloaded:
        pipe.remove_all_hooks()
    try:
        yield
    finally:
        if offloaded:
            pipe.enable_model_cpu_offload(device=pipe._offload_device)
