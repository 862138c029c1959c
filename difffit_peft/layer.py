"""The whole method in one layer: y = γ ⊙ (base(x) + δ), and on request y = γ ⊙ (base(x) + B A x + δ)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .adapter_scales import Scales
from .base_layers import CONVOLUTIONS, features, is_plain_linear, linear, takes_gamma, value_shape
from .config import DiffFitConfig
from .gamma_autograd import LinearTimesGamma, TimesGamma
from .norms import CHANNELS_FIRST_NORMS, norm_of
from .quantised_weights import is_quantised, row_scales, scaled

Entry = str | tuple[str, ...]  # of `adapter_names`, for one sample
_Combine = Callable[[str, Any], Tensor | None]
_NEUTRAL = {"difffit_gamma": 1.0, "difffit_delta": 0.0, "difffit_A": 0.0, "difffit_B": 0.0}
_NEW_BIAS = (
    "The merge gives biases to layers that had none (new_biases=True). The model computes with them and saves them, "
    "but from_pretrained makes its class without them, and drops them. To use the result elsewhere, save the adapter."
)


def names_in(entry: Entry) -> tuple[str, ...]:
    """The adapters of one sample: its name, or a tuple of those that compose. "__base__" is the name of none."""
    return (entry,) if isinstance(entry, str) else entry


class DiffFitLayer(nn.Module, Scales, BaseTunerLayer):
    """Puts γ and δ, one value per output channel each, on the output of a frozen layer.

        y = γ ⊙ (base(x) + δ)

    δ moves the layer's bias and γ scales its output (Xie et al. 2023, section 3.2). For a norm they *are* its affine
    parameters, so that a norm needs no layer of its own. Not every layer has both. The base layer is never written
    to, but while merged: then `weight` is γ·weight and `bias` is γ·(bias + δ), and the originals are kept aside. A
    layer without a bias, which has δ with `DiffFitConfig(new_biases=True)`, has one while merged.

    With `DiffFitConfig(r=...)` linear layers also get a change of rank r, which can turn the rows of the weight where γ
    can only stretch them: y = γ ⊙ (base(x) + B A x + δ), merged as γ·(weight + B A). That is LoRA's (Hu et al. 2021)
    with alpha = r, and no part of the paper's method.

    Several active adapters i with scales s_i compose in any order, in the forward pass as in a merge, so that an
    adapter at scale 0 is the base and at 1 itself:

        γ = Π (1 + s_i (γ_i - 1))        δ = Σ s_i δ_i        B A = Σ s_i B_i A_i

    Shapes: `difffit_gamma[name]` and `difffit_delta[name]` are (out channels,), or the shape of a norm's weight;
    `difffit_A[name]` is (r, in channels), `difffit_B[name]` (out channels, r).
    """

    adapter_layer_names = ("difffit_gamma", "difffit_delta", "difffit_A", "difffit_B")
    cast_input_dtype_enabled = True  # peft's layer-wise casting looks for it; only outputs are touched here

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        layer = self.get_base_layer()
        self.norm = norm_of(layer)
        self.in_features, self.out_features = features(layer)
        self._value_shape = value_shape(layer)
        for kind in self.adapter_layer_names:
            setattr(self, kind, {})  # a module once there is something in it: every walk over a model visits modules
        self._init_scales()
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._active_adapter: str | list[str] = []
        self.tied: dict[str, str] = {}  # "weight" or "bias": the name of a parameter elsewhere that is the same tensor
        self._unmerged: dict[str, Tensor | None] = {}  # the base's own tensors while adapters are merged

    @staticmethod
    def shapes(
        layer: nn.Module, config: DiffFitConfig, *, gamma: bool = False, delta: bool = False, rank: int = 0
    ) -> dict[str, tuple[int, ...]]:
        """The shapes of what an adapter puts on `layer`, by their names."""
        inputs, outputs = features(layer)
        wanted = {"difffit_gamma": gamma, "difffit_delta": delta}
        shapes = {name: value_shape(layer) for name, is_wanted in wanted.items() if is_wanted}
        return shapes | ({"difffit_A": (rank, inputs), "difffit_B": (outputs, rank)} if rank else {})

    def update_layer(self, adapter_name: str, config: DiffFitConfig, **target: Any) -> None:
        """Adds an adapter: `gamma`, `delta` and a change of `rank` as asked for (see `targets.Target`).

        It starts from γ = 1, δ = 0 and B = 0, or from random values if `config.init_weights` is False.
        """
        for kind, shape in self.shapes(self.get_base_layer(), config, **target).items():
            if not getattr(self, kind):
                setattr(self, kind, nn.ParameterDict())
            getattr(self, kind)[adapter_name] = nn.Parameter(_initial(kind, shape, config.init_weights))
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_scale(adapter_name, 1)

    def blend(self, adapter_name: str, weights: dict[str, float]) -> None:
        """Gives an adapter the values that other adapters have together at these scales."""
        for kind in self.adapter_layer_names:
            values = [_at(kind, getattr(self, kind)[n], w) for n, w in weights.items() if n in getattr(self, kind)]
            if values:
                blended = getattr(self, kind)[adapter_name].data
                blended.copy_(_padded(_compose(kind, values), blended.shape))

    def delete_adapter(self, adapter_name: str) -> None:
        self._forget_scale(adapter_name)
        super().delete_adapter(adapter_name)

    def enable_adapters(self, enabled: bool) -> None:
        """Switches the adapters on or off. What is frozen stays so: peft 0.21 makes all that are active trainable."""
        self._disable_adapters = not enabled

    def forward(self, *inputs: Any, adapter_names: list[Entry] | None = None, **kwargs: Any) -> Tensor:
        """The layer's output; with `adapter_names`, an entry per sample, see `names_in`, while none is merged."""
        x, *args = inputs or (kwargs.pop(next(iter(kwargs))),)  # models also call layers as in proj_in(input=x)
        if self.disable_adapters and self.merged:
            self.unmerge()
        if adapter_names is not None and len(x) != len(adapter_names):
            sizes = f"{len(adapter_names)} and {len(x)}"
            raise ValueError(
                f"Length of `adapter_names` should be the same as the number of inputs, but got {sizes} respectively. "
                "Give a name for each sample. If you did, the model puts tokens of all samples in one dimension, and "
                "takes no mixed batch: call it once for each adapter."
            )
        if adapter_names is not None and self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
        if self.disable_adapters or self.merged:
            return self.base_layer(x, *args, **kwargs)
        return self._adapted(x, adapter_names, *args, **kwargs)

    def _adapted(self, x: Tensor, adapter_names: list[Entry] | None, *args: Any, **kwargs: Any) -> Tensor:
        """γ ⊙ (base(x) + B A x + δ)."""
        combine: _Combine = self._composed if adapter_names is None else self._gathered
        names = self.active_adapters if adapter_names is None else adapter_names
        delta, gamma = combine("difffit_delta", names), combine("difffit_gamma", names)
        layer = self.base_layer
        plain = False
        if delta is not None and adapter_names is None and is_plain_linear(layer):
            # W x + (b + δ): the sum of two vectors rather than a pass over the activations
            plain = True
            bias, delta = delta if layer.bias is None else layer.bias + delta, None
            if gamma is not None and gamma.requires_grad and not self.difffit_A and takes_gamma(layer, x):
                dtype = layer.weight.dtype
                return LinearTimesGamma.apply(x, layer.weight, bias.to(dtype), gamma.to(dtype))
            y = linear(x, layer, bias)
        else:
            y = layer(x, *args, **kwargs)
        # in the dtype of the activations, so that a half-precision base stays at half the memory
        if self.difffit_A and (low_rank := self._low_rank(x, names, combine)) is not None:
            y = y + low_rank.to(y.dtype)
        if delta is not None:
            y = y + self._broadcast(delta.to(y.dtype), y)
        if gamma is not None:
            gamma = self._broadcast(gamma.to(y.dtype), y)
            if gamma.requires_grad and not torch.compiler.is_compiling():  # a compiler chooses itself what to keep
                return TimesGamma.apply(y, gamma)
            return y.mul_(gamma) if plain else y * gamma  # in place where y is nobody else's
        return y

    def _low_rank(self, x: Tensor, names: Sequence[Entry], combine: _Combine) -> Tensor | None:
        """B A x, or None where no adapter has it. A and B are (r, in) and (out, r), or one of each per sample."""
        A, B = combine("difffit_A", names), combine("difffit_B", names)
        if A is None or B is None:
            return None
        A, B = A.to(x.dtype), B.to(x.dtype)
        if A.dim() == 2:
            return F.linear(F.linear(x, A), B)
        return torch.einsum("b...r,bor->b...o", torch.einsum("b...i,bri->b...r", x, A), B)

    def _composed(self, kind: str, adapters: Sequence[str]) -> Tensor | None:
        """γ = Π (1 + s_i (γ_i - 1)), δ = Σ s_i δ_i, or all A_i or s_i B_i in one; None where no adapter has one."""
        values = [self._at_scale(kind, name) for name in adapters if name in getattr(self, kind)]
        return _compose(kind, values) if values else None

    def _gathered(self, kind: str, adapter_names: list[Entry]) -> Tensor | None:
        """The value of each sample's adapters, (batch, ...), or None where none of them has one."""
        composed = {entry: self._composed(kind, names_in(entry)) for entry in {*adapter_names}}
        values = {entry: value for entry, value in composed.items() if value is not None}
        if not values:
            return None
        shape = [max(sizes) for sizes in zip(*(value.shape for value in values.values()), strict=True)]  # ranks differ
        values = {entry: _padded(value, shape) for entry, value in values.items()}
        neutral = torch.full_like(next(iter(values.values())), _NEUTRAL[kind])
        return torch.stack([values.get(entry, neutral) for entry in adapter_names])

    def _at_scale(self, kind: str, adapter_name: str) -> Tensor:
        """What an adapter has of a kind, at its scale."""
        value = getattr(self, kind)[adapter_name]
        # compiled code always multiplies, so that no change of scale compiles it anew
        if not torch.compiler.is_compiling() and adapter_name not in self._scaled:
            return value
        return _at(kind, value, self.scale[adapter_name])

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Writes the active adapters, or those named, into the base layer: W' = γ(W + B A), b' = γ(b + δ).

        Adapters that are not merged have no effect from then on, also in a layer that has none of those that are: all
        layers are to be told the same names.

        Raises:
            ValueError: as `check_mergeable`, or with `safe_merge` if a merged value is not finite. The layer is then as
                it was.
        """
        names = self.active_adapters if adapter_names is None else adapter_names
        names = [name for name in names if name not in self.merged_adapters]
        held = [name for name in names if name in self._get_available_adapters()]
        if held:
            self.check_mergeable(held)
            base = self._base()
            merged = self._merged(base, [*self.merged_adapters, *held])
            dtypes = {name: tensor.dtype for name, tensor in base.items()}
            of_weight = next(iter(dtypes.values()), None)  # or of its scales, where it is quantised
            merged = {name: tensor.to(dtype=dtypes.get(name, of_weight)) for name, tensor in merged.items()}
            if safe_merge and not all(tensor.isfinite().all() for tensor in merged.values()):
                raise ValueError(f"Merging {held} gives values that are not finite: the adapter seems to be broken.")
            if merged.keys() - base.keys():
                warnings.warn(_NEW_BIAS, stacklevel=2)
            self._unmerged = {"bias": None} | base
            self._write(merged)
        self.merged_adapters = self.merged_adapters + names

    def check_mergeable(self, adapters: Sequence[str]) -> None:
        """Raises `ValueError` if another module has the same weights, or they are sharded, or quantised so that the
        adapters do not fit in."""
        layer = self.get_base_layer()
        held = [kind for kind in self.adapter_layer_names if {*adapters} & {*getattr(self, kind)}]
        of_weight = [kind for kind in ("difffit_gamma", "difffit_A") if kind in held]
        changed = [self.norm.weight if self.norm else "weight"] * bool(of_weight) + ["bias"] * bool(held)
        for name in changed:
            if name in self.tied:
                raise ValueError(
                    f"Cannot merge into {type(layer).__name__}, whose {name} is tied to {self.tied[name]}: that would "
                    "change too. Keep the adapter unmerged, or untie the two first."
                )
        if of_weight and not self.norm and is_quantised(layer) and (not row_scales(layer) or "difffit_A" in of_weight):
            raise ValueError(
                f"Cannot merge {'γ' if of_weight == ['difffit_gamma'] else 'a change of rank r'} into "
                f"{type(layer).__name__}, whose weights are quantised or sharded ({type(layer.weight.data).__name__}, "
                f"{layer.weight.dtype}): keep the adapter unmerged, or load the base in a floating point type first."
            )

    def unmerge(self) -> None:
        """Puts the base layer's own tensors back, to the last bit."""
        self._write(self._unmerged)
        self._unmerged, self.merged_adapters = {}, []

    def _base(self) -> dict[str, Tensor]:
        """The base layer's own weight and, where it has one, bias, also while adapters are merged.

        In the place of a quantised weight are copies of its scales.
        """
        layer = self.get_base_layer()
        name = self.norm.weight if self.norm else "weight"
        weight = {name: getattr(layer, name)}
        if not self.norm and is_quantised(layer):
            weight = {name: scales.clone() for name, scales in row_scales(layer).items()}
        tensors = self._unmerged or weight | {"bias": getattr(layer, "bias", None)}
        return {name: tensor.detach() for name, tensor in tensors.items() if tensor is not None}

    def _merged(self, base: dict[str, Tensor], adapters: list[str]) -> dict[str, Tensor]:
        """W' = γ(W + B A), b' = γ(b + δ), in float32 or better; without what does not change.

        A norm that multiplies by 1 + W gets W' = γ(1 + W) - 1.
        """
        layer = self.get_base_layer()
        gamma, delta = self._composed("difffit_gamma", adapters), self._composed("difffit_delta", adapters)
        A, B = self._composed("difffit_A", adapters), self._composed("difffit_B", adapters)
        base = {name: tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for name, tensor in base.items()}
        merged = {}
        if A is not None and B is not None:
            merged["weight"] = base["weight"] = base["weight"] + (B @ A).detach()
        if delta is not None:
            merged["bias"] = base["bias"] = base.get("bias", 0) + delta.detach()
        if gamma is not None:
            gamma = gamma.detach()
            if self.norm:
                name, one = self.norm.weight, self.norm.added
                merged = {"bias": gamma * base["bias"]} if "bias" in base else {}
                return merged | {name: gamma * (one + base[name]) - one}
            if isinstance(layer, Conv1D):  # holds its weight transposed
                return {name: tensor * gamma for name, tensor in base.items()}
            merged = {name: scaled(tensor, gamma) for name, tensor in base.items()}
        return merged

    def _write(self, tensors: Mapping[str, Tensor | None]) -> None:
        layer = self.get_base_layer()
        for name, tensor in tensors.items():
            if tensor is None or (name == "bias" and layer.bias is None):  # the bias of a layer that has none itself
                if getattr(layer, name, None) is not tensor:
                    layer.bias = tensor if tensor is None else nn.Parameter(tensor, requires_grad=False)
            elif name in (self.norm.weight if self.norm else "weight", "bias"):
                parameter = getattr(layer, name)
                parameter.data = tensor.to(parameter.device, parameter.dtype)
            else:
                row_scales(layer)[name].copy_(tensor)

    def _broadcast(self, value: Tensor, y: Tensor) -> Tensor:
        """A view of `value`, one per channel or one per sample and channel, that broadcasts to `y`.

        Channels come last, or, in convolutions and some norms, before the dimensions of space.
        """
        layer = self.get_base_layer()
        shape, space = self._value_shape, 0
        if isinstance(layer, (*CONVOLUTIONS, *CHANNELS_FIRST_NORMS)):
            space = len(layer.kernel_size) if isinstance(layer, CONVOLUTIONS) else y.dim() - 2
        samples = value.shape[: value.dim() - len(shape)]
        between = [1] * (y.dim() - len(shape) - space - 1) if samples else []
        return value.view(*samples, *between, *shape, *[1] * space)


def _initial(kind: str, shape: tuple[int, ...], neutral: bool) -> Tensor:
    """Where training starts: an adapter that does nothing or, if not `neutral`, a random one."""
    if kind == "difffit_A":  # as in LoRA: what is 0 at the start is B
        return torch.empty(shape).uniform_(-1, 1) / shape[1] ** 0.5
    if neutral:
        return torch.full(shape, _NEUTRAL[kind])
    return torch.rand(shape) + 0.5 if kind == "difffit_gamma" else torch.randn(shape)


def _at(kind: str, value: Tensor, scale: Tensor | float) -> Tensor:
    """1 + s (γ - 1), s δ or s B: nothing of an adapter at s = 0, all of it at s = 1. A stays as it is."""
    return value if kind == "difffit_A" else _NEUTRAL[kind] + scale * (value - _NEUTRAL[kind])


def _compose(kind: str, values: list[Tensor]) -> Tensor:
    """The product of γ, the sum of δ; A one below the other and B one beside the other, so that B A is a sum too."""
    if kind in ("difffit_A", "difffit_B"):
        return torch.cat(values, dim=0 if kind == "difffit_A" else 1) if len(values) > 1 else values[0]
    return reduce(torch.mul if kind == "difffit_gamma" else torch.add, values)


def _padded(value: Tensor, shape: Sequence[int]) -> Tensor:
    """`value` with zeros after it in each dimension, up to `shape`: in A and B, a higher rank with the same product."""
    missing = [size - have for size, have in zip(shape, value.shape, strict=True)]
    return F.pad(value, [n for size in reversed(missing) for n in (0, size)]) if any(missing) else value
