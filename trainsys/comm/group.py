"""One rank's membership of one axis."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist

from trainsys.comm.ledger import Ledger


@dataclass(frozen=True, eq=False)
class AxisGroup:
    """The ranks that share this rank's coordinates on every axis but ``axis``.

    ``group`` is None where the axis has size 1: every collective is then a no-op and nothing is counted.
    """

    axis: str
    ranks: tuple[int, ...]
    index: int
    group: dist.ProcessGroup | None
    ledger: Ledger

    @property
    def size(self) -> int:
        return len(self.ranks)
