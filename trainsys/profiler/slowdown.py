"""When the whole run got slower: what no comparison between ranks can show, for all are slow alike.

Each step's work of the quickest rank (of the quickest in each pipeline stage) is followed, per FLOP where steps tell
theirs, so that a longer batch is no slowdown. It is cut where its level changes for good; a segment that lies above the
lowest one is a finding, an ended or an early one too.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field

import numpy as np

from trainsys.profiler.causes import UNKNOWN, explained, more_of
from trainsys.profiler.steps import Floats, StepTable
from trainsys.profiler.verdict import Verdict
from trainsys.telemetry.vectors import HOST

CHANGE = math.log(1.3)
"""A level this much above or below the one before is another: real runs on a machine that others use move by a fifth for
eight steps all the time."""
BLOCK = 16
"""Steps that have to show it; one of them may differ."""
LEAST = 16
"""Steps of a segment that can be the measure of others."""
KEPT = 64
"""Steps of a segment that tell its level."""


@dataclass
class _Segment:
    first: int
    last: int
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=KEPT))
    """Logarithms of work per FLOP."""
    count: int = 0
    work_s: float = 0.0
    step_s: float = 0.0
    grown: Floats = field(default_factory=lambda: np.zeros(len(HOST)))
    """What the hosts counted, sums over steps."""

    def add(self, step: int, x: float, work_s: float, step_s: float, grown: Floats) -> None:
        self.last, self.count = step, self.count + 1
        self.recent.append(x)
        self.work_s, self.step_s, self.grown = self.work_s + work_s, self.step_s + step_s, self.grown + grown

    @property
    def level(self) -> float:
        return float(np.median(self.recent))


Entry = tuple[int, float, float, float, Floats]
"""Step, log of work per FLOP, seconds of work and of the step, what the hosts counted per step."""


class Slowdown:
    """``add`` takes judged steps in order, each once; ``verdicts`` are of all of them so far."""

    def __init__(self) -> None:
        self._segments: list[_Segment] = []
        self._pending: deque[Entry] = deque()
        """The last steps, which may belong to a segment that has just begun."""
        self._before: tuple[int, Floats] | None = None
        """Step and counters [counters, R] of the last row."""
        self._on_device = False

    def add(self, table: StepTable, work: Floats) -> None:
        """``work`` [T, R]: seconds of each rank's own."""
        self._on_device = table.on_device
        peers = table.peers()
        quickest = np.stack([work[:, peers == p].min(axis=1) for p in np.unique(peers)]).mean(axis=0)
        if not (quickest > 0).all():
            return
        size = table.flops_hardware if (table.flops_hardware > 0).all() else np.ones(len(quickest))
        logs = np.log(quickest / size)
        step_s = np.median(table.time, axis=1)
        for row, step in enumerate(table.steps.tolist()):
            grown = self._grown(table, row, step)
            self._take((step, float(logs[row]), float(quickest[row]), float(step_s[row]), grown))

    def _grown(self, table: StepTable, row: int, step: int) -> Floats:
        """What a rank's counters grew by per step since the row before, the median over ranks."""
        now = np.array([table.host[name][row] for name in HOST]) if table.host else np.zeros((len(HOST), 1))
        before, self._before = self._before, (step, now)
        if before is None or step <= before[0]:
            return np.zeros(len(HOST))
        return np.asarray(np.median(np.maximum(now - before[1], 0.0), axis=1) / (step - before[0]))

    def _take(self, entry: Entry) -> None:
        if not self._segments:
            self._segments.append(_Segment(entry[0], entry[0]))
        now = self._segments[-1]
        self._pending.append(entry)
        if len(self._pending) < BLOCK:
            return
        if now.count >= BLOCK:
            level, block = now.level, np.array([e[1] for e in self._pending])
            for sign in (1.0, -1.0):
                moved = sign * (block - level)
                if np.sort(moved)[1] >= CHANGE / 2 and np.median(moved) >= CHANGE:
                    # It begins with the first step that is nearer to the new level.
                    begin = int(np.argmax(moved >= np.median(moved) / 2))
                    for _ in range(begin):
                        now.add(*self._pending.popleft())
                    self._segments.append(_Segment(self._pending[0][0], self._pending[0][0]))
                    while self._pending:
                        self._segments[-1].add(*self._pending.popleft())
                    return
        now.add(*self._pending.popleft())

    def verdicts(self) -> list[Verdict]:
        """Segments that lie above the lowest one."""
        measures = [s for s in self._segments if s.count >= LEAST]
        if not measures or len(self._segments) < 2:
            return []
        best = min(measures, key=lambda s: s.level)
        return [self._verdict(s, best) for s in self._segments
                if s.count >= BLOCK and s.level - best.level >= CHANGE]  # fmt: skip

    def _verdict(self, slow: _Segment, best: _Segment) -> Verdict:
        until = None if slow is self._segments[-1] else slow.last
        took, usual = slow.work_s / slow.count, best.work_s / best.count
        growth = math.exp(slow.level - best.level)
        cost = took * (1 - 1 / growth)
        grown = dict(zip(HOST, np.stack([best.grown / best.count, slow.grown / slow.count], axis=1), strict=True))
        cause = UNKNOWN
        if grown["cpu_s"].all():
            more = more_of(grown, np.array([usual, took]), np.array([1]), np.array([0]))
            cause = explained(more, cost, self._on_device)
        why = f"; on the median rank, {cause.evidence}" if cause.evidence else ""
        when = f"from step {slow.first}" + (" on" if until is None else f" to {until}")
        return Verdict(
            "run", f"the whole run is {100 * (growth - 1):.0f}% slower {when}: all ranks alike",
            f"{1e3 * took:.1f} ms of work per step on the quickest rank, {1e3 * usual:.1f} ms in steps {best.first} to "
            f"{best.last}{why}",
            cause.advice or "look at what the ranks share: clocks and power limits, other jobs on the nodes, storage",
            cost, cost / max(slow.step_s / slow.count, 1e-9), (), "compute", slow.first, until, cause.name,
        )  # fmt: skip
