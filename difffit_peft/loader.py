"""DiffFit adapters on any pipeline of Diffusers: loaded, blended, fused and saved as LoRA is elsewhere.

The verbs are functions of a pipeline, and methods of `DiffFitLoaderMixin` (`difffit_peft.pipelines`). Those that name
adapters mean all that have the name, where a pipeline has two models with adapters.
"""

from __future__ import annotations

import math
import os
import warnings
from typing import Any

from huggingface_hub import CommitInfo
from peft import PeftModel
from typing_extensions import Unpack

from . import publishing
from .components import (
    activate,
    attach,
    check_component,
    check_free,
    components,
    disabled,
    fused,
    in_effect,
    models,
    take_off,
)
from .config import plain, short
from .hotswap import hotswap_adapter
from .merging import check_names
from .reading import HubOptions, adapter_folder, read_adapter


def load_adapter(
    pipe: Any,
    pretrained_model_name_or_path: str | os.PathLike,
    adapter_name: str | None = None,
    hotswap: bool = False,
    *,
    component: str | None = None,
    **hub: Unpack[HubOptions],
) -> None:
    """Loads an adapter into a pipeline and makes it the active one.

    Args:
        pipe: any pipeline that has a `transformer`, `transformer_2` or `unet`. The model becomes a `PeftModel`.
        pretrained_model_name_or_path: folder or Hub id of the adapter. What exists on this machine is taken from
            there. A path of its weights or config stands for the folder they are in.
        adapter_name: name to give it; `None`: "default_0", "default_1" and so on, the first that is free.
        hotswap: put its values in the place of those of the adapter `adapter_name` that is there already.
        component: the model to load it onto, such as "transformer_2"; `None`: the one that it was trained on. Adapters
            of another model stay as active as they are.
        subfolder: where in the folder or repository the adapter is.
        revision: branch, tag or commit of the repository; a folder has none, and is refused with one.
        token, cache_dir, local_files_only, force_download: as for every download from the Hub.

    Raises:
        ValueError: if it is not a DiffFit adapter, belongs to another base, is broken, or has no safetensors file;
            if the name is taken, or with `hotswap` is not; if the pipeline has no such model.
        HfHubHTTPError: of `huggingface_hub`, or one of its subclasses, if the Hub does not give it.

    The pipeline is then as it was.
    """
    check_component(pipe, component)
    if adapter_name is not None and (not adapter_name or {*adapter_name} & {*"./\\"}):
        raise ValueError(f"adapter_name={adapter_name!r}: it must not be empty, nor hold a dot or a slash.")
    names = get_list_adapters(pipe)
    if hotswap and adapter_name not in names:
        raise ValueError(f"There is no adapter {adapter_name!r} to swap: the pipeline has {names}.")
    own = components(pipe) if component is None else [component]
    if not hotswap and len(own) == 1:
        check_free(pipe, adapter_name, own[0])
    _refuse_fused(pipe)
    swapped = _one_model(pipe, str(adapter_name), component) if hotswap else None
    folder = adapter_folder(pretrained_model_name_or_path, **hub)
    if swapped is None:
        attach(pipe, *read_adapter(folder), adapter_name, component)
    else:
        hotswap_adapter(swapped, folder, str(adapter_name))
        activate(swapped, [str(adapter_name)])


def set_adapters(pipe: Any, adapter_names: list[str] | str, adapter_weights: list[float] | float | None = None) -> None:
    """Makes these adapters the active ones, at these scales; `None` leaves their scales as they are.

    Adapters that were disabled are enabled. A model of the pipeline that has none of them computes with its base.

    Raises:
        ValueError: for an unknown adapter, for weights that are not finite or not as many, and if adapters are
            fused. Nothing is then changed.
    """
    names = _names(pipe, adapter_names)
    weights = plain(adapter_weights)
    weights = [plain(w) for w in weights] if isinstance(weights, (list, tuple)) else [weights] * len(names)
    if len(weights) != len(names) or not all(
        weight is None or (isinstance(weight, (int, float)) and math.isfinite(weight)) for weight in weights
    ):
        raise ValueError(f"adapter_weights={adapter_weights}: must be one finite number for each of {names}.")
    _refuse_fused(pipe)
    for model in models(pipe).values():
        own = {name: weight for name, weight in zip(names, weights, strict=True) if name in model.peft_config}
        for name, weight in own.items():
            if weight is not None:
                model.set_scale(name, weight)
        activate(model, [*own])


def get_active_adapters(pipe: Any) -> list[str]:
    """Names of the adapters that have an effect: none while they are disabled, those fused while any is fused."""
    return list(dict.fromkeys(name for model in models(pipe).values() for name in in_effect(model)))


def get_list_adapters(pipe: Any) -> list[str]:
    """Names of all the adapters that are loaded."""
    return list(dict.fromkeys(name for model in models(pipe).values() for name in model.peft_config))


def delete_adapters(pipe: Any, adapter_names: list[str] | str) -> None:
    """Removes adapters; without the last one the pipeline is as it was before the first.

    Raises:
        ValueError: for an unknown adapter, or if adapters are fused. Nothing is then changed.
    """
    names = _names(pipe, adapter_names)
    _refuse_fused(pipe)
    for component, model in models(pipe).items():
        own = [name for name in names if name in model.peft_config]
        remaining = [name for name in model.peft_config if name not in own]
        if not remaining:
            take_off(pipe, component)
        elif own:
            before, off = model.base_model.active_adapters, disabled(model)
            active = [name for name in before if name in remaining]
            for name in own:
                model.delete_adapter(name)
            activate(model, active or (remaining[:1] if before else []))
            if off:
                model.base_model.disable_adapter_layers()


def unload_adapters(pipe: Any) -> None:
    """Takes all adapters off, fused ones too, with a warning: the models of the pipeline are the base's again.

    Diffusers' `unload_lora_weights` leaves fused LoRA in the weights. To leave fused adapters in,
    `pipe.transformer = pipe.transformer.merge_and_unload()`; `save_pretrained` writes them into the weights too. A
    model that was compiled with adapters is not compiled any more without them.
    """
    for component, model in models(pipe).items():
        if names := fused(model):
            warnings.warn(
                f"The adapters {names} were fused, and are taken out of the weights: {component} is the base's again. "
                f"To leave them in, call pipe.{component} = pipe.{component}.merge_and_unload() in the place of this.",
                stacklevel=2,
            )
        take_off(pipe, component)


def disable_adapters(pipe: Any) -> None:
    """Computes with the base alone, until the adapters are enabled again.

    Raises:
        ValueError: if adapters are fused, or there is none.
    """
    for model in _unfused(pipe):
        model.base_model.disable_adapter_layers()


def enable_adapters(pipe: Any) -> None:
    """Computes with the active adapters again.

    Raises:
        ValueError: if adapters are fused, or there is none.
    """
    for model in _unfused(pipe):
        activate(model, model.base_model.active_adapters)


def fuse_adapters(pipe: Any, adapter_names: list[str] | str | None = None, safe_fusing: bool = False) -> None:
    """Writes adapters, by default the active ones, into the weights, so that they cost nothing when sampling.

    While any is fused, those of its model that are not have no effect. More can be fused; what is fused already stays
    so.

    Raises:
        ValueError: for an unknown adapter; while adapters are disabled; with `safe_fusing`, if that gives values
            that are not finite; if the base is quantised so that they do not fit in. Nothing is then changed.
    """
    adapted = _adapted(pipe)
    names = None if adapter_names is None else _names(pipe, adapter_names)
    if not get_active_adapters(pipe):
        raise ValueError("Adapters are disabled: call enable_adapters(pipe), or pipe.enable_difffit(), first.")
    before = [(model, list(fused(model))) for model in adapted.values()]
    try:
        for model, already in before:
            own = in_effect(model) if names is None else [name for name in names if name in model.peft_config]
            if {*own} - {*already}:
                model.merge_adapter(own, safe_merge=safe_fusing)
    except BaseException:  # as in a merge of layers: it goes on when the models merged before are as they were
        for model, already in before:
            if fused(model) != already:
                model.unmerge_adapter()
                if already:
                    model.merge_adapter(already)
        raise


def unfuse_adapters(pipe: Any) -> None:
    """Puts the base's own weights back, to the last bit. The adapters active before are active again."""
    for model in _adapted(pipe).values():
        model.unmerge_adapter()


def save_adapter(
    pipe: Any,
    save_directory: str | os.PathLike,
    adapter_name: str | None = None,
    *,
    component: str | None = None,
    **card: Any,
) -> None:
    """Saves one adapter, by default the only one that is active, as a folder that `load_adapter` takes.

    Args:
        pipe: the pipeline.
        save_directory: as for `publishing.save_adapter`.
        adapter_name: the adapter.
        component: the model that it is on, where adapters of two models have the name.
        card: `license`, `dataset`, `training`, `picture` and `prompt`, of the model card.

    Raises:
        ValueError: if there is no such adapter, or it is not clear which one is meant. Nothing is then changed.
    """
    model, adapter_name = _one_adapter(pipe, adapter_name, component)
    publishing.save_adapter(model, save_directory, adapter_name, **card)


def push_adapter(
    pipe: Any, repo_id: str, adapter_name: str | None = None, *, component: str | None = None, **kwargs: Any
) -> CommitInfo:
    """Uploads one adapter, by default the only one that is active, with a model card, in one commit.

    Keyword arguments: `commit_message`, `private`, `token`, `revision`, `create_pr`, and those of the card as in
    `save_adapter`; see `publishing.push_adapter`, also for what is raised.
    """
    model, adapter_name = _one_adapter(pipe, adapter_name, component)
    return publishing.push_adapter(model, repo_id, adapter_name, **kwargs)


def _one_adapter(pipe: Any, adapter_name: str | None, component: str | None) -> tuple[PeftModel, str]:
    """The adapter that is meant, with its model. Its config then says which model of the pipeline that is."""
    check_component(pipe, component)
    if adapter_name is None:
        adapted = models(pipe)
        active = get_active_adapters(pipe) if component not in adapted else in_effect(adapted[component])
        if len(active) != 1:
            raise ValueError(f"adapter_name is None, but the active adapters are {active}: name one.")
        adapter_name = active[0]
    _names(pipe, [adapter_name])
    model = _one_model(pipe, adapter_name, component)
    model.peft_config[adapter_name].component = next(name for name, other in models(pipe).items() if other is model)
    return model, adapter_name


def _one_model(pipe: Any, adapter_name: str, component: str | None) -> PeftModel:
    having = {name: model for name, model in models(pipe).items() if adapter_name in model.peft_config}
    if component is None and len(having) == 1:
        component = next(iter(having))
    if component not in having:
        raise ValueError(f"component={component!r}: the adapter {adapter_name!r} is on {[*having]}. Name one of them.")
    return having[component]


def _names(pipe: Any, adapter_names: list[str] | str) -> list[str]:
    """The names that a verb is given, which must be of adapters that are loaded, each once."""
    names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
    if not isinstance(names, (list, tuple)) or not names:
        raise ValueError(
            f"adapter_names={short(adapter_names)}: name at least one adapter, as a string or a list of strings. "
            "Scales go apart, as in set_adapters(['a', 'b'], [0.8, 0.2])."
        )
    _adapted(pipe)
    check_names(names, get_list_adapters(pipe))
    return list(names)


def _adapted(pipe: Any) -> dict[str, PeftModel]:
    adapted = models(pipe)
    if not adapted:
        raise ValueError(
            "The pipeline has no DiffFit adapter: call load_adapter(pipe, path), or pipe.load_difffit_weights(path), "
            "first."
        )
    return adapted


def _unfused(pipe: Any) -> list[PeftModel]:
    adapted = _adapted(pipe)
    _refuse_fused(pipe)
    return [*adapted.values()]


def _refuse_fused(pipe: Any) -> None:
    if any(map(fused, models(pipe).values())):
        raise ValueError("Adapters are fused: call unfuse_adapters(pipe), or pipe.unfuse_difffit(), first.")
