"""Parameters of no layer that play the part of adaLN's bias, such as `scale_shift_table`: trained like biases.

A module that has one, its owner, gets a child `adapted_NAME`, on which an adapter's δ lies as it does on a layer. While
the owner's `forward` runs, the owner's attribute NAME is the sum of the parameter and δ. The parameter itself, and its
name in a state dict, stay what they are.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .config import DiffFitConfig
from .layer import DiffFitLayer

_MODULATION = re.compile("scale_shift|modulat|adaln")  # no embedding of positions, no latents, no query tokens
_CHILD = "adapted_{}"


class BareParameter(nn.Module):
    """Stands for one parameter of its owner. It has no parameters itself."""

    def __init__(self, owner: nn.Module, name: str) -> None:
        super().__init__()
        object.__setattr__(self, "owner", owner)  # not a child of this module
        self.name = name
        self.in_features = self.out_features = self.weight.shape[-1]

    @property
    def weight(self) -> nn.Parameter:
        return self.owner._parameters[self.name]


class DiffFitParameter(DiffFitLayer):
    """Puts δ, of the parameter's own shape, on a parameter: parameter + Σ s_i δ_i. There is no γ."""

    @staticmethod
    def shapes(layer: nn.Module, config: DiffFitConfig, **target: Any) -> dict[str, tuple[int, ...]]:
        return {"difffit_delta": tuple(layer.weight.shape)}

    def value(self) -> Tensor | None:
        """What the owner computes with; None where that is the parameter as it is."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        delta = None if self.disable_adapters or self.merged else self._composed("difffit_delta", self.active_adapters)
        weight = self.get_base_layer().weight
        return None if delta is None else weight + delta.to(weight.dtype)

    def swap_in(self) -> None:
        """Puts that value in the place of the owner's attribute."""
        base = self.get_base_layer()
        if (value := self.value()) is not None:
            base.owner.__dict__[base.name] = value

    def _fill_scale(self, adapter_name: str, scale: float) -> None:
        super()._fill_scale(adapter_name, scale)
        base = self.get_base_layer()
        if base.name in base.owner.__dict__:  # the owner's forward runs: a model of Diffusers scales its layers within
            self.swap_in()

    def _merged(self, base: dict[str, Tensor], adapters: list[str]) -> dict[str, Tensor]:
        weight = base["weight"].to(torch.promote_types(base["weight"].dtype, torch.float32))
        delta = self._composed("difffit_delta", adapters)
        return {} if delta is None else {"weight": weight + delta.detach()}


def attach_parameters(model: nn.Module) -> Callable[[], None]:
    """Gives each owner of such a parameter its child. Returns what undoes that."""
    added = []
    for owner in [*model.modules()]:
        for name, parameter in owner._parameters.items():
            child = _CHILD.format(name)
            if parameter is None or not _MODULATION.search(name) or child in owner._modules:
                continue
            if parameter.is_floating_point() and not isinstance(owner, DiffFitLayer):
                owner.add_module(child, BareParameter(owner, name))
                owner.register_forward_pre_hook(_swap_in)
                owner.register_forward_hook(_swap_out, always_call=True)
                added.append(owner)
    return lambda: detach_parameters(added)


def detach_parameters(modules: Any) -> None:
    """Takes the children away again, where no adapter is on them."""
    for owner in modules:
        children = [name for name, child in owner._modules.items() if isinstance(child, BareParameter)]
        for name in children:
            del owner._modules[name]
        if children:
            for hooks, hook in ((owner._forward_pre_hooks, _swap_in), (owner._forward_hooks, _swap_out)):
                for key in [key for key, value in hooks.items() if value is hook]:
                    del hooks[key]
                    owner._forward_hooks_always_called.pop(key, None)


def is_of_parameter(weight: str) -> bool:
    """Whether an adapter's weight of this name is the δ of such a parameter."""
    return re.search(rf"(^|\.){_CHILD.format('[^.]+')}\.difffit_delta", weight) is not None


def forget_parameters(model: nn.Module, config: DiffFitConfig, adapter_name: str, missing: set[str]) -> None:
    """Takes an adapter off the parameters whose δ its file has not: it was saved before they were trained."""
    names = {weight.partition(".difffit_delta")[0] for weight in missing}
    for name in names:
        del model.get_submodule(name).difffit_delta[adapter_name]
    if names:
        config.exclude_modules = [*(config.exclude_modules or ()), *sorted({n.rpartition(".")[2] for n in names})]


def check_mixable(model: nn.Module, adapters: set[str]) -> None:
    """Raises `ValueError` if a batch cannot mix these adapters: one changes a parameter, which all samples have in
    common, or the model's layers are called with rows that are no samples, though there may be as many of them."""
    if "timestep_indices" in inspect.signature(type(model).forward).parameters:
        raise ValueError(
            f"Cannot pass `adapter_names`: {type(model).__name__} computes a row for each timestep, of which a token "
            "has the one that `timestep_indices` says: the rows are no samples. Call it once for each adapter, after "
            "set_adapter."
        )
    layers = [m for m in model.modules() if isinstance(m, DiffFitParameter) and adapters & {*m.difffit_delta}]
    if layers:
        raise ValueError(
            f"Cannot pass `adapter_names`: the adapters {sorted(adapters - {'__base__'})} change "
            f"{sorted({layer.get_base_layer().name for layer in layers})}, which a model has once for all samples. "
            "Call it once for each adapter, after set_adapter."
        )


def _swap_in(owner: nn.Module, args: tuple) -> None:
    for child in owner._modules.values():
        if isinstance(child, DiffFitParameter):
            child.swap_in()


def _swap_out(owner: nn.Module, args: tuple, output: Any) -> None:
    for child in owner._modules.values():
        if isinstance(child, DiffFitParameter):
            owner.__dict__.pop(child.get_base_layer().name, None)
