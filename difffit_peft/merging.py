"""Which adapters a merge is asked for, and a merge of many layers that happens whole or not at all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, onload_layer
from torch import nn

from .config import nearest
from .layer import DiffFitLayer


def check_names(names: Iterable[str], adapters: Iterable[str]) -> None:
    """Raises `ValueError` unless these are names of adapters, each at most once."""
    names, adapters = list(names), list(adapters)
    for name in names:
        if name not in adapters:
            raise ValueError(
                f"There is no adapter {name!r}: the model has {sorted(adapters)}.{nearest(name, adapters)}"
            )
    if len({*names}) < len(names):
        raise ValueError(f"adapter_names={names}: name each adapter once.")


def names_to_merge(tuner: BaseTuner, adapter_names: list[str] | None) -> list[str]:
    """The adapters that a merge is asked for: those named or, for `None`, the active ones.

    Raises:
        ValueError: if one is unknown or named twice, or there is none; if adapters are disabled, so that the model is
            the base; if those named are not the active ones and modules saved whole, which do not merge, go with the
            active ones.
    """
    if isinstance(adapter_names, str):
        raise TypeError(f"adapter_names should be a list of strings, got {adapter_names!r}.")
    names = list(tuner.active_adapters if adapter_names is None else adapter_names)
    check_names(names, tuner.peft_config)
    if not names:
        raise ValueError("There is no adapter to merge: name one, or call unload() for the base.")
    if any(layer.disable_adapters for layer in tuner.modules() if isinstance(layer, BaseTunerLayer)):
        raise ValueError(
            "The adapters are disabled: call enable_adapter_layers() before they are merged, or unload() for the base."
        )
    whole = [n for n in {*names} ^ {*tuner.active_adapters} if getattr(tuner.peft_config[n], "modules_to_save", None)]
    if whole:
        raise ValueError(
            f"The adapter {whole[0]!r} has modules_to_save, which do not merge: the model computes with those of the "
            f"active adapter. Call set_adapter({names}) first."
        )
    return names


def merge_layers(names: Mapping[BaseTunerLayer, list[str]], safe_merge: bool) -> None:
    """Merges adapters into layers, in this order. Quantised and sharded layers are refused before any is merged.

    Raises:
        ValueError: as `DiffFitLayer.merge` does. All layers are then as they were: those merged before are unmerged,
            and what had been merged into them is merged again.
    """
    for layer, own in names.items():
        if isinstance(layer, DiffFitLayer) and not layer._get_available_adapters().isdisjoint(own):
            layer.check_mergeable(own)
    merged = {layer: list(layer.merged_adapters) for layer in names}
    try:
        for layer, own in names.items():
            with onload_layer(layer):
                layer.merge(adapter_names=own, safe_merge=safe_merge)
    except BaseException:  # whatever it is, Ctrl-C too, it goes on when the layers are as they were
        for layer, before in reversed(merged.items()):
            if layer.merged_adapters != before:
                with onload_layer(layer):
                    layer.unmerge()
                    if before:
                        layer.merge(adapter_names=before)
        raise


def owners_of_parameters(model: nn.Module) -> dict[int, list[str]]:
    """The names of each parameter, by its id: several of one that is tied."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for own, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(f"{name}.{own}".replace(".base_layer.", "."))
    return owners


def tied_parameters(name: str, layer: nn.Module, owners: dict[int, list[str]]) -> dict[str, str]:
    """The parameters of a layer that other modules have too, and the name of one of those."""
    others = {
        own: [other for other in owners.get(id(parameter), []) if other != f"{name}.{own}"]
        for own, parameter in layer._parameters.items()
        if parameter is not None
    }
    return {own: names[0] for own, names in others.items() if names}
