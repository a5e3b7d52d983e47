"""The CUDA back ends: FlashAttention-2 for half precision, the memory-efficient kernel else.

Both are the ops behind ``scaled_dot_product_attention``, called directly because that returns no log-sum-exp and
its autograd could not take the whole row's. Neither draws random numbers: dropout is 0.

Flash knows grouped heads, windows, and sequences of different lengths laid end to end (the op behind
``torch.nn.attention.varlen``): the documents of all rows are one call, which computes what they hold.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from trainsys.ops.attention_kernels import as_bias
from trainsys.ops.attention_pieces import NEVER, backward_pieces, forward_pieces
from trainsys.ops.attention_rule import Band, Block, Plain, Visible

aten = torch.ops.aten


class CudaKernel:
    """Chooses by what each kernel can do: flash knows fp16 and bf16, and head sizes in eights to 256."""

    fixed_shapes = False

    def forward(self, q: Tensor, k: Tensor, v: Tensor, visible: Visible) -> tuple[Tensor, Tensor]:
        if not _flash_serves(q):
            if isinstance(visible, Block):
                return forward_pieces(_efficient, q, k, v, visible)
            return _efficient(q, k, v, visible)
        if not isinstance(visible, Block):
            return _flash(q, k, v, visible)
        if visible.q == visible.k:
            return _varlen(q, k, v, visible)
        # Of two spans apart only a document that reaches from one into the other is seen: a rectangle a row.
        return forward_pieces(_flash, q, k, v, visible, tile=None)

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, visible: Visible
    ) -> tuple[Tensor, Tensor, Tensor]:
        lse = lse.masked_fill(lse == NEVER, 0.0)
        if not _flash_serves(q):
            if isinstance(visible, Block):
                return backward_pieces(_efficient_backward, dout, q, k, v, out, lse, visible)
            return _efficient_backward(dout, q, k, v, out, lse, visible)
        if not isinstance(visible, Block):
            return _flash_backward(dout, q, k, v, out, lse, visible)
        if visible.q == visible.k:
            return _varlen_backward(dout, q, k, v, out, lse, visible)
        return backward_pieces(_flash_backward, dout, q, k, v, out, lse, visible, tile=None)


def _flash_serves(q: Tensor) -> bool:
    return q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256


def _window(sees: Plain | Band, queries: int, keys: int) -> tuple[int, int]:
    """How many keys a query sees to the left and to the right of its own; -1: all. Flash takes the last query to stand at
    the last key."""
    if not isinstance(sees, Band):
        return -1, 0 if sees == "causal" else -1
    beyond = sees.behind + queries - keys  # places of the last query after the last key: trimmed, so 0 or more
    left = -1 if sees.window is None else sees.window - 1 - beyond
    return left, beyond


def _flash(q: Tensor, k: Tensor, v: Tensor, sees: Plain | Band) -> tuple[Tensor, Tensor]:
    rows = (x.contiguous() for x in (q, k, v))
    return _call(rows, None, (q.shape[1], k.shape[1]), sees == "causal", _window(sees, q.shape[1], k.shape[1]))


def _flash_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, sees: Plain | Band
) -> tuple[Tensor, Tensor, Tensor]:
    rows = (x.contiguous() for x in (dout, q, k, v, out, lse))
    longest = q.shape[1], k.shape[1]
    return _call_backward(rows, None, longest, sees == "causal", _window(sees, *longest))


def _varlen(q: Tensor, k: Tensor, v: Tensor, block: Block) -> tuple[Tensor, Tensor]:
    edges, longest = block.sequences(q.shape[0], q.device)
    rows = (x.flatten(0, 1) for x in (q, k, v))
    out, lse = _call(rows, edges, (longest, longest), True, _to_the_left(block))
    return out.view(q.shape), lse.unflatten(1, q.shape[:2]).transpose(0, 1)


def _varlen_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, block: Block
) -> tuple[Tensor, Tensor, Tensor]:
    edges, longest = block.sequences(q.shape[0], q.device)
    rows = (x.flatten(0, 1).contiguous() for x in (dout, q, k, v, out))
    ends = lse.transpose(0, 1).flatten(1).contiguous()
    dq, dk, dv = _call_backward((*rows, ends), edges, (longest, longest), True, _to_the_left(block))
    return dq.view(q.shape), dk.view(k.shape), dv.view(v.shape)


def _to_the_left(block: Block) -> tuple[int, int]:
    window = block.rule.window
    return (-1 if window is None else window - 1), 0


def _call(
    rows: Iterable[Tensor], edges: Tensor | None, longest: tuple[int, int], causal: bool, window: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Flash over whole rows ``[B, S, H, Dh]``, or over sequences end to end ``[tokens, H, Dh]`` between ``edges``."""
    out, lse, *_ = aten._flash_attention_forward(
        *rows, edges, edges, *longest, 0.0, causal, False, window_size_left=window[0], window_size_right=window[1]
    )
    return out, lse


def _call_backward(
    rows: Iterable[Tensor], edges: Tensor | None, longest: tuple[int, int], causal: bool, window: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """``rows``: dout, q, k, v, out and lse."""
    given = tuple(rows)
    # A random state and its offset, which backward reads for dropout alone.
    unused = torch.empty(2, dtype=torch.uint64, device=given[0].device), torch.empty(0, device=given[0].device)
    dq, dk, dv = aten._flash_attention_backward(
        *given, edges, edges, *longest, 0.0, causal, *unused, window_size_left=window[0], window_size_right=window[1]
    )
    return dq, dk, dv


def _spread(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Heads outside, each kv head repeated for its queries: ``[B, H, S, Dh]``."""
    group = q.shape[2] // k.shape[2]
    if group > 1:
        k, v = k.repeat_interleave(group, dim=2), v.repeat_interleave(group, dim=2)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def _collect(dq: Tensor, dk: Tensor, dv: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """The inverse: gradients of the repeated heads summed."""
    dq, dk, dv = dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)
    if group > 1:
        dk, dv = dk.unflatten(2, (-1, group)).sum(3), dv.unflatten(2, (-1, group)).sum(3)
    return dq, dk, dv


def _bias(sees: Plain | Band, q: Tensor, k_len: int) -> Tensor | None:
    """A band as the efficient kernel wants it: one value a head, rows aligned to 16 bytes."""
    bias = as_bias(sees, q, k_len)
    if bias is None:
        return None
    padded = F.pad(bias, (0, -k_len % 8))[..., :k_len]
    return padded.expand(q.shape[0], q.shape[2], q.shape[1], k_len)


def _efficient(q: Tensor, k: Tensor, v: Tensor, sees: Plain | Band) -> tuple[Tensor, Tensor]:
    out, lse, *_ = aten._scaled_dot_product_efficient_attention(
        *_spread(q, k, v), _bias(sees, q, k.shape[1]), True, 0.0, sees == "causal"
    )
    return out.transpose(1, 2), lse[..., : q.shape[1]]  # the op rounds S up to 32


def _efficient_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, sees: Plain | Band
) -> tuple[Tensor, Tensor, Tensor]:
    rounded = F.pad(lse, (0, -lse.shape[-1] % 32), value=float("inf"))
    unused = torch.zeros((), dtype=torch.int64, device=q.device)
    dq, dk, dv, _ = aten._scaled_dot_product_efficient_attention_backward(
        dout.transpose(1, 2),
        *_spread(q, k, v),
        _bias(sees, q, k.shape[1]),
        out.transpose(1, 2),
        rounded.contiguous(),
        unused,
        unused,
        0.0,
        [True, True, True, False],
        sees == "causal",
    )
    return _collect(dq, dk, dv, q.shape[2] // k.shape[2])
