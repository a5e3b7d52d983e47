"""What a pipeline schedule is made of: actions, who holds which stage, and what must come before what."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

Op = Literal["F", "B", "I", "W"]
"""Forward; backward whole; backward for the input's gradient only; for the weights' gradients only."""
Placement = Literal["loop", "v"]
"""Stage s is on rank s mod p; or with two stages a rank, r and 2p-1-r: down the ranks and up again."""


class Action(NamedTuple):
    op: Op
    stage: int
    micro: int

    def __str__(self) -> str:
        return f"{self.stage}{self.op}{self.micro}"


@dataclass(frozen=True)
class Schedule:
    """The order of each rank's work in one optimizer step. Checked on construction by `check`."""

    name: str
    ranks: int
    stages: int
    micros: int
    placement: Placement
    orders: tuple[tuple[Action, ...], ...]
    """One list of actions a rank. When each starts follows from `needs`."""

    def __post_init__(self) -> None:
        check(self)

    def rank_of(self, stage: int) -> int:
        return rank_of(stage, self.ranks, self.placement)

    def stages_of(self, rank: int) -> tuple[int, ...]:
        return stages_of(rank, self.ranks, self.stages, self.placement)

    @cached_property
    def actions(self) -> frozenset[Action]:
        return frozenset(a for order in self.orders for a in order)

    def gradient(self, stage: int, micro: int) -> Action:
        """The action that gives the gradient of this stage's input: B, or I where backward is split."""
        whole = Action("B", stage, micro)
        return whole if whole in self.actions else Action("I", stage, micro)

    def needs(self, action: Action) -> Iterator[Action]:
        """What must have ended before ``action`` starts, other than what its rank does before it."""
        op, stage, micro = action
        if op == "F":
            if stage > 0:
                yield Action("F", stage - 1, micro)
        elif op == "W":
            yield Action("I", stage, micro)
        else:
            yield Action("F", stage, micro)
            if stage < self.stages - 1:
                yield self.gradient(stage + 1, micro)

    @property
    def splits_backward(self) -> bool:
        return any(a.op == "W" for a in self.orders[0])


def rank_of(stage: int, ranks: int, placement: Placement) -> int:
    turn, place = divmod(stage, ranks)
    return ranks - 1 - place if placement == "v" and turn % 2 else place


def stages_of(rank: int, ranks: int, stages: int, placement: Placement) -> tuple[int, ...]:
    """Ascending."""
    return tuple(s for s in range(stages) if rank_of(s, ranks, placement) == rank)


def check(schedule: Schedule) -> None:
    """Every micro-batch once forward and once backward on every stage, on the right rank, in a possible order.

    Raises AssertionError: a schedule that fails is a mistake of whoever wrote its order.
    """
    assert len(schedule.orders) == schedule.ranks
    for rank, order in enumerate(schedule.orders):
        done = set(order)
        assert len(done) == len(order), f"rank {rank} does something twice"
        for stage in schedule.stages_of(rank):
            for micro in range(schedule.micros):
                ops = {a.op for a in (Action(op, stage, micro) for op in ("F", "B", "I", "W")) if a in done}
                assert ops in ({"F", "B"}, {"F", "I", "W"}), f"stage {stage}, micro-batch {micro}: {ops}"
        expected = {(s, i) for s in schedule.stages_of(rank) for i in range(schedule.micros)}
        assert {(a.stage, a.micro) for a in order} <= expected, f"rank {rank} does another rank's work"
    done = set()
    at = [0] * schedule.ranks
    while moved := [
        rank
        for rank, order in enumerate(schedule.orders)
        if at[rank] < len(order) and done.issuperset(schedule.needs(order[at[rank]]))
    ]:
        for rank in moved:
            done.add(schedule.orders[rank][at[rank]])
            at[rank] += 1
    stuck = [str(order[i]) for order, i in zip(schedule.orders, at, strict=True) if i < len(order)]
    assert not stuck, f"{schedule.name}: waits for ever at {', '.join(stuck)}"
