"""γ ⊙ y as functions of autograd that keep less for the backward pass than a product does, and compute less.

They keep their output, as what follows does anyway, and not y beside it: the gradient of γ, Σ grad ⊙ y, is
Σ grad ⊙ output / γ. So that this holds for a γ of exactly 0 too, such a one is taken to be one that changes no sum
(`_nonzero`). Autograd knows every operation in them, so there are second derivatives. Forward-mode AD and `torch.func`
work too.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def _nonzero(gamma: Tensor) -> Tensor:
    """γ with 2^-60 in the place of 0, or in float16 the smallest normal number: a power of 2, which rounds nothing."""
    return gamma + (gamma == 0).to(gamma.dtype) * max(2**-60, torch.finfo(gamma.dtype).tiny)


def _of_gamma(grad: Tensor, output: Tensor, gamma: Tensor) -> Tensor:
    return (grad * output).sum_to_size(gamma.shape) / gamma


class TimesGamma(torch.autograd.Function):
    """γ ⊙ y."""

    generate_vmap_rule = True

    @staticmethod
    def forward(y: Tensor, gamma: Tensor) -> Tensor:
        return y * _nonzero(gamma)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        y, gamma = inputs
        ctx.save_for_backward(output, gamma)
        ctx.save_for_forward(y, gamma)  # which ends with the forward pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor]:
        output, gamma = ctx.saved_tensors
        gamma = _nonzero(gamma)
        return grad * gamma if ctx.needs_input_grad[0] else None, _of_gamma(grad, output, gamma)

    @staticmethod
    def jvp(ctx: Any, y_tangent: Tensor | None, gamma_tangent: Tensor | None) -> Tensor:
        y, gamma = ctx.saved_tensors
        return _sum((y_tangent, gamma), (y, gamma_tangent))


class LinearTimesGamma(torch.autograd.Function):
    """γ ⊙ (W x + b) for a frozen W: its rows are scaled, in both passes, in the place of all tokens' channels."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor, gamma: Tensor) -> Tensor:
        gamma = _nonzero(gamma)
        return F.linear(x, weight * gamma.unsqueeze(-1), bias * gamma)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor], output: Tensor) -> None:
        _, weight, bias, gamma = inputs
        ctx.save_for_backward(output, weight, gamma)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor, Tensor]:
        output, weight, gamma = ctx.saved_tensors
        gamma = _nonzero(gamma)
        of_x = grad @ (weight * gamma.unsqueeze(-1)).to(grad.dtype) if ctx.needs_input_grad[0] else None
        return of_x, None, grad.sum_to_size(gamma.shape) * gamma, _of_gamma(grad, output, gamma)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        x, weight, bias, gamma = ctx.saved_tensors
        of_x, of_weight, of_bias, of_gamma = tangents
        y = None if of_gamma is None else F.linear(x, weight, bias)
        moved = None if of_x is None else F.linear(of_x, weight)
        turned = None if of_weight is None else F.linear(x, of_weight)
        tangent = _sum((moved, gamma), (turned, gamma), (of_bias, gamma), (y, of_gamma))
        return tangent.expand(*x.shape[:-1], len(gamma))


def _sum(*products: tuple[Tensor | None, Tensor | None]) -> Tensor:
    """Of those products of which both factors are there."""
    terms = [a * b for a, b in products if a is not None and b is not None]
    return sum(terms[1:], terms[0])
