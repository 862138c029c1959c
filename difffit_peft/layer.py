"""The whole method in one layer: y = γ ⊙ (base(x) + δ)."""

from __future__ import annotations

import warnings
from functools import reduce
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .config import DiffFitConfig

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_CHANNELS_FIRST_NORMS = (nn.GroupNorm, nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)


def is_norm(layer: nn.Module) -> bool:
    """Whether `layer` is a norm with affine parameters: a scale, and maybe a bias, of the shape of a channel."""
    return "Norm" in type(layer).__name__ and isinstance(getattr(layer, "weight", None), Tensor)


def is_supported(layer: nn.Module) -> bool:
    """Whether γ and δ can be put on the output of `layer`, and merged into it."""
    return isinstance(layer, (nn.Linear, Conv1D, *_CONVOLUTIONS)) or is_norm(layer)


class DiffFitLayer(nn.Module, BaseTunerLayer):
    """Puts γ and δ, one value per output channel each, on the output of a frozen layer.

        y = γ ⊙ (base(x) + δ)

    δ moves the layer's bias and γ scales its output (Xie et al. 2023, section 3.2). For a norm they *are* its affine
    parameters, so that a norm needs no layer of its own. Not every layer has both. The base layer is never written
    to, but while merged: then `weight` is γ·weight and `bias` is γ·(bias + δ), and the originals are kept aside.

    Several active adapters i with strengths s_i compose in any order, in the forward pass as in a merge:

        γ = Π (1 + s_i (γ_i - 1))        δ = Σ s_i δ_i

    Shapes: `difffit_gamma[name]` and `difffit_delta[name]` are (out channels,), or the shape of a norm's weight.
    """

    adapter_layer_names = ("difffit_gamma", "difffit_delta")

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = _features(self.get_base_layer())
        self.difffit_gamma = nn.ParameterDict()
        self.difffit_delta = nn.ParameterDict()
        self.strength: dict[str, Tensor] = {}  # 0-dim, for adapters whose strength is not 1
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._active_adapter: str | list[str] = []
        self._unmerged: dict[str, Tensor] = {}  # the base's own tensors while adapters are merged

    def update_layer(self, adapter_name: str, config: DiffFitConfig, gamma: bool, delta: bool) -> None:
        """Adds an adapter: γ and δ as asked for, from γ = 1 and δ = 0, or random if `config.init_weights` is False."""
        shape = self._parameter_shape()
        if gamma:
            value = torch.ones(shape) if config.init_weights else torch.rand(shape) + 0.5
            self.difffit_gamma[adapter_name] = nn.Parameter(value)
        if delta:
            value = torch.zeros(shape) if config.init_weights else torch.randn(shape)
            self.difffit_delta[adapter_name] = nn.Parameter(value)
        self._move_adapter_to_device_of_base_layer(adapter_name)

    def set_strength(self, adapter_name: str, strength: float) -> None:
        """Scales an adapter's effect: 0 is the base, 1 the adapter."""
        self.strength[adapter_name] = torch.tensor(float(strength))

    def delete_adapter(self, adapter_name: str) -> None:
        self.strength.pop(adapter_name, None)
        super().delete_adapter(adapter_name)

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        """The layer's output; with `adapter_names`, one adapter (or "__base__") per sample of the batch.

        Raises:
            ValueError: if there are not as many adapters as samples, or adapters are merged.
        """
        if self.disable_adapters and self.merged:
            self.unmerge()
        if adapter_names is not None:
            self._check_adapter_names(x, adapter_names)
        y = self.base_layer(x, *args, **kwargs)
        return y if self.disable_adapters or self.merged else self._adapt(y, x, adapter_names)

    def _adapt(self, y: Tensor, x: Tensor, adapter_names: list[str] | None) -> Tensor:
        """γ ⊙ (y + δ) for the base layer's output y at input x."""
        if adapter_names is None:
            delta, gamma = self.composed_delta(self.active_adapters), self.composed_gamma(self.active_adapters)
        else:  # (batch, channels)
            delta = self._gathered(self.difffit_delta, adapter_names, 0)
            gamma = self._gathered(self.difffit_gamma, adapter_names, 1)
        # in the dtype of the activations, so that a half-precision base stays at half the memory
        if delta is not None:
            y = y + self._broadcast(delta.to(y.dtype), y)
        if gamma is not None:
            y = y * self._broadcast(gamma.to(y.dtype), y)
        return y

    def composed_gamma(self, adapters: list[str]) -> Tensor | None:
        """γ = Π (1 + s_i (γ_i - 1)), or None where no adapter has one."""
        gammas = [self._at_strength(self.difffit_gamma, name, 1) for name in adapters if name in self.difffit_gamma]
        return reduce(torch.mul, gammas) if gammas else None

    def composed_delta(self, adapters: list[str]) -> Tensor | None:
        """δ = Σ s_i δ_i, or None where no adapter has one."""
        deltas = [self._at_strength(self.difffit_delta, name, 0) for name in adapters if name in self.difffit_delta]
        return reduce(torch.add, deltas) if deltas else None

    def _at_strength(self, values: nn.ParameterDict, adapter_name: str, neutral: int) -> Tensor:
        """neutral + s (value - neutral): nothing of an adapter at s = 0, all of it at s = 1."""
        value = values[adapter_name]
        if adapter_name not in self.strength:
            return value
        return neutral + self.strength[adapter_name] * (value - neutral)

    def _gathered(self, values: nn.ParameterDict, adapter_names: list[str], neutral: int) -> Tensor | None:
        """The value of each sample's adapter, (batch, ...), or None where none of them has one."""
        at_strength = {name: self._at_strength(values, name, neutral) for name in {*adapter_names} if name in values}
        if not at_strength:
            return None
        missing = torch.full_like(next(iter(at_strength.values())), neutral)
        return torch.stack([at_strength.get(name, missing) for name in adapter_names])

    def _check_adapter_names(self, x: Tensor, adapter_names: list[str]) -> None:
        if len(x) != len(adapter_names):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(x)} respectively."
            )
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Writes the active adapters, or those named, into the base layer: W' = γW, b' = γ(b + δ).

        Raises:
            ValueError: if the base's weights are quantised, or with `safe_merge` if a merged value is not finite. The
                layer is then as it was.
        """
        names = check_adapters_to_merge(self, adapter_names)
        names = [name for name in names if name in self._get_available_adapters()]
        if not names:
            return
        layer = self.get_base_layer()
        if not layer.weight.is_floating_point():
            raise ValueError(
                f"Cannot merge into {type(layer).__name__} with weights of {layer.weight.dtype}: "
                "dequantise the base first, or keep the adapter unmerged."
            )
        base = self._unmerged or self._base_tensors(layer)
        merged = {
            name: tensor.to(base[name].dtype)
            for name, tensor in self._merged(base, self.merged_adapters + names).items()
        }
        if safe_merge and not all(tensor.isfinite().all() for tensor in merged.values()):
            raise ValueError(f"Merging {names} gives values that are not finite: the adapter seems to be broken.")
        self._unmerged = base
        self._write(layer, merged)
        self.merged_adapters = self.merged_adapters + names

    def unmerge(self) -> None:
        """Puts the base layer's own tensors back, to the last bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self._write(self.get_base_layer(), self._unmerged)
        self._unmerged, self.merged_adapters = {}, []

    def _merged(self, base: dict[str, Tensor], adapters: list[str]) -> dict[str, Tensor]:
        """W' = γW, b' = γ(b + δ), in float32."""
        layer = self.get_base_layer()
        gamma, delta = self.composed_gamma(adapters), self.composed_delta(adapters)
        merged = {name: tensor.float() for name, tensor in base.items()}
        if delta is not None:
            merged["bias"] = merged["bias"] + delta.detach().float()
        if gamma is not None:
            gamma = gamma.detach().float()
            trailing = 0 if is_norm(layer) or isinstance(layer, Conv1D) else layer.weight.dim() - 1
            merged["weight"] = merged["weight"] * gamma.view(*gamma.shape, *[1] * trailing)
            if "bias" in merged:
                merged["bias"] = merged["bias"] * gamma
        return merged

    @staticmethod
    def _base_tensors(layer: nn.Module) -> dict[str, Tensor]:
        tensors = {"weight": layer.weight, "bias": getattr(layer, "bias", None)}
        return {name: tensor.data for name, tensor in tensors.items() if tensor is not None}

    @staticmethod
    def _write(layer: nn.Module, tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            parameter = getattr(layer, name)
            parameter.data = tensor.to(parameter.device)

    def _parameter_shape(self) -> tuple[int, ...]:
        layer = self.get_base_layer()
        return tuple(layer.weight.shape) if is_norm(layer) else (self.out_features,)

    def _broadcast(self, value: Tensor, y: Tensor) -> Tensor:
        """A view of `value`, one per channel or one per sample and channel, that broadcasts to `y`.

        Channels come last, or, in convolutions and some norms, before the dimensions of space.
        """
        layer = self.get_base_layer()
        shape = self._parameter_shape()
        space = 0
        if isinstance(layer, _CONVOLUTIONS):
            space = len(layer.kernel_size)
        elif isinstance(layer, _CHANNELS_FIRST_NORMS):
            space = y.dim() - 2
        samples = value.shape[: value.dim() - len(shape)]
        between = [1] * (y.dim() - len(shape) - space - 1) if samples else []
        return value.view(*samples, *between, *shape, *[1] * space)


def _features(layer: nn.Module) -> tuple[int, int]:
    """Channels of a layer's input and output."""
    if isinstance(layer, _CONVOLUTIONS):
        return layer.in_channels, layer.out_channels
    if isinstance(layer, nn.Embedding):
        return layer.num_embeddings, layer.embedding_dim
    if isinstance(layer, Conv1D):
        return layer.nx, layer.nf
    if is_norm(layer):
        return layer.weight.numel(), layer.weight.numel()
    return layer.in_features, layer.out_features
