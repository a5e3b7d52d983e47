"""A block of attention as the plain rectangles it consists of, one kernel call each."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from trainsys.ops.attention_partial import wide
from trainsys.ops.attention_rule import Band, Block, Plain

TILE = 512
"""Queries of a band whose mask is made: of ``TILE x (TILE + window)`` pairs, whatever the length of the row."""
NEVER = float("-inf")

Forward = Callable[[Tensor, Tensor, Tensor, Plain | Band], tuple[Tensor, Tensor]]
Backward = Callable[
    [Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Plain | Band], tuple[Tensor, Tensor, Tensor]
]


def forward_pieces(
    run: Forward, q: Tensor, k: Tensor, v: Tensor, block: Block, tile: int | None = TILE
) -> tuple[Tensor, Tensor]:
    """``out [B, S, H, Dh]`` and ``lse [B, H, S]``, 0 and -inf where a query sees nothing."""
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    lse = torch.full((q.shape[0], q.shape[2], q.shape[1]), NEVER, dtype=wide(q), device=q.device)
    for p in block.pieces(tile):
        found, its_lse = run(q[p.rows, p.q], k[p.rows, p.k], v[p.rows, p.k], p.sees)
        out[p.rows, p.q] = found
        lse[p.rows, :, p.q] = its_lse
    return out, lse


def backward_pieces(
    run: Backward,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    block: Block,
    tile: int | None = TILE,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v through these keys."""
    pieces = block.pieces(tile)
    # Keys of a band are in several of its tiles, whose gradients must not round as they add up.
    total = wide(k) if any(isinstance(p.sees, Band) for p in pieces) else k.dtype
    dq = torch.zeros_like(q, memory_format=torch.contiguous_format)
    dk, dv = (torch.zeros_like(x, dtype=total, memory_format=torch.contiguous_format) for x in (k, v))
    for p in pieces:
        found = run(
            dout[p.rows, p.q], q[p.rows, p.q], k[p.rows, p.k], v[p.rows, p.k],
            out[p.rows, p.q], lse[p.rows, :, p.q], p.sees,
        )  # fmt: skip
        dq[p.rows, p.q] = found[0]
        dk[p.rows, p.k] += found[1]
        dv[p.rows, p.k] += found[2]
    return dq, dk.to(k.dtype), dv.to(v.dtype)
