"""DeepSpeed-Ulysses (Jacobs et al. 2023): outside attention a rank holds some tokens of every head, inside
it every token of some heads. One all-to-all goes in, one comes out.

Each rank sends (n-1)/n of its queries, keys, values and outputs, which shrinks with n where a ring's bytes
do not; but n cannot exceed the heads. Where n is more than the kv heads, each is sent to all ranks whose
queries read it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from trainsys.comm.group import AxisGroup
from trainsys.comm.ops import nbytes


def spread_heads(q: Tensor, k: Tensor, v: Tensor, g: AxisGroup) -> tuple[Tensor, Tensor, Tensor]:
    """``[B, s, H, Dh]`` -> ``[B, n s, H/n, Dh]``, tokens in group order; keys and values likewise."""
    n = g.size
    copies = max(1, n // k.shape[2])
    if copies > 1:
        # Kv head j serves the queries of ranks j n/K to (j+1) n/K; their gradients sum in backward.
        k, v = k.repeat_interleave(copies, dim=2), v.repeat_interleave(copies, dim=2)
    heads = [x.shape[2] // n for x in (q, k, v)]
    # All three in one message: [n, B, s, heads of one rank, Dh].
    by_rank = [x.unflatten(2, (n, h)).movedim(2, 0) for x, h in zip((q, k, v), heads, strict=True)]
    mine = all_to_all(torch.cat(by_rank, dim=3), g)
    whole = mine.movedim(0, 1).flatten(1, 2)
    q, k, v = whole.split(heads, dim=2)
    return q, k, v


def spread_tokens(out: Tensor, g: AxisGroup) -> Tensor:
    """The way back: ``[B, n s, H/n, Dh]`` -> ``[B, s, H, Dh]``."""
    mine = all_to_all(out.unflatten(1, (g.size, -1)).movedim(1, 0), g)
    return mine.movedim(0, 2).flatten(2, 3)


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, g: AxisGroup) -> Tensor:
        ctx.g = g
        return _swap(x, g)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _swap(grad, ctx.g), None


def _swap(x: Tensor, g: AxisGroup) -> Tensor:
    x = x.contiguous()
    out = torch.empty_like(x)
    with g.ledger.span(g.axis, "all_to_all", nbytes(x) * (g.size - 1) // g.size):
        dist.all_to_all_single(out.view(-1), x.view(-1), group=g.group)
    return out


@torch.compiler.disable
def all_to_all(x: Tensor, g: AxisGroup) -> Tensor:
    """Slice i of dim 0 goes to rank i, which puts it at this rank's place; its own backward."""
    return _AllToAll.apply(x, g)
