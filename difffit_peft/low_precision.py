"""Frozen linear layers in int8 or fp8: half of bf16's memory, and products of matrices in that precision.

Their input is quantised when they are called, a scale for each row (token), and so is the gradient of their output in
the backward pass. Both products are then of int8 with int8, or fp8 with fp8 (`torch._int_mm`, `torch._scaled_mm`), and
nothing of the weight is kept in a higher precision between the two. Such a layer gives no gradient of its weight.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
MULTIPLE = 16  # of the channels that a GPU's products of fp8 take; of int8, 8
_LEAST_ROWS = 17  # that a GPU's product of int8 takes


class LowPrecisionLinear(nn.Linear):
    """A frozen copy of a linear layer, W ≈ scale ⊙ q with a scale for each row of W.

    Args:
        linear: the layer. Its bias is shared, and kept in its dtype.
        precision: "int8" or "fp8", which is float8_e4m3fn.
    """

    def __init__(self, linear: nn.Linear, precision: str) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        self.precision, self.dtype = precision, linear.weight.dtype  # of what it computes from and gives
        quantised, scale = _quantised(linear.weight.detach(), DTYPES[precision])
        # fp8 as bits, too: it is stored here, not computed with, and most operations do not know it
        self.weight = nn.Parameter(quantised.view(torch.int8), requires_grad=False)
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.bias)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """W x + bias, with another bias than the layer's own."""
        rows = x.to(self.dtype).reshape(-1, self.in_features)
        y = _Product.apply(rows, self.weight.view(DTYPES[self.precision]), self.scale)
        y = y if bias is None else y.add_(bias.to(y.dtype))
        return y.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, precision={self.precision}"


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(weight, scale)
        rows, of_rows = _quantised(x, weight.dtype)
        return _matmul(rows, weight.t()).float().mul_(of_rows).mul_(scale.t()).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        weight, scale = ctx.saved_tensors
        rows, of_rows = _quantised(grad * scale.t(), weight.dtype)
        return _matmul(rows, weight).float().mul_(of_rows).to(grad.dtype), None, None


def _quantised(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Numbers of `dtype` and a scale for each row, (rows, 1) in float32, whose product is `x`."""
    largest = 127 if dtype == torch.int8 else torch.finfo(dtype).max
    scale = x.abs().amax(dim=1, keepdim=True).float().clamp_min(1e-12) / largest
    x = x / scale  # in float32, as the scale is
    return (x.round_() if dtype == torch.int8 else x.clamp_(-largest, largest)).to(dtype), scale


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """The product of two matrices of int8 or fp8, exact in int32 or accumulated in float32."""
    if a.dtype == torch.int8:
        missing = _LEAST_ROWS - len(a) if a.is_cuda else 0
        return torch._int_mm(F.pad(a, (0, 0, 0, missing)), b)[: len(a)] if missing > 0 else torch._int_mm(a, b)
    one = torch.ones((), device=a.device)
    # the second one column by column, as a GPU takes it
    return torch._scaled_mm(a, b.t().contiguous().t(), one, one, out_dtype=torch.bfloat16)
