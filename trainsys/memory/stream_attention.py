"""Self-attention a piece of the queries at a time, in backward too (StreamBP, Luo et al. 2025).

Attention keeps its input, queries, keys, values, output and log-sum-exp. Streamed, it keeps its input alone. Keys and
values of all tokens are made first, in backward again; then each piece of queries runs from its projection to
the output's, against the keys that it sees, and straight back. So besides keys, values and their gradients (small
with grouped heads) there are activations of one piece at a time. The gradient is exact; attention's forward runs
twice, as it would recomputed.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from trainsys.models.attention import Attention, Shared
from trainsys.models.layers import Linear
from trainsys.models.rope import apply_rope
from trainsys.ops.attention_kernels import Kernel, kernel_for
from trainsys.ops.attention_partial import Partial, wide
from trainsys.ops.attention_rule import Rule, Visible


def stream_queries(attn: Attention, queries: int) -> None:
    """Make ``attn`` work on ``queries`` positions of each row at a time. Whole rows only: no context parallelism."""
    attn.forward = partial(_forward, attn, queries)  # type: ignore[method-assign]  # names and hooks stay


def _forward(attn: Attention, queries: int, x: Tensor, shared: Shared) -> Tensor:
    out: Tensor = _Streamed.apply(x, _Pieces(attn, queries, shared), *attn.parameters())
    return out


class _Pieces:
    """What of ``attn`` is done for some positions ``at``. ``shared.prepared`` is the rule, or None: causal."""

    def __init__(self, attn: Attention, queries: int, shared: Shared) -> None:
        self.attn, self.queries, self.shared = attn, queries, shared
        self.rule: Rule = shared.prepared or Rule()

    def places(self, length: int) -> list[slice]:
        return [slice(a, min(a + self.queries, length)) for a in range(0, length, self.queries)]

    def q(self, x: Tensor, at: slice) -> Tensor:
        return self._rotated(x, at, self.attn.wq, self.attn.q_norm)

    def kv(self, x: Tensor, at: slice) -> tuple[Tensor, Tensor]:
        v = self.attn.wv(x).unflatten(-1, (-1, self.attn.head_dim))
        return self._rotated(x, at, self.attn.wk, self.attn.k_norm), v

    def all_kv(self, x: Tensor) -> tuple[Tensor, Tensor]:
        each = [self.kv(x[:, at], at) for at in self.places(x.shape[1])]
        k, v = (torch.cat(parts, dim=1) for parts in zip(*each, strict=True))
        return k, v

    def blocks(self, at: slice) -> Iterator[tuple[slice, slice, Visible]]:
        """Blocks of the queries at ``at``, by their index in the piece, against the keys that they see: those before the
        piece, and its own."""
        mine = range(at.start, at.stop)
        for keys in (range(at.start), mine):
            found = self.rule.block(mine, keys)
            if found is not None:
                queries, seen, sees = found
                rows = slice(queries.start - at.start, queries.stop - at.start)
                yield rows, slice(seen.start, seen.stop), sees

    def attend(self, kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, at: slice) -> tuple[Tensor, Tensor]:
        """``out`` and log-sum-exp of a piece over all keys that it sees."""
        found = Partial(q)
        for rows, keys, sees in self.blocks(at):
            found.merge(*kernel.forward(q[:, rows], k[:, keys], v[:, keys], sees), rows)
        return found.out.to(q.dtype), found.lse

    def _rotated(self, x: Tensor, at: slice, linear: Linear, norm: nn.Module | None) -> Tensor:
        heads = linear(x).unflatten(-1, (-1, self.attn.head_dim))
        if norm is not None:
            heads = norm(heads)
        return apply_rope(heads, self.shared.cos[:, at], self.shared.sin[:, at])


class _Sums:
    """Gradients of parameters, added up in fp32 as they would inside one product."""

    def __init__(self, parameters: tuple[nn.Parameter, ...]) -> None:
        self._sums = {p: torch.zeros_like(p, dtype=wide(p)) for p in parameters}

    def back(self, outs: list[Tensor], grads: list[Tensor], x: Tensor, *modules: nn.Module | None) -> Tensor:
        """Go back from ``outs`` to ``x``, and add what the parameters of ``modules`` get."""
        parameters = [p for m in modules if m is not None for p in m.parameters()]
        d_x, *found = torch.autograd.grad(outs, [x, *parameters], grads)
        for p, g in zip(parameters, found, strict=True):
            self._sums[p] += g
        return d_x

    def all(self) -> list[Tensor]:
        return [total.to(p.dtype) for p, total in self._sums.items()]


class _Streamed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, pieces: _Pieces, *parameters: nn.Parameter) -> Tensor:
        ctx.save_for_backward(x)
        # Not saved as x is: recomputation would hand back copies, whose gradients nobody reads.
        ctx.pieces, ctx.parameters = pieces, parameters
        k, v = pieces.all_kv(x)
        outs = []
        for at in pieces.places(x.shape[1]):
            q = pieces.q(x[:, at], at)
            out, _ = pieces.attend(kernel_for(q), q, k, v, at)
            outs.append(pieces.attn.wo(out.flatten(2)))
        return torch.cat(outs, dim=1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        pieces, sums, d_x = ctx.pieces, _Sums(ctx.parameters), torch.empty_like(x)
        attn = pieces.attn
        k, v = pieces.all_kv(x)
        dk, dv = (torch.zeros_like(t, dtype=wide(t)) for t in (k, v))
        for at in pieces.places(x.shape[1]):
            part = x[:, at].detach().requires_grad_()
            with torch.enable_grad():
                q = pieces.q(part, at)
            held = q.detach()
            kernel = kernel_for(held)
            out, lse = pieces.attend(kernel, held, k, v, at)
            out.requires_grad_()
            with torch.enable_grad():
                projected = attn.wo(out.flatten(2))
            d_out = sums.back([projected], [grad[:, at]], out, attn.wo)
            dq = torch.zeros_like(held, dtype=wide(held))
            for rows, keys, sees in pieces.blocks(at):
                found = kernel.backward(
                    d_out[:, rows], held[:, rows], k[:, keys], v[:, keys], out.detach()[:, rows], lse[..., rows], sees
                )
                dq[:, rows] += found[0]
                dk[:, keys] += found[1]
                dv[:, keys] += found[2]
            d_x[:, at] = sums.back([q], [dq.to(q.dtype)], part, attn.wq, attn.q_norm)
        for at in pieces.places(x.shape[1]):
            part = x[:, at].detach().requires_grad_()
            with torch.enable_grad():
                made = list(pieces.kv(part, at))
            back = [dk[:, at].to(k.dtype), dv[:, at].to(v.dtype)]
            d_x[:, at] += sums.back(made, back, part, attn.wk, attn.wv, attn.k_norm)
        return (d_x, None, *sums.all())
