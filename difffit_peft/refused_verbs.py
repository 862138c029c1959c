"""Verbs of Diffusers that would lose an adapter without a word: a model that has one refuses them.

`fuse_qkv_projections()` copies weights, and layers that it copied are called no more. What an adapter has on such a
layer would be lost. So a model with an adapter refuses to be fused, and a fused model refuses an adapter.
`save_lora_adapter()` writes any adapter into a file of LoRA, which nothing can load (Diffusers 0.42).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from .config import DiffFitConfig
from .layer import DiffFitLayer


def check_not_fused(model: nn.Module) -> None:
    """Raises `ValueError` if q, k and v of an attention are fused."""
    fused = [name for name, module in model.named_modules() if vars(module).get("fused_projections") is True]
    if fused:
        raise ValueError(
            f"The projections of q, k and v are fused in {len(fused)} modules of {type(model).__name__}, such as "
            f"{fused[0]}: to_q, to_k and to_v are called no more, and an adapter on them would have no effect. Call "
            "unfuse_qkv_projections() first or, where that leaves the fused layers in the model, load the model anew. "
            "It can be fused after merge_and_unload()."
        )


def guard_verbs(model: nn.Module) -> Callable[[], None]:
    """Lets the model refuse those verbs while it has adapters. Returns what undoes that."""
    guarded = []
    for module in model.modules():
        verbs = [verb for verb in _GUARDS if hasattr(type(module), verb) and verb not in vars(module)]
        for verb in verbs:
            setattr(module, verb, partial(_GUARDS[verb], module, verb))
        guarded += [module] * bool(verbs)
    return lambda: unguard_verbs(guarded)


def unguard_verbs(modules: Any) -> None:
    for module in modules:
        for verb, guard in _GUARDS.items():
            if getattr(vars(module).get(verb), "func", None) is guard:
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


def _save_lora(module: nn.Module, verb: str, save_directory: Any, adapter_name: str = "default", **kwargs: Any) -> Any:
    if isinstance(getattr(module, "peft_config", {}).get(adapter_name), DiffFitConfig):
        raise ValueError(
            f"{verb}() writes files of LoRA, and {adapter_name!r} is an adapter of DiffFit: nothing could load it. "
            "Save it with difffit_peft.save_adapter(pipe, folder), or with save_pretrained() of the PeftModel that "
            "get_peft_model gives."
        )
    return getattr(type(module), verb)(module, save_directory, adapter_name, **kwargs)


_GUARDS = {  # of a model, and of its attention
    "fuse_qkv_projections": _fuse,
    "fuse_projections": _fuse,
    "save_lora_adapter": _save_lora,
}
