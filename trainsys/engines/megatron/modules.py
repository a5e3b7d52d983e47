"""What of the layers is ours rather than Megatron-Core's, through its own seams (layer spec, rotary embedding).

Its local attention is unfused and knows no context parallelism, its local norms know no sequence parallelism, and its
rotary embedding no restarting positions: with these three, all it trains is the same function as the native engine's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trainsys.config.model import ModelConfig
from trainsys.models.attention import CoreAttention
from trainsys.models.rope import inverse_frequencies
from trainsys.ops.documents import Documents
from trainsys.parallel.context.core import ContextAttention


class Norm:
    """torch's norm of the residual stream or of heads, marked so that Megatron sums its gradient over tp ranks."""

    def __new__(cls, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> nn.Module:  # type: ignore[misc]
        norm: nn.RMSNorm | nn.LayerNorm
        if config.normalization == "RMSNorm":
            norm = nn.RMSNorm(hidden_size, eps=eps, dtype=config.params_dtype)
        else:
            norm = nn.LayerNorm(hidden_size, eps=eps, bias=False, dtype=config.params_dtype)
        norm.weight.sequence_parallel = config.sequence_parallel  # type: ignore[assignment]
        return norm


class HeadNorm(Norm):
    """Over the head's dim: RMSNorm whatever the residual stream has."""

    def __new__(cls, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> nn.Module:  # type: ignore[misc]
        return nn.RMSNorm(hidden_size, eps=eps, dtype=config.params_dtype)


class Core(nn.Module):
    """Attention as the native engine computes it, in Megatron's shapes.

    What Megatron calls the attention mask is here ids of the documents of whole rows, on the host: a tensor, for it
    passes through recomputation and schedules as an argument, so micro-batches in flight do not meet.
    """

    core: CoreAttention | ContextAttention
    """Set in a subclass that is made for a run."""

    def __init__(self, **_: Any) -> None:
        super().__init__()

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **_: Any) -> Tensor:
        """``q [S, B, H, Dh]``, ``k, v [S, B, K, Dh]`` -> ``[S, B, H Dh]``; S is what this rank holds."""
        core = self.core
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        docs = None if mask is None else Documents.of(mask)
        out = core(q, k, v, core.prepare(q[..., 0, 0], docs))
        return out.transpose(0, 1).flatten(2)


def core_for(core: CoreAttention | ContextAttention) -> type[Core]:
    """The class of attention modules that all compute by ``core``, which has no parameters."""
    return type("TrainsysCore", (Core,), {"core": core})


class Rotary(nn.Module):
    """The angles of the micro-batch that comes next, of this rank's part of the sequence."""

    def __init__(self, cfg: ModelConfig, device: torch.device) -> None:
        super().__init__()
        freqs: Sequence[float] = inverse_frequencies(cfg.rope, cfg.dim_per_head)
        self._freqs = torch.tensor(freqs, dtype=torch.float32, device=device)
        self._angles: Tensor | None = None
        self._plain: Tensor | None = None

    def set(self, positions: Tensor, *, same_rows: bool) -> None:
        """``positions [B, S]`` of the tokens held here. ``same_rows``: they are those of every row of the run."""
        if same_rows and self._plain is not None:
            self._angles = self._plain
            return
        rows = positions[:1] if same_rows else positions
        angles = rows.t().to(torch.float32).unsqueeze(-1) * self._freqs
        self._angles = torch.cat((angles, angles), dim=-1).unsqueeze(2)
        self._plain = self._angles if same_rows else None

    def get_rotary_seq_len(self, *_: Any) -> int:
        """Megatron asks before it calls; the positions say it all."""
        return 0

    def forward(self, *_: Any, **__: Any) -> Tensor:
        """``[S, B or 1, 1, Dh]``"""
        assert self._angles is not None
        return self._angles
