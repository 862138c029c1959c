"""Which modules are norms with a weight of their own, told by what they compute.

Models define their own norms, under names and with a `forward` that no list knows. So a module that is none of the
known classes is tried on a small input, with weights of the trial's own: it is a norm if its output does not change
with the scale of its input, and is proportional to the weight, or to 1 + the weight.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from diffusers.models.normalization import RMSNorm
from torch import Tensor, nn

CHANNELS_FIRST_NORMS = (nn.GroupNorm, nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)
_NORMS = (nn.LayerNorm, nn.RMSNorm, RMSNorm, *CHANNELS_FIRST_NORMS)
_WEIGHTS = ("weight", "gamma", "scale")  # what norms call it


@dataclass(frozen=True)
class Norm:
    """y = (added + weight) ⊙ normalised(x) + bias, or without the bias."""

    weight: str = "weight"  # the name of the parameter
    added: float = 0.0  # 1 where the weight is kept as its difference from 1


_TRIED: WeakKeyDictionary[nn.Module, tuple[tuple, Norm | None]] = WeakKeyDictionary()


def norm_of(module: nn.Module) -> Norm | None:
    """What norm `module` is; None for what is none, or has no weight."""
    if isinstance(module, _NORMS):
        return Norm() if isinstance(module.weight, Tensor) else None
    if isinstance(module, nn.Linear) or not module._parameters:
        return None
    parameters = {name: tuple(p.shape) for name, p in module._parameters.items() if p is not None}
    name = next((name for name in _WEIGHTS if name in parameters), None)
    shape = parameters.get(name or "", ())
    if name is None or module._modules or parameters.keys() - {name, "bias"} or {*parameters.values()} != {shape}:
        return None
    if len(shape) != 1 or shape[0] < 2:
        return None
    key = (type(module), *parameters.items())
    if _TRIED.get(module, (None,))[0] != key:
        _TRIED[module] = key, _tried(module, name, shape[0], "bias" in parameters)
    return _TRIED[module][1]


def is_norm(module: nn.Module) -> bool:
    """Whether `module` is a norm with affine parameters."""
    return norm_of(module) is not None


def looks_like_a_norm(module: nn.Module) -> bool:
    """Whether `module` calls itself a norm, and has parameters of its own, but is none that γ and δ can be put on."""
    has_parameters = any(p is not None for p in module._parameters.values())
    return "norm" in type(module).__name__.lower() and has_parameters and not is_norm(module)


def _tried(module: nn.Module, name: str, size: int, has_bias: bool) -> Norm | None:
    """What `module` computes with weights of our own. It is left as it is, and no random number is drawn."""
    ramp = torch.arange(6 * size, dtype=torch.float32, device="cpu").view(2, 3, size)
    x, weight = (ramp * 0.7 + 0.3).sin() + 0.1, ramp[0, 0].cos() + 1.5

    def output(x: Tensor, weight: Tensor, bias: float = 0.0) -> Tensor:
        twin: Any = copy.copy(module)
        values = {name: weight} | ({"bias": torch.full_like(weight, bias)} if has_bias else {})
        parameters = {own: nn.Parameter(value, requires_grad=False) for own, value in values.items()}
        twin.__dict__["_parameters"] = module._parameters | parameters
        return type(module).forward(twin, x)  # without hooks, and without what Accelerate puts around it

    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad(), torch.autocast("cpu", enabled=False):
            y = output(x, weight)
            if not isinstance(y, Tensor) or y.shape != x.shape or not y.isfinite().all() or _close(y, y * 0):
                return None
            if not _close(output(3 * x, weight), y) or (has_bias and not _close(output(x, weight, 2.0), y + 2)):
                return None
            for added in (0.0, 1.0):
                again = (added + 2 * weight) / (added + weight) * y
                if _close(output(x, -added + 0 * weight), 0 * y) and _close(output(x, 2 * weight), again):
                    return Norm(name, added)
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError, KeyError):  # its input is another
        return None
    return None


def _close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a.float(), b.float(), rtol=1e-3, atol=1e-3)
