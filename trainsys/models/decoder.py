"""A decoder-only transformer of the Llama family (Touvron et al. 2023), with no parallel code in it.

Parallelism is applied from outside: weights are sliced, ``attn.core`` is replaced, hooks gather and scatter
around ``attn``, ``ffn``, ``embed`` and ``head``, and a pipeline stage sets what it lacks to None.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from trainsys.config.model import ModelConfig
from trainsys.models.attention import Attention, Shared
from trainsys.models.ffn import build_ffn
from trainsys.models.layers import Embedding, LayerNorm, Linear, RMSNorm, TiedHead
from trainsys.models.rope import frequencies, rope_tables
from trainsys.ops.documents import Documents

Docs = Documents | Tensor | None


class Block(nn.Module):
    """One layer. Serial: h = x + attn(norm(x)), h + ffn(norm(h)). Parallel (Wang & Komatsuzaki 2021, GPT-J):
    x + attn(norm(x)) + ffn(norm(x)) with one norm."""

    def __init__(self, cfg: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attn_norm = build_norm(cfg)
        self.attn = Attention(cfg)
        self.ffn_norm = None if cfg.parallel_block else build_norm(cfg)
        self.ffn = build_ffn(cfg, layer)

    def forward(self, x: Tensor, shared: Shared) -> Tensor:
        normed = self.attn_norm(x)
        h = x + self.attn(normed, shared)
        return h + self.ffn(normed if self.ffn_norm is None else self.ffn_norm(h))


class Decoder(nn.Module):
    """Embedding, layers, final norm, head. Parameters are uninitialised: build it on the meta device, slice
    or shard, ``to_empty``, then ``init_weights``.

    ``compute_dtype`` is that of every activation; parameters may be of another and are cast at use.
    ``layer_ids`` are the layers this instance holds (None: all). Its only buffers are those of routers.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        compute_dtype: torch.dtype = torch.float32,
        layer_ids: Iterable[int] | None = None,
    ) -> None:
        super().__init__()
        self.cfg = cfg
        self.embed: nn.Module | None = Embedding(cfg.vocab, cfg.d_model, compute_dtype)
        ids = range(cfg.n_layers) if layer_ids is None else layer_ids
        self.layers = nn.ModuleDict({str(i): Block(cfg, i) for i in ids})
        self.norm: nn.Module | None = build_norm(cfg)
        self._freqs: Tensor | None = None
        """of rope, made in the first forward: a buffer would be sharded and saved"""
        self.head: nn.Module | None = TiedHead() if cfg.tied_embeddings else Linear(cfg.d_model, cfg.vocab)

    def forward(self, tokens: Tensor, positions: Tensor, docs: Docs = None) -> Tensor:
        """Logits ``[B, S, V]``, or the hidden state ``[B, S, D]`` of a stage that has no head.

        ``tokens [B, S] int64``, or the hidden state of the stage before where ``embed`` is None.
        ``positions [B, S] int64`` feed the rotary embedding. ``docs``: tokens attend within their own document only;
        ids ``[B, S] int64`` do as well, but those of a device are read back. None: one document a row.
        """
        hidden = self.forward_hidden(tokens, positions, docs)
        return hidden if self.head is None else self.head_logits(hidden)

    def forward_hidden(self, tokens: Tensor, positions: Tensor, docs: Docs = None) -> Tensor:
        """As ``forward``, without the head: ``[B, S, D]`` after the final norm."""
        x = tokens if self.embed is None else self.embed(tokens)
        if self.layers:
            shared = self._shared(positions, docs, x.dtype)
            for layer in self.layers.values():
                x = layer(x, shared)
        return x if self.norm is None else self.norm(x)

    def head_logits(self, hidden: Tensor) -> Tensor:
        """``hidden [B, S, D]`` (any part of the sequence) -> logits ``[B, S, V]``."""
        if isinstance(self.head, TiedHead):
            assert self.embed is not None, "a tied head needs the embedding in the same stage"
            return self.head(hidden, self.embed.weight)
        assert self.head is not None, "this stage has no head"
        return self.head(hidden)

    @property
    def head_weight(self) -> Tensor:
        """The weight ``[V, D]`` that the head multiplies by: its own, or the embedding's."""
        holder = self.embed if isinstance(self.head, TiedHead) else self.head
        assert holder is not None, "this stage has no head"
        return holder.weight

    def _shared(self, positions: Tensor, docs: Docs, dtype: torch.dtype) -> Shared:
        wide = torch.promote_types(dtype, torch.float32)
        rope, dim, freqs = self.cfg.rope, self.cfg.dim_per_head, self._freqs
        if freqs is None or freqs.device != positions.device or freqs.dtype != wide:
            freqs = self._freqs = frequencies(rope, dim, positions.device, wide)
        cos, sin = rope_tables(rope, dim, positions, wide, freqs)
        core = next(iter(self.layers.values())).attn.core
        return Shared(cos, sin, core.prepare(positions, None if docs is None else Documents.of(docs)))


def build_norm(cfg: ModelConfig) -> nn.Module:
    """The norm of the residual stream, over D."""
    return {"rmsnorm": RMSNorm, "layernorm": LayerNorm}[cfg.norm](cfg.d_model, cfg.norm_eps)
