"""Step time had one rank, stage or axis been ideal, from a run's own steps.

Within a step ranks wait for each other at every collective, and all of them at its end: so a step takes what its latest
rank's work takes, and the communication that nobody was late to. Taking away a rank's lateness gives the step to the next
latest one. With a pipeline the graph of the schedule is replayed instead (``profiler.pipeline``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from trainsys.profiler.pipeline import PipelineStep
from trainsys.profiler.steps import Floats, StepTable
from trainsys.profiler.straggler import median_of_others, peer_log_ratio
from trainsys.profiler.waits import work_between
from trainsys.profiler.waterfall import Waterfall
from trainsys.telemetry.events import COMM

LEAST = 0.01
MOST_RANKS = 3
CHANCE = 0.005
"""That equal ranks show any."""
BLOCKS, SHORTEST, LEAST_BLOCKS = 8, 2, 4
"""Blocks that a window is cut into, steps of one, and blocks that tell a spread."""


@dataclass(frozen=True)
class WhatIf:
    """``step_s``: of the step's wall time, had it been so."""

    what: str
    step_s: float
    gain: float
    """Share of the wall time that is gone then."""


class Saved:
    """Seconds that all ranks would save had one been no later than its peers, over any number of windows.

    Somebody is the latest in every step. What a rank saves counts as far as it is beyond what the others save (of equal
    ranks each saves the same), and only where that is so throughout: its mean over blocks of steps must be clear of their
    spread, which knows of slow drift what single steps do not.
    """

    def __init__(self) -> None:
        self._steps = self._blocks = 0
        self._beyond: Floats | None = None
        """[3, R]: seconds over all steps, then sums over blocks of their mean per step, and of its square."""

    def add(self, table: StepTable) -> None:
        """The steps of ``table.work``."""
        rows = np.flatnonzero(table.work)
        if not rows.size or len(table.ranks) < 2:
            return
        work = work_between(table)[rows]
        lateness = work * -np.expm1(-peer_log_ratio(work, table.peers()))  # over the peers' median
        at = np.arange(len(rows))
        last = lateness.argmax(axis=1)
        before = np.maximum(0.0, lateness[at, last])
        lateness[at, last] = -np.inf
        saved = np.zeros(work.shape)
        saved[at, last] = before - np.maximum(0.0, lateness.max(axis=1))
        means = np.array([b.mean(axis=0) for b in np.array_split(saved, max(1, min(BLOCKS, rows.size // SHORTEST)))])
        means -= median_of_others(means)
        total = saved.sum(axis=0)
        new = np.stack([total - median_of_others(total[None])[0], means.sum(axis=0), (means**2).sum(axis=0)])
        self._beyond = new if self._beyond is None else self._beyond + new
        self._steps, self._blocks = self._steps + rows.size, self._blocks + len(means)

    def most(self, ranks: Sequence[int]) -> list[tuple[int, float]]:
        """(rank, seconds per step) of those that would save most, if it is not by chance."""
        if self._beyond is None or self._blocks < LEAST_BLOCKS:
            return []
        n = self._blocks
        total, sums, squares = self._beyond
        mean = sums / n
        variance = np.maximum(squares / n - mean**2, 0.0) / (n - 1)
        # A spread that few blocks tell is less certain itself (the tail of Student's t, nearly), and blocks resemble each
        # other where noise is slow (by simulation, to a correlation of 0.95 between steps).
        sure = 1.3 * NormalDist().inv_cdf(1 - CHANCE / len(ranks)) * (1 + 8 / n)
        order = np.argsort(-total)[:MOST_RANKS]
        beyond = [c for c in order.tolist() if mean[c] > sure * np.sqrt(variance[c])]
        return [(ranks[c], float(total[c]) / self._steps) for c in beyond]


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
