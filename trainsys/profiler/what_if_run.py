"""Step time had one rank, stage or axis been ideal, from a run's own steps.

Within a step ranks wait for each other at every collective, and all of them at its end: so a step takes what its latest
rank's work takes, and the communication that nobody was late to. Taking away a rank's lateness gives the step to the next
latest one. With a pipeline the graph of the schedule is replayed instead (``profiler.pipeline``).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trainsys.profiler.pipeline import PipelineStep
from trainsys.profiler.steps import StepTable
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


def what_if(table: StepTable, fall: Waterfall, pipe: PipelineStep | None) -> list[WhatIf]:
    """Those that would gain 1% or more, the best first."""
    found: list[WhatIf] = []

    def say(what: str, saved_s: float) -> None:
        if fall.wall_s > 0 and saved_s >= LEAST * fall.wall_s:
            found.append(WhatIf(what, fall.wall_s - saved_s, saved_s / fall.wall_s))

    for term in fall.terms:
        if term.name.startswith(COMM):
            say(f"no communication on {term.name[len(COMM) :]} in the way", term.seconds)
        elif term.name == "bubble":
            say("no pipeline bubble", term.seconds)
    if pipe is not None:
        say("all stages alike", pipe.step_s - pipe.ideal_s)
        for rank, without in enumerate(pipe.without):
            say(f"pipeline rank {rank} like the others", pipe.step_s - without)
    rows = np.flatnonzero(table.work)
    if rows.size and len(table.ranks) > 1:
        for rank, saved in _ranks(table, rows):
            say(f"rank {rank} like its peers", saved)
    return sorted(found, key=lambda w: -w.gain)


def _ranks(table: StepTable, rows: np.ndarray[tuple[int, ...], np.dtype[np.int64]]) -> list[tuple[int, float]]:
    """(rank, seconds a step that all would save) of the ranks that are latest in most steps."""
    work = work_between(table)[rows]
    lateness = work * -np.expm1(-peer_log_ratio(work, table.peers()))  # over the peers' median
    at = np.arange(len(rows))
    last = lateness.argmax(axis=1)
    saved = np.zeros(work.shape[1])
    before = np.maximum(0.0, lateness[at, last])
    lateness[at, last] = -np.inf
    np.add.at(saved, last, before - np.maximum(0.0, lateness.max(axis=1)))
    order = np.argsort(-saved)[:MOST_RANKS]
    return [(table.ranks[c], float(saved[c]) / len(rows)) for c in order]
