"""γ ⊙ y as a function of autograd that keeps less for the backward pass than a product does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class TimesGamma(torch.autograd.Function):
    """γ ⊙ y, which keeps its output for the backward pass, as what follows does anyway, and not y beside it.

    The gradient of γ, Σ grad ⊙ y, is Σ grad ⊙ output / γ. That of a γ which is exactly 0 is taken to be 0. Autograd
    knows every operation in it, so there are second derivatives. Forward-mode AD and `torch.func` work too.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(y: Tensor, gamma: Tensor) -> Tensor:
        return y * gamma

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        y, gamma = inputs
        ctx.save_for_backward(output, gamma)
        ctx.save_for_forward(y, gamma)  # which ends with the forward pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor]:
        output, gamma = ctx.saved_tensors
        of_gamma = (grad * output).sum_to_size(gamma.shape) / gamma.masked_fill(gamma == 0, 1)
        return grad * gamma if ctx.needs_input_grad[0] else None, of_gamma

    @staticmethod
    def jvp(ctx: Any, y_tangent: Tensor | None, gamma_tangent: Tensor | None) -> Tensor:
        y, gamma = ctx.saved_tensors
        tangents = [a * b for a, b in ((y_tangent, gamma), (y, gamma_tangent)) if a is not None and b is not None]
        return sum(tangents[1:], tangents[0])
