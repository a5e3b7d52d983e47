"""Whole rows for the router's statistics where context parallelism gives each rank a part of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trainsys.comm import ops
from trainsys.comm.group import AxisGroup
from trainsys.models.router import WholeRows


class CutRows(WholeRows):
    """``places[r]``: which positions of a row the r-th rank of ``cp`` holds."""

    def __init__(self, cp: AxisGroup, places: Sequence[Sequence[int]]) -> None:
        self._cp = cp
        held = torch.tensor([list(p) for p in places])
        self._mine = held[cp.index]
        self._order = held.flatten().argsort()

    def gather(self, choices: Tensor) -> Tensor:
        # The only thing of a token that others need: k small numbers.
        whole = ops.all_gather(choices.to(torch.int32), self._cp, dim=1)
        self._order = self._order.to(whole.device)
        return whole[:, self._order].to(choices.dtype)

    def own(self, full: Tensor) -> Tensor:
        self._mine = self._mine.to(full.device)
        return full[:, self._mine]
