"""A mixture of experts in place of the feed-forward: router, routed experts, shared experts.

As everywhere in ``models``, no parallel code: ``MoE.dispatch`` is the seam through which expert parallelism sends
rows to the ranks that hold their experts, and ``Router.rows`` the one through which context parallelism completes a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainsys.config.model import ModelConfig
from trainsys.models.router import Router, Routing
from trainsys.ops.grouped import grouped_matmul
from trainsys.ops.permute import Sorted, collect, sort_by_expert, spread


class Part(Protocol):
    """Some of the rows, on their way through the experts held here."""

    counts: Tensor
    """``[E] int64``: rows of each expert held here; known once ``arrive`` has returned"""

    def arrive(self, rows: Tensor) -> Tensor:
        """What was sent -> ``[n, D]``, sorted by expert."""
        ...

    def leave(self, rows: Tensor) -> Tensor:
        """``[n, D]`` -> whatever ``Dispatch.receive`` completes."""
        ...


class Dispatch(Protocol):
    """How rows get to experts and back. Two halves, so that other work fits between them."""

    def send(self, x: Tensor, routing: Routing, n_experts: int) -> tuple[Any, list[Tensor], Sequence[Part]]:
        """``x [T, D]`` -> (what ``receive`` wants, one tensor a part, the parts)."""
        ...

    def receive(self, state: Any, returned: Sequence[Tensor]) -> Tensor:
        """What the parts' ``leave`` gave -> the gated sums ``[T, D]``."""
        ...


class Experts(nn.Module):
    """Feed-forwards of one shape, stacked: ``w_gate, w_up [E, F, D]``, ``w_down [E, D, F]``; gelu has no gate."""

    def __init__(self, n_experts: int, d_model: int, d_ff: int, kind: str) -> None:
        super().__init__()
        self.w_gate = nn.Parameter(torch.empty(n_experts, d_ff, d_model)) if kind == "swiglu" else None
        self.w_up = nn.Parameter(torch.empty(n_experts, d_ff, d_model))
        self.w_down = nn.Parameter(torch.empty(n_experts, d_model, d_ff))

    def forward(self, rows: Sequence[Tensor], parts: Sequence[Part]) -> list[Tensor]:
        """One call for all parts, whose communication overlaps the computation of the others: a second call
        would make FSDP gather the weights a second time."""
        return [
            part.leave(self.compute(part.arrive(x), part.counts)) for x, part in zip(rows, parts, strict=True)
        ]

    def compute(self, x: Tensor, counts: Tensor) -> Tensor:
        """``x [n, D]`` sorted by expert, ``counts [E]`` -> ``[n, D]``."""
        up = grouped_matmul(x, self.w_up, counts)
        if self.w_gate is None:
            hidden = F.gelu(up, approximate="tanh")
        else:
            hidden = F.silu(grouped_matmul(x, self.w_gate, counts)) * up
        return grouped_matmul(hidden, self.w_down, counts)


class LocalPart:
    """Rows that are where their experts are."""

    def __init__(self, counts: Tensor) -> None:
        self.counts = counts

    def arrive(self, rows: Tensor) -> Tensor:
        return rows

    def leave(self, rows: Tensor) -> Tensor:
        return rows


class LocalDispatch:
    """Every expert is here."""

    def send(
        self, x: Tensor, routing: Routing, n_experts: int
    ) -> tuple[tuple[Sorted, Tensor], list[Tensor], Sequence[Part]]:
        choices, gates, kept = flat(routing)
        by = sort_by_expert(choices, n_experts, kept)
        return (by, gates), [spread(x, by)], [LocalPart(by.counts)]

    def receive(self, state: tuple[Sorted, Tensor], returned: Sequence[Tensor]) -> Tensor:
        by, gates = state
        return collect(returned[0], gates, by)


def flat(routing: Routing) -> tuple[Tensor, Tensor, Tensor | None]:
    """The three of a routing as ``[T, k]``."""
    choices, gates, kept = routing
    return choices.flatten(0, 1), gates.flatten(0, 1), None if kept is None else kept.flatten(0, 1)


class MoE(nn.Module):
    """``x -> sum over the chosen experts of gate * expert(x), plus shared(x)``."""

    def __init__(self, cfg: ModelConfig, shared: nn.Module | None) -> None:
        super().__init__()
        moe = cfg.moe
        assert moe is not None
        self.n_experts = moe.n_experts
        self.router = Router(cfg.d_model, moe)
        self.experts = Experts(moe.n_experts, cfg.d_model, moe.d_ff, cfg.ffn_kind)
        self.shared = shared
        self.dispatch: Dispatch = LocalDispatch()

    # How many rows an expert gets is known only when it runs, which no compiled graph can be specialised to.
    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        """``x [B, S, D] -> [B, S, D]``."""
        routing = self.router(x)
        state, rows, parts = self.dispatch.send(x.flatten(0, 1), routing, self.n_experts)
        # Shared experts compute while rows travel.
        shared = None if self.shared is None else self.shared(x)
        out = self.dispatch.receive(state, self.experts(rows, parts)).view_as(x)
        return out if shared is None else out + shared
