"""Step time had one rank, stage or axis been ideal, from a run's own steps.

Within a step ranks wait for each other at every collective, and all of them at its end: so a step takes what its latest
rank's work takes, and the communication that nobody was late to. Taking away a rank's lateness gives the step to the next
latest one. With a pipeline the graph of the schedule is replayed instead (``profiler.pipeline``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trainsys.profiler.pipeline import PipelineStep
from trainsys.profiler.steps import Floats, StepTable
from trainsys.profiler.straggler import peer_log_ratio
from trainsys.profiler.waits import work_between
from trainsys.profiler.waterfall import Waterfall
from trainsys.telemetry.events import COMM

LEAST = 0.01
MOST_RANKS = 3


@dataclass(frozen=True)
class WhatIf:
    """``step_s``: of the step's wall time, had it been so."""

    what: str
    step_s: float
    gain: float
    """Share of the wall time that is gone then."""


class Saved:
    """Seconds that all ranks would save had one been no later than its peers, over any number of windows."""

    def __init__(self) -> None:
        self._steps = 0
        self._seconds: Floats | None = None

    def add(self, table: StepTable) -> None:
        """The steps of ``table.work``."""
        rows = np.flatnonzero(table.work)
        if not rows.size or len(table.ranks) < 2:
            return
        work = work_between(table)[rows]
        lateness = work * -np.expm1(-peer_log_ratio(work, table.peers()))  # over the peers' median
        at = np.arange(len(rows))
        last = lateness.argmax(axis=1)
        saved = np.zeros(work.shape[1]) if self._seconds is None else self._seconds
        before = np.maximum(0.0, lateness[at, last])
        lateness[at, last] = -np.inf
        np.add.at(saved, last, before - np.maximum(0.0, lateness.max(axis=1)))
        self._seconds, self._steps = saved, self._steps + rows.size

    def most(self, ranks: Sequence[int]) -> list[tuple[int, float]]:
        """(rank, seconds a step) of those that are latest in most steps."""
        if self._seconds is None:
            return []
        order = np.argsort(-self._seconds)[:MOST_RANKS]
        return [(ranks[c], float(self._seconds[c]) / self._steps) for c in order]


def what_if(fall: Waterfall, pipe: PipelineStep | None, late: list[tuple[int, float]]) -> list[WhatIf]:
    """Those that would gain 1% or more, the best first. ``late``: ``Saved.most``."""
    found: list[WhatIf] = []

    def say(what: str, saved_s: float) -> None:
        if fall.wall_s > 0 and saved_s >= LEAST * fall.wall_s:
            found.append(WhatIf(what, fall.wall_s - saved_s, saved_s / fall.wall_s))

    for term in fall.terms:
        if term.name.startswith(COMM):
            say(f"no exposed communication on {term.name[len(COMM) :]}", term.seconds)
        elif term.name == "bubble":
            say("no pipeline bubble", term.seconds)
    if pipe is not None:
        say("all stages alike", pipe.step_s - pipe.ideal_s)
        for rank, without in enumerate(pipe.without):
            say(f"pipeline rank {rank} like the others", pipe.step_s - without)
    for rank, saved in late:
        say(f"rank {rank} like its peers", saved)
    return sorted(found, key=lambda w: -w.gain)
