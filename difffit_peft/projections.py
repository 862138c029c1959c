"""Diffusers' fused q, k and v: `fuse_qkv_projections()` copies weights, and layers that it copied are called no more.

What an adapter has on such a layer would be lost without a word. So a model with an adapter refuses to be fused, and a
fused model refuses an adapter.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from .layer import DiffFitLayer

_VERBS = ("fuse_qkv_projections", "fuse_projections")  # of a model, and of its attention


def check_not_fused(model: nn.Module) -> None:
    """Raises `ValueError` if q, k and v of an attention are fused."""
    fused = [name for name, module in model.named_modules() if getattr(module, "fused_projections", False) is True]
    if fused:
        raise ValueError(
            f"The projections of q, k and v are fused in {len(fused)} modules of {type(model).__name__}, such as "
            f"{fused[0]}: to_q, to_k and to_v are called no more, and an adapter on them would have no effect. Call "
            "unfuse_qkv_projections() first or, where that leaves the fused layers in the model, load the model anew. "
            "It can be fused after merge_and_unload()."
        )


def guard_projections(model: nn.Module) -> Callable[[], None]:
    """Lets the model refuse to be fused while it has adapters. Returns what undoes that."""
    guarded = []
    for module in model.modules():
        verbs = [verb for verb in _VERBS if callable(getattr(module, verb, None)) and verb not in vars(module)]
        for verb in verbs:
            setattr(module, verb, partial(_fuse, module, verb))
        guarded += [module] * bool(verbs)
    return lambda: unguard_projections(guarded)


def unguard_projections(modules: Any) -> None:
    for module in modules:
        for verb in _VERBS:
            if getattr(vars(module).get(verb), "func", None) is _fuse:
                delattr(module, verb)


def _fuse(module: nn.Module, verb: str, *args: Any, **kwargs: Any) -> Any:
    layers = [layer for layer in module.modules() if isinstance(layer, DiffFitLayer)]
    adapters = sorted({name for layer in layers for name in layer._get_available_adapters()})
    if adapters:
        raise ValueError(
            f"{verb}() copies the weights of q, k and v, without what the adapters {adapters} put on them: they would "
            "lose a part of their effect. Write them into the weights first, as in model = model.merge_and_unload(), "
            "or take them off with unload(); and then call it."
        )
    return getattr(type(module), verb)(module, *args, **kwargs)
