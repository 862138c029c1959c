"""The layers that γ and δ go on, and the shapes of those."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .low_precision import LowPrecisionLinear
from .norms import is_norm, norm_of
from .quantised_weights import is_quantised

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def is_supported(layer: nn.Module) -> bool:
    """Whether γ and δ can be put on the output of `layer`, and merged into it."""
    return isinstance(layer, (nn.Linear, Conv1D, *CONVOLUTIONS)) or is_norm(layer)


def takes_bias(layer: nn.Module) -> bool:
    """Whether `layer` computes with its `bias` wherever that is not None. Norms are left as they are."""
    return "bias" in layer._parameters and not is_norm(layer)


def is_plain_linear(layer: nn.Module) -> bool:
    """Whether to call `layer` is to multiply by its weight and add its bias, and nothing else."""
    return (
        type(layer) in (nn.Linear, LowPrecisionLinear)
        and "forward" not in layer.__dict__  # where Accelerate and Diffusers put what they wrap around it
        and not (layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks)
    )


def linear(x: Tensor, layer: nn.Module, bias: Tensor) -> Tensor:
    """A plain linear layer's product, with another bias."""
    if isinstance(layer, LowPrecisionLinear):
        return layer.product(x, bias)
    return F.linear(x, layer.weight, bias.to(layer.weight.dtype))


def takes_gamma(layer: nn.Module, x: Tensor) -> bool:
    """Whether γ costs a training step less on the rows of a plain linear layer's weight than on all tokens' outputs.

    The weight is frozen then, and no larger than they are. A compiler chooses itself what is computed when.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    if type(layer) is not nn.Linear or is_quantised(layer):
        return False
    return not layer.weight.requires_grad and x.numel() > layer.in_features**2


class PlacedModules:
    """Puts modules where a layer of an adapter was or is to be, for the PEFT tuner that is the next base class.

    PEFT sets `weight` on what is not an adapter's layer (peft 0.21), which others call otherwise, or do not have.
    """

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if hasattr(new_module, "base_layer") or "weight" in new_module._parameters:
            super()._replace_module(parent, child_name, new_module, child)  # type: ignore[misc]
        else:
            setattr(parent, child_name, new_module)


def value_shape(layer: nn.Module) -> tuple[int, ...]:
    """The shape of γ and δ."""
    norm = norm_of(layer)
    return tuple(getattr(layer, norm.weight).shape) if norm else (features(layer)[1],)


def features(layer: nn.Module) -> tuple[int, int]:
    """Channels of a layer's input and output."""
    if isinstance(layer, CONVOLUTIONS):
        return layer.in_channels, layer.out_channels
    if isinstance(layer, nn.Embedding):
        return layer.num_embeddings, layer.embedding_dim
    if isinstance(layer, Conv1D):
        return layer.nx, layer.nf
    if norm := norm_of(layer):
        return (getattr(layer, norm.weight).numel(),) * 2
    return layer.in_features, layer.out_features
