"""Tied embeddings when the first and the last stage each hold a copy: one gradient, equal weights."""

from __future__ import annotations

from trainsys.comm import ops
from trainsys.comm.group import AxisGroup
from trainsys.optim.local import Owned, local

NAME = "embed.weight"


class TiedAcross:
    """The two stages are on different ranks: their gradients are summed, so both make the same update."""

    def __init__(self, weight: Owned, pair: AxisGroup) -> None:
        self.weight, self.pair = weight, pair

    def finish_gradients(self) -> None:
        grad = self.weight.grad
        assert grad is not None
        ops.all_reduce_(grad, self.pair)

    def begin_step(self) -> None:
        """Both copies are updated alike."""


class TiedWithin:
    """Both are on this rank, as in V-shaped schedules: the first copy is trained, the second follows it.

    Not one parameter, because each stage is sharded and reduced on its own.
    """

    def __init__(self, first: Owned, second: Owned) -> None:
        self.first, self.second = first, second

    def finish_gradients(self) -> None:
        first, second = self.first.grad, self.second.grad
        assert first is not None
        assert second is not None
        first += second

    def begin_step(self) -> None:
        local(self.second.param).copy_(local(self.first.param))
