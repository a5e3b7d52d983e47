"""A token-wise module run a piece of the sequence at a time, in backward too (StreamBP, Luo et al. 2025).

The feed-forward of a block keeps four activations of its hidden size a token. Streamed, it keeps its input
alone; backward runs each piece forward again and straight back, so hidden activations of one piece exist at a
time. The gradient is exact: tokens do not meet in a feed-forward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from trainsys.ops.attention_partial import wide


def stream_tokens(module: nn.Module, tokens: int) -> None:
    """Make ``module.forward(x [B, S, D]) -> [B, S, D]`` work on ``tokens`` positions of each row at a time.

    Only for a module in which positions do not meet.
    """
    whole = module.forward
    module.forward = lambda x: _Streamed.apply(  # type: ignore[method-assign]  # names and hooks stay
        x, whole, tokens, *module.parameters()
    )


class _Streamed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, run: Callable[[Tensor], Tensor], tokens: int, *parameters: nn.Parameter
    ) -> Tensor:
        ctx.save_for_backward(x, *parameters)
        ctx.run, ctx.tokens = run, tokens
        return torch.cat([run(piece) for piece in x.split(tokens, dim=1)], dim=1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *parameters = ctx.saved_tensors
        d_x = torch.empty_like(x)
        # Pieces add up in fp32, as they would inside one product.
        sums: list[Tensor] = [torch.zeros_like(p, dtype=wide(p)) for p in parameters]
        for start in range(0, x.shape[1], ctx.tokens):
            piece = slice(start, start + ctx.tokens)
            part = x[:, piece].detach().requires_grad_()
            with torch.enable_grad():
                out = ctx.run(part)
            found = torch.autograd.grad(out, [part, *parameters], grad[:, piece])
            d_x[:, piece] = found[0]
            for total, g in zip(sums, found[1:], strict=True):
                total += g
        return (d_x, None, None, *(total.to(p.dtype) for total, p in zip(sums, parameters, strict=True)))
