"""Waterfall and blame while a run trains: on rank 0, from the gathered windows, in a thread of its own.

Nothing here grows with the run: the last ``KEEP`` windows are kept, each one mean step a rank.
"""

from __future__ import annotations

import math
import queue
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np

from trainsys.layout import Layout
from trainsys.profiler.blame import judge_window
from trainsys.profiler.expected import StageWork
from trainsys.profiler.findings import Findings
from trainsys.profiler.slowdown import Slowdown
from trainsys.profiler.steps import Capture, Floats, table_of_windows
from trainsys.profiler.verdict import ALPHA, Verdict
from trainsys.profiler.waits import work_between
from trainsys.profiler.waterfall import Work, waterfall
from trainsys.telemetry.events import Flops
from trainsys.telemetry.vectors import PLACE
from trainsys.threads import helper

KEEP = 32
EVERY = 8
"""Windows between two looks."""
DEPTH = 64
LEAST = 16
"""Windows without which nobody is accused."""
WARM_UP = 5
"""First steps, of caches, compilation and allocators, which say nothing of later ones."""


class LiveWatch:
    """``add`` returns at once. ``found`` is called for each verdict that is new, worse, lasting or over (``findings``),
    ``show`` with ``waterfall/*`` in ms.

    Arguments:
        peak_flops: FLOP/s of one rank, or None; ``measured``: it is no catalogue's.
        recompute_share: of forward FLOPs, that backward repeats.
        hosts: each rank's node, so that a slow one is one finding.
        stages: what each pipeline stage has to compute.
        found, show: called from the watch's thread; ``show`` takes (step, metrics).
    """

    def __init__(
        self,
        layout: Layout,
        peak_flops: float | None,
        found: Callable[[Verdict], None],
        show: Callable[[int, dict[str, float]], None],
        recompute_share: float = 0.0,
        measured: bool = False,
        hosts: Sequence[str] = (),
        stages: StageWork | None = None,
    ) -> None:
        self._layout, self._peak, self._share = layout, peak_flops, recompute_share
        self._measured, self._stages = measured, stages
        self._hosts = dict(enumerate(hosts))
        self._found, self._show = found, show
        self._windows: deque[tuple[Floats, Flops | None]] = deque(maxlen=KEEP)
        self._findings, self._slowdown = Findings(), Slowdown()
        self._looks = 0
        self._first: int | None = None
        """The step of the first window."""
        self.last_step = -1
        """The last step that was looked at."""
        self._count = 0
        self._captures: list[Capture] = []
        self._calls: queue.SimpleQueue[tuple[Floats, Flops | None] | None] = queue.SimpleQueue()
        self._thread = helper("watch", self._work)
        self._thread.start()

    def add(self, ranks: Floats, flops: Flops | None) -> None:
        """A window ``[R, V]``: each rank's mean step (``telemetry.vectors``); ``flops`` of a step over all ranks."""
        if self._calls.qsize() < DEPTH:
            self._calls.put((ranks, flops))

    def refine(self, capture: Capture) -> None:
        """What a profiler capture of this rank has shown splits compute from now on."""
        self._captures = [capture]

    def close(self, timeout_s: float = 5.0) -> None:
        """Look at what is queued, then end."""
        self._calls.put(None)
        self._thread.join(timeout_s)

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            self.take(*call)

    def take(self, ranks: Floats, flops: Flops | None) -> None:
        """What ``add`` asks the watch's thread to do."""
        # By quantity, which is how they are read: at 16,384 ranks that is ten times as fast.
        self._windows.append((np.ascontiguousarray(ranks.T), flops))
        if self._first is None:
            self._first = int(ranks[0, PLACE["step"]])
        self._count += 1
        if self._count % EVERY == 0:
            self._look()

    def _look(self) -> None:
        """The looks of a run share one ``ALPHA``, however many there will be: look k may use 6 / (pi k)^2 of it."""
        recent = list(self._windows)
        table = table_of_windows([w for w, _ in recent], [f for _, f in recent], self._layout)
        table.captures, table.hosts, table.stages = self._captures, self._hosts, self._stages
        last = self.last_step = int(table.steps[-1])
        model, hardware = table.flops_model, table.flops_hardware
        padding = np.maximum(0.0, hardware - self._share * hardware / (3 + self._share) - model)
        newest = table.select(np.arange(max(0, len(table.steps) - EVERY), len(table.steps)))
        work = Work(padding[-len(newest.steps) :], np.zeros(len(newest.steps)), self._share)
        fall = waterfall(newest, self._peak, work, self._measured)
        if fall is not None:
            self._show(last, {f"waterfall/{t.name.replace('/', '_')}_ms": 1e3 * t.seconds for t in fall.terms})
        begin = (self._first or 0) + WARM_UP
        fresh = newest.select(newest.work & (newest.steps >= begin))
        self._slowdown.add(fresh, work_between(fresh))
        warm = table.select(np.flatnonzero(table.steps >= begin))
        verdicts = self._slowdown.verdicts()
        if len(warm.steps) >= LEAST and len(table.ranks) > 1 and warm.work.all():
            self._looks += 1
            verdicts += judge_window(warm, ALPHA * 6 / (math.pi * self._looks) ** 2)
        for verdict in self._findings.look(verdicts, self._count, last):
            self._found(verdict)
