"""Which part of communication is waiting for a late peer, and which rank is late for good.

Within a collective every member is blocked at least as long as the operation itself takes; who came early is
blocked longer. So of a rank's blocked time on an axis in a step, what exceeds the least blocked member of its
group is waiting for peers, and what is left is the communication itself.
"""

from __future__ import annotations

import numpy as np

from trainsys.profiler.steps import Floats, StepTable, axes_of
from trainsys.profiler.straggler import peer_log_ratio
from trainsys.telemetry.events import COMM

EFFECT = 0.03
"""A rank this much slower than its peers in the median step is late for good."""


def work_phases(table: StepTable) -> list[str]:
    """Phases that a rank spends on its own: all but communication and collection of garbage."""
    return [name for name in table.phases if not name.startswith(COMM) and name != "gc"]


def work_between(table: StepTable) -> Floats:
    """Seconds [T, R] of each rank's own work, which no collective equalises."""
    total = np.zeros(table.time.shape)
    for name in work_phases(table):
        total += table.phases[name]
    return total


def waiting(table: StepTable) -> dict[str, Floats]:
    """axis -> seconds [T, R] of its blocked time that are waiting for late members of the group.

    The pipeline's axis has no collectives: there, what exceeds the least blocked rank *of the same stage* is a
    late pipeline among several; with one pipeline there is nothing to compare, and all of it is the bubble's.
    """
    out: dict[str, Floats] = {}
    for axis in axes_of(table):
        blocked = table.phases[COMM + axis]
        wait = np.zeros_like(blocked)
        if axis == "pp":
            peers = table.peers()
            groups = [np.flatnonzero(peers == stage)[None, :] for stage in np.unique(peers)]
        else:
            groups = table.groups(axis)
        for members in groups:
            if members.shape[1] > 1:
                mine = blocked[:, members]  # [T, groups, members]
                wait[:, members] = mine - mine.min(axis=2, keepdims=True)
        out[axis] = wait
    return out


def late_excess(table: StepTable) -> Floats:
    """Seconds [T, R] by which ranks that are late *for good* exceed the median of their peers; 0 for others."""
    out = np.zeros(table.time.shape)
    rows = np.flatnonzero(table.work)
    if not rows.size or len(table.ranks) < 2:
        return out
    late = None if table.of_run is None else table.of_run.late
    if late is None:
        here = LateForGood()
        here.add(table)
        late = here.ranks()
    if late is None or not late.any():
        return out
    work = work_between(table)
    ratio = np.zeros_like(work)
    ratio[rows] = peer_log_ratio(work[rows], table.peers())
    out[:, late] = (work * -np.expm1(-np.maximum(0.0, ratio)))[:, late]
    return out


class LateForGood:
    """Which ranks' median step is ``EFFECT`` slower than their peers', over any number of windows: a median is above a
    bound if more values are than are not, and in a tie if the two next to the bound have their middle above it."""

    def __init__(self) -> None:
        self._count = 0
        self._above: Floats | None = None

    def add(self, table: StepTable) -> None:
        rows = np.flatnonzero(table.work)
        if not rows.size or len(table.ranks) < 2:
            return
        ratio = peer_log_ratio(work_between(table)[rows], table.peers())
        if self._above is None:
            ranks = ratio.shape[1]
            self._above, self._over, self._under = np.zeros(ranks), np.full(ranks, np.inf), np.full(ranks, -np.inf)
        bound = np.log1p(EFFECT)
        above = ratio > bound
        self._count += rows.size
        self._above += above.sum(axis=0)
        self._over = np.minimum(self._over, np.where(above, ratio, np.inf).min(axis=0))
        self._under = np.maximum(self._under, np.where(above, -np.inf, ratio).max(axis=0))

    def ranks(self) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]] | None:
        """[R]; None where nothing could be compared."""
        if self._above is None:
            return None
        tie = np.zeros(self._above.size, bool)
        even = 2 * self._above == self._count
        tie[even] = (self._over[even] + self._under[even]) / 2 > np.log1p(EFFECT)
        return np.asarray((2 * self._above > self._count) | tie)


def garbage_share(table: StepTable) -> Floats:
    """[T]: the share of a step's waiting that the latest rank's garbage collection explains, 0..1."""
    gc = table.phases.get("gc")
    if gc is None or len(table.ranks) < 2:
        return np.zeros(len(table.steps))
    own = work_between(table) + gc
    late = own - np.median(own, axis=1, keepdims=True)
    last = late.argmax(axis=1)
    rows = np.arange(len(last))
    excess = gc[rows, last] - np.median(gc, axis=1)
    lateness = late[rows, last]
    share = np.divide(excess, lateness, out=np.zeros_like(excess), where=lateness > 0)
    return np.asarray(np.clip(share, 0.0, 1.0))
