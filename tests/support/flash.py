"""FlashAttention-2's two ops as their definition has it, for machines that have no kernel to run: grouped heads,
cumulative lengths, and windows counted from the last query, which stands at the last key."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from trainsys.ops import attention_cuda
from trainsys.ops.attention import reference_attention


def _sees(queries: int, keys: int, causal: bool, left: int, right: int) -> Tensor:
    places = torch.arange(queries).unsqueeze(1) + keys - queries
    at, right = torch.arange(keys), 0 if causal else right
    seen = torch.ones(queries, keys, dtype=torch.bool)
    if left >= 0:
        seen &= at >= places - left
    if right >= 0:
        seen &= at <= places + right
    return seen


def _sequences(q: Tensor, k: Tensor, cu_q: Tensor | None, cu_k: Tensor | None) -> list[tuple[Any, Any, Any]]:
    """Where each sequence's queries, keys and log-sum-exp are. Inputs are dense ``[B, S, H, Dh]``, or laid end to end."""
    if cu_q is None or cu_k is None:
        return [((b,), (b,), (b,)) for b in range(len(q))]
    assert (int(cu_q[-1]), int(cu_k[-1])) == (len(q), len(k))
    spans = [[slice(*pair) for pair in zip(e[:-1].tolist(), e[1:].tolist(), strict=True)] for e in (cu_q, cu_k)]
    return [((a,), (b,), (slice(None), a)) for a, b in zip(*spans, strict=True)]


class Ops:
    """In place of ``torch.ops.aten``."""

    def _flash_attention_forward(
        self, q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor | None, cu_k: Tensor | None, max_q: int, max_k: int,
        dropout: float, causal: bool, debug: bool, *, window_size_left: int, window_size_right: int,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        out, lse = torch.zeros_like(q), q.new_zeros((*q.shape[:-3], q.shape[-2], q.shape[-3]), dtype=torch.float32)
        for at, keys, stat in _sequences(q, k, cu_q, cu_k):
            part = [x.float().unsqueeze(0) for x in (q[at], k[keys], v[keys])]
            n, m = part[0].shape[1], part[1].shape[1]
            assert n <= max_q
            assert m <= max_k
            found, its = reference_attention(*part, _sees(n, m, causal, window_size_left, window_size_right))
            out[at], lse[stat] = found[0].to(q.dtype), its[0]
        return out, lse, torch.empty(2), torch.empty(0), torch.empty(0)

    def _flash_attention_backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_q: Tensor | None,
        cu_k: Tensor | None, max_q: int, max_k: int, dropout: float, causal: bool, state: Tensor, offset: Tensor, *,
        window_size_left: int, window_size_right: int,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        assert all(x.is_contiguous() for x in (dout, out, lse))
        grads = [torch.zeros_like(x) for x in (q, k, v)]
        group, scale = q.shape[-2] // k.shape[-2], q.shape[-1] ** -0.5
        for at, keys, stat in _sequences(q, k, cu_q, cu_k):
            do, qs, o = (x[at].float() for x in (dout, q, out))
            ks, vs = (x[keys].float().repeat_interleave(group, 1) for x in (k, v))
            seen = _sees(len(qs), len(ks), causal, window_size_left, window_size_right)
            scores = torch.einsum("shd,thd->hst", qs, ks) * scale
            p = torch.exp(scores - lse[stat].unsqueeze(-1)).masked_fill(~seen, 0.0)
            delta = (do * o).sum(-1).T.unsqueeze(-1)
            ds = p * (torch.einsum("shd,thd->hst", do, vs) - delta) * scale
            grads[0][at] = torch.einsum("hst,thd->shd", ds, ks).to(q.dtype)
            grads[1][keys] = torch.einsum("hst,shd->thd", ds, qs).unflatten(1, (-1, group)).sum(2).to(k.dtype)
            grads[2][keys] = torch.einsum("hst,shd->thd", p, do).unflatten(1, (-1, group)).sum(2).to(v.dtype)
        return tuple(grads)


class EmulatedFlash(attention_cuda.CudaKernel):
    def forward(self, *args: Any) -> Any:
        with patch.object(attention_cuda, "aten", Ops()):
            return super().forward(*args)

    def backward(self, *args: Any) -> Any:
        with patch.object(attention_cuda, "aten", Ops()):
            return super().backward(*args)
