"""Self-attention of one layer: projections, rotary embedding, and a core that others may replace."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from trainsys.config.model import ModelConfig
from trainsys.models.layers import Linear, RMSNorm
from trainsys.models.rope import apply_rope
from trainsys.ops.attention import causal_attention
from trainsys.ops.attention_rule import Rule
from trainsys.ops.attention_seam import Method, WholeRows, attend
from trainsys.ops.documents import Documents


@dataclass(frozen=True)
class Shared:
    """What all layers of one forward share, made once by the decoder.

    Deliberately no pytree: FSDP2's mixed precision casts every floating tensor it finds in a module's
    arguments, and cos and sin in bf16 would make the answer depend on the layout.
    """

    cos: Tensor
    """``[B, S, 1, Dh]``, as ``rope_tables`` makes it"""
    sin: Tensor
    prepared: Any
    """what the attention core's ``prepare`` returned"""


class CoreAttention(nn.Module):
    """Causal attention on whole rows. A replacement has the same two methods."""

    def __init__(self, window: int | None) -> None:
        super().__init__()
        self.window, self._method = window, WholeRows()

    def prepare(self, positions: Tensor, docs: Documents | None) -> Rule | None:
        """Anything the core wants computed once per forward instead of once per layer: here which keys a query sees.
        None: all up to its own.

        Place in the row decides what is causal, not ``positions [B, S]``, which may restart at a document.
        """
        if docs is None and (self.window is None or self.window >= positions.shape[1]):
            return None
        return Rule(self.window, docs)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, prepared: Rule | None) -> Tensor:
        """``q [B, S, H, Dh]``, ``k, v [B, S, K, Dh]`` -> ``[B, S, H, Dh]``; H and K are this rank's heads."""
        if prepared is None:
            return causal_attention(q, k, v)
        return attend(q, k, v, self._method, prepared)[0]


class SeamAttention(nn.Module):
    """The same through the attention seam: by a method that can be exchanged, wrapped or counted."""

    def __init__(self, window: int | None, method: Method) -> None:
        super().__init__()
        self.window, self.method = window, method

    def prepare(self, positions: Tensor, docs: Documents | None) -> Rule:
        """``docs`` are of the whole row, ``positions`` of the part held here."""
        return Rule(self.window, docs)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, prepared: Rule) -> Tensor:
        return attend(q, k, v, self.method, prepared)[0]


class Attention(nn.Module):
    """Grouped-query attention with optional bias and norm of queries and keys."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.head_dim = cfg.dim_per_head
        n_q, n_kv = cfg.n_heads * self.head_dim, cfg.kv_heads * self.head_dim
        self.wq = Linear(cfg.d_model, n_q, bias=cfg.qkv_bias)
        self.wk = Linear(cfg.d_model, n_kv, bias=cfg.qkv_bias)
        self.wv = Linear(cfg.d_model, n_kv, bias=cfg.qkv_bias)
        self.wo = Linear(n_q, cfg.d_model)
        self.q_norm = RMSNorm(self.head_dim, cfg.norm_eps) if cfg.qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, cfg.norm_eps) if cfg.qk_norm else None
        self.core = CoreAttention(cfg.sliding_window)

    def forward(self, x: Tensor, shared: Shared) -> Tensor:
        """``x [B, S, D]`` -> ``[B, S, D]``.

        A hook may gather ``x`` along S before and scatter the output after; ``shared`` is always of the whole row.
        """
        heads = (*x.shape[:2], -1, self.head_dim)
        q, k, v = self.wq(x).view(heads), self.wk(x).view(heads), self.wv(x).view(heads)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = apply_rope(q, shared.cos, shared.sin), apply_rope(k, shared.cos, shared.sin)
        out = self.core(q, k, v, shared.prepared)
        return self.wo(out.flatten(2))
