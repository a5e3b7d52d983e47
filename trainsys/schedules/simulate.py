"""How long a schedule takes: each rank does its list in order, each action as soon as what it needs is there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from trainsys.schedules.actions import Action, Schedule

PerStage = float | Sequence[float]
"""The same for every stage, or one a stage."""


@dataclass(frozen=True)
class Times:
    """Seconds (or any unit) of one micro-batch on one stage.

    A whole backward takes ``backward_input + backward_weight``. ``send`` is from the end of an action on one
    rank to when its result is there on another; it passes beside compute, and between stages of one rank is 0.
    """

    forward: PerStage = 1.0
    backward_input: PerStage = 1.0
    backward_weight: PerStage = 1.0
    send: float = 0.0

    def of(self, action: Action) -> float:
        op, stage, _ = action
        if op == "B":
            return _at(self.backward_input, stage) + _at(self.backward_weight, stage)
        return _at({"F": self.forward, "I": self.backward_input, "W": self.backward_weight}[op], stage)


def _at(values: PerStage, stage: int) -> float:
    return values if isinstance(values, (int, float)) else values[stage]


@dataclass(frozen=True)
class Span:
    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """What happens when; all times in the unit of the `Times` it was made with."""

    schedule: Schedule
    ranks: tuple[tuple[Span, ...], ...]

    @cached_property
    def step_time(self) -> float:
        return max(spans[-1].end for spans in self.ranks)

    @cached_property
    def busy(self) -> tuple[float, ...]:
        """By rank."""
        return tuple(sum(s.end - s.start for s in spans) for spans in self.ranks)

    @property
    def bubble(self) -> float:
        """Share of all ranks' time in which they wait. Equal stages under GPipe and 1F1B: (p-1)/(m+p-1)."""
        return 1.0 - sum(self.busy) / (len(self.ranks) * self.step_time)

    @cached_property
    def in_flight(self) -> tuple[int, ...]:
        """By stage: most micro-batches whose activations are held at once, from F to the end of B or W."""
        return tuple(self._most({stage}) for stage in range(self.schedule.stages))

    @cached_property
    def in_flight_rank(self) -> tuple[int, ...]:
        """By rank: the same over all of its stages together."""
        return tuple(self._most(set(self.schedule.stages_of(r))) for r in range(self.schedule.ranks))

    def _most(self, stages: set[int]) -> int:
        held = most = 0
        order = self.schedule.orders[self.schedule.rank_of(min(stages))]
        for action in order:
            if action.stage in stages:
                if action.op == "F":
                    held += 1
                    most = max(most, held)
                elif action.op in ("B", "W"):
                    held -= 1
        return most


class Durations(Protocol):
    """What `simulate` asks: `Times`, or say what each action was measured to take."""

    @property
    def send(self) -> float: ...

    def of(self, action: Action) -> float: ...


def simulate(schedule: Schedule, times: Durations) -> Timeline:
    """Start and end of every action."""
    spans: list[list[Span]] = [[] for _ in schedule.orders]
    ended: dict[Action, float] = {}
    free = [0.0] * schedule.ranks
    waiting = list(range(schedule.ranks))
    while waiting:
        still = []
        for rank in waiting:
            order = schedule.orders[rank]
            while len(spans[rank]) < len(order):
                action = order[len(spans[rank])]
                start = free[rank]
                for need in schedule.needs(action):
                    if need not in ended:
                        break
                    remote = schedule.rank_of(need.stage) != rank
                    start = max(start, ended[need] + (times.send if remote else 0.0))
                else:
                    free[rank] = ended[action] = start + times.of(action)
                    spans[rank].append(Span(action, start, free[rank]))
                    continue
                break
            if len(spans[rank]) < len(order):
                still.append(rank)
        waiting = still
    return Timeline(schedule, tuple(map(tuple, spans)))
