"""Merging into quantised weights. γ multiplies the rows of a weight, and so do the scales that it is stored with: a
merge multiplies those. Nothing is quantised anew, so what is merged is exact up to the rounding of the scales."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .low_precision import LowPrecisionLinear


def is_quantised(layer: nn.Module) -> bool:
    """Whether the layer's weight is not a plain floating point tensor: quantised, or sharded."""
    return type(layer.weight.data) is not Tensor or not layer.weight.is_floating_point()


def row_scales(layer: nn.Module) -> dict[str, Tensor]:
    """The tensors that the rows of a quantised weight are proportional to. Empty where there are none known.

    The size of their first dimension is a multiple of the number of rows, and what belongs to one row lies together.
    They are those of torchao's int8 (0.18), optimum-quanto's int8 and int4 (0.2.7), bitsandbytes' int8 (0.50) and
    `low_precision`.
    """
    weight: Any = layer.weight.data
    kind = type(weight).__name__
    if kind == "Int8Tensor" and weight.block_size[0] == 1:  # (q - zero point) · scale
        return {"scale": weight.scale}
    if kind == "WeightQBytesTensor" and weight.axis == 0:  # q · scale
        return {"_scale": weight._scale}
    if kind == "WeightQBitsTensor" and weight.axis == 0 and weight._shift.is_floating_point():  # q · scale - shift
        return {"_scale": weight._scale, "_shift": weight._shift}
    if isinstance(layer, LowPrecisionLinear):  # q · scale
        return {"scale": layer.scale}
    if type(layer).__name__ == "Linear8bitLt":  # q · SCB / 127; the first forward moves SCB to the layer's state
        scales = layer.state.SCB if layer.weight.SCB is None else layer.weight.SCB
        return {} if scales is None else {"SCB": scales}
    return {}


def scaled(rows: Tensor, gamma: Tensor) -> Tensor:
    """Rows of a weight, scales of rows or a bias, (rows, ...), times γ, in float32 or better."""
    factors = gamma.repeat_interleave(len(rows) // len(gamma)).view(-1, *[1] * (rows.dim() - 1))
    return rows.to(torch.promote_types(rows.dtype, torch.float32)) * factors.to(rows.device)
