"""Weight gradients that are computed later than the gradients they come with.

Zero-bubble schedules (Qi et al. 2024) split backward in two. Here the second half is a list of closures, as
in their own code and in DualPipe's: while the stage defers, a linear's backward computes the gradient of its
input and keeps (input, gradient of its output); `run` multiplies them. Everything else, biases and norms
and the embedding, is done in the first half, where it costs next to nothing.

``torch.distributed.pipelining`` walks the autograd graph in Python for each micro-batch instead, keeps all of it
until the second half, and runs recomputation twice; this frees the graph at once and costs microseconds.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from trainsys.models.decoder import Decoder
from trainsys.models.layers import Linear, TiedHead

Owed = list[tuple[Tensor, Tensor, Tensor]]
"""(weight, the linear's input, the gradient of its output)"""


class WeightGradients:
    """What one stage owes. ``defer`` is set around a backward whose weight gradients are to come later."""

    def __init__(self) -> None:
        self.defer: Owed | None = None

    def apply(self, model: Decoder) -> None:
        """Make every linear of ``model`` ask this object, but for one whose forward somebody else has replaced."""
        for module in model.modules():
            if "forward" in vars(module):
                continue
            if isinstance(module, Linear):
                # `forward` is replaced and not the module, so that names and hooks stay.
                module.forward = partial(_linear_forward, self, module)  # type: ignore[method-assign]
            elif isinstance(module, TiedHead):
                module.forward = partial(_linear, self)  # type: ignore[method-assign]


def run(owed: Owed) -> None:
    """Compute and accumulate what is owed, the last layer's first, and forget it."""
    with torch.no_grad():
        for weight, x, grad in owed:
            product = (grad.flatten(0, -2).T @ x.flatten(0, -2)).to(weight.dtype)
            if weight.grad is None:
                weight.grad = product
            else:
                weight.grad += product
    owed.clear()


def _linear_forward(gradients: WeightGradients, module: Linear, x: Tensor) -> Tensor:
    out = _linear(gradients, x, module.weight)
    return out if module.bias is None else out + module.bias.to(x.dtype)


def _linear(gradients: WeightGradients, x: Tensor, weight: nn.Parameter) -> Tensor:
    return _Linear.apply(x, weight, gradients)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, gradients: WeightGradients) -> Tensor:
        ctx.save_for_backward(x)
        # Not saved as x is: recomputation would hand back a detached copy, whose gradient nobody reads.
        ctx.weight, ctx.gradients = weight, gradients
        return x @ weight.to(x.dtype).T

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        (x,), weight = ctx.saved_tensors, ctx.weight
        dx = grad @ weight.to(grad.dtype)
        owed = ctx.gradients.defer
        if owed is not None:
            owed.append((weight, x, grad))
            return dx, None, None
        return dx, (grad.flatten(0, -2).T @ x.flatten(0, -2)).to(weight.dtype), None
