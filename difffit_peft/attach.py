"""A model made ready for an adapter, and given back: whether the two belong together, and what goes where."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from .bare_parameters import BareParameter, DiffFitParameter, attach_parameters, detach_parameters, is_of_parameter
from .base_layers import is_supported, takes_bias
from .class_rows import DiffFitEmbedding
from .config import COMPONENTS, FORMAT_VERSION, DiffFitConfig, nearest, short
from .families import Family, family_name, family_of
from .layer import DiffFitLayer
from .norms import is_norm
from .publishing import base_model_id
from .refused_verbs import check_not_fused, guard_verbs, unguard_verbs
from .targets import Layer, Target, plan, spelled_out

_MAX_UPSCALING = 16  # an adapter from a stranger must not ask for any amount of memory


def prepare(config: DiffFitConfig, model: nn.Module, adapters: dict[str, PeftConfig]) -> dict[str, Target]:
    """Checks the config against the model, plans what each layer gets, and makes the model ready for it.

    `adapters` are all of the model's. The config is filled in: the facts of the base, and names for presets.

    Raises:
        ValueError: if the config does not fit the model. Both are then as they were.
    """
    family = family_of(model, config.format_version)
    facts = _facts_of_base(config, model, family, adapters)
    check_not_fused(model)
    undo = [guard_verbs(model), family.prepare(model), attach_parameters(model)]
    try:
        layers = named_layers(model, family)
        planned = plan(config, layers, family, type(model).__name__, saved_whole(config, model, layers))
        _check_file(config, planned, model)
        if "sample_size" in facts:
            family.move_to(model, facts["sample_size"])
    except Exception:
        for step in reversed(undo):
            step()
        raise
    facts |= spelled_out(config, planned, layers, family) | {"format_version": FORMAT_VERSION}
    for name, value in facts.items():
        setattr(config, name, value)
    return planned


def restore(model: nn.Module, merged: bool) -> None:
    """Undoes `prepare` when the adapters are gone or, if `merged`, are part of the weights."""
    detach_parameters(model.modules())
    unguard_verbs(model.modules())
    family_of(model).restore(model, merged=merged)


def layer_class(layer: nn.Module) -> type[DiffFitLayer]:
    """The class that puts an adapter on a layer."""
    if isinstance(layer, BareParameter):
        return DiffFitParameter
    return DiffFitEmbedding if isinstance(layer, nn.Embedding) else DiffFitLayer


def named_layers(model: nn.Module, family: Family) -> dict[str, Layer]:
    """The layers γ and δ can be put on, then class tables, by the names they have without adapters."""
    layers: dict[str, Layer] = {}
    tables: dict[str, Layer] = {}
    # what is inside adapter layers and other adapters' modules_to_save, and what MultiheadAttention uses without a call
    closed = "\0"  # the last one: a walk goes through all of a module before it leaves it
    for name, module in model.named_modules():
        if not name or name.startswith(closed):
            continue
        base = module.get_base_layer() if hasattr(module, "get_base_layer") else module
        if base is not module or isinstance(module, (nn.MultiheadAttention, AuxiliaryTrainingWrapper)):
            closed = f"{name}."
        kind = type(base).__name__
        if is_supported(base):
            rank = min(base.in_features, base.out_features) if isinstance(base, nn.Linear) else 0
            own = next((layer._base() for layer in module.modules() if isinstance(layer, DiffFitLayer)), None)
            bias = getattr(base, "bias", None) is not None if own is None else "bias" in own  # merged, it may have one
            layers[name] = Layer(kind, bias, takes_bias(base) and not bias, norm=is_norm(base), max_rank=rank)
        elif isinstance(base, BareParameter):
            layers[name] = Layer(kind, bias=True, parameter=True)
        elif family.class_table and isinstance(base, nn.Embedding) and name.endswith(family.class_table):
            tables[name] = Layer(kind, num_classes=base.num_embeddings - 1)
    return layers | tables


def _facts_of_base(
    config: DiffFitConfig, model: nn.Module, family: Family, adapters: dict[str, PeftConfig]
) -> dict[str, Any]:
    """What the config is to say of this base; raises if it speaks of another."""
    base = {"model_class": family_name(model)} | family.facts(model)
    expected = config.base_config or base
    if expected.get("model_class", base["model_class"]) != base["model_class"]:
        raise ValueError(
            f"This adapter belongs to a {short(expected['model_class'])}, and the model is a {base['model_class']}. "
            f"Load it onto {config.base_model_name_or_path or 'the base it was trained on'}."
        )
    side = base.get("sample_size")
    if side is None and config.sample_size is not None:
        raise ValueError(
            f"sample_size={config.sample_size}: {type(model).__name__} cannot be moved to other latents. Leave it out."
        )
    differing = [name for name in expected if expected[name] != base.get(name)]
    if differing:
        raise ValueError(
            "This adapter belongs to another base: "
            + ", ".join(f"{name} is {short(expected[name])} there and {base.get(name)} here" for name in differing[:9])
            + f". Load it onto {config.base_model_name_or_path or 'the base it was trained on'}, or start a new "
            "adapter from a new DiffFitConfig."
        )
    facts: dict[str, Any] = {"base_config": base}
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    if name and config.base_model_name_or_path is None:
        facts["base_model_name_or_path"], facts["revision"] = base_model_id(str(name))
        if config.component is None and Path(str(name)).name in COMPONENTS:
            facts["component"] = Path(str(name)).name
    if side is None:
        return facts
    sample_size = config.sample_size or side
    if sample_size > _MAX_UPSCALING * side:
        raise ValueError(f"sample_size={sample_size}: at most {_MAX_UPSCALING} times the base's own, {side}.")
    others = [other for other in adapters.values() if other is not config and isinstance(other, DiffFitConfig)]
    if any(other.sample_size != sample_size for other in others):
        raise ValueError(
            f"This adapter is for latents of side {sample_size}, but the model has adapters for "
            f"{others[0].sample_size}: one model holds adapters of one side. Use a second model."
        )
    return facts | {"sample_size": sample_size}


def planned_shapes(config: DiffFitConfig, targets: dict[str, Target], model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shapes of the weights of the plan, by the names of the layer and of what is put on it."""
    planned: dict[str, tuple[int, ...]] = {}
    for name, target in targets.items():
        module = model.get_submodule(name)
        layer = getattr(module, "get_base_layer", lambda m=module: m)()
        shapes = layer_class(layer).shapes(layer, config, **vars(target))
        planned |= {f"{name}.{kind}": shape for kind, shape in shapes.items()}
    return planned


def _check_file(config: DiffFitConfig, targets: dict[str, Target], model: nn.Module) -> None:
    """Refuses a file whose weights are not those of the plan."""
    if config.weight_shapes is None:
        return
    planned = planned_shapes(config, targets, model)
    saved = tuple(f".{module}." for module in config.modules_to_save or ())
    found = {  # peft would write any other weights to the base
        name.removeprefix("base_model.model."): shape
        for name, shape in config.weight_shapes.items()
        if ".difffit_" in name or not any(module in f".{name}" for module in saved)
    }
    whole = [name for name, module in model.named_modules() if isinstance(module, AuxiliaryTrainingWrapper)]
    closed = next((name for name in whole for weight in found if weight.startswith(f"{name}.")), None)
    if closed is not None:
        raise ValueError(
            f"The adapter has weights for {closed}, which another adapter of this model saves whole (modules_to_save). "
            "Load them into two models."
        )
    check_weight_names({*planned}, {*found})
    for name, shape in planned.items():
        if found.get(name, shape) != shape:
            raise ValueError(f"The file's weights do not fit its config: {name} has shape {found[name]}, not {shape}.")


def check_weight_names(expected: set[str], found: set[str]) -> None:
    """Raises `ValueError` unless a file has the weights expected of it. One that was saved before parameters that no
    layer holds were trained has none of theirs."""
    parameters = set(filter(is_of_parameter, expected))
    if found and not found & parameters:
        expected = expected - parameters
    if expected != found:
        raise ValueError(
            f"The file's weights do not fit its config: {len(expected - found)} are missing and "
            f"{len(found - expected)} belong to no layer, for instance {min(expected ^ found)}."
        )


def saved_whole(config: DiffFitConfig, model: nn.Module, names: Iterable[str]) -> set[str]:
    """The layers among `names` that are, or lie in, a module of `modules_to_save`."""
    saved: set[str] = set()
    if not config.modules_to_save:
        return saved
    modules = dict(model.named_modules())
    for ending in config.modules_to_save:
        matching = tuple(name for name in modules if name.endswith(ending))  # as peft matches them
        if not matching:
            raise ValueError(f"modules_to_save: {ending!r} names no module of the model.{nearest(ending, [*modules])}")
        adapted = next((name for name in matching if isinstance(modules[name], BaseTunerLayer)), None)
        if adapted:
            raise ValueError(
                f"modules_to_save: {adapted} has adapters of its own already. Attach the adapter that saves it whole "
                "first, or name it in the others' exclude_modules."
            )
        saved |= {name for name in names if name in matching or name.startswith(tuple(f"{m}." for m in matching))}
    return saved
