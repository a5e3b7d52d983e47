"""A launch blocks while as many activities are under way as the queue holds: another wait for the device."""

from __future__ import annotations

import numpy as np

from trainsys.profiler.trace.columns import RankTrace
from trainsys.profiler.trace.intervals import Ints
from trainsys.profiler.trace.link import Launches
from trainsys.profiler.trace.polling import Loops

_LEAST, _SEEN = 16, 16
"""A queue is no shorter, and it shows only where it was full this often."""


def queue_targets(trace: RankTrace, launches: Launches, loops: Loops, targets: list[tuple[int, ...]]) -> None:
    """If the queue was full at times: by launch, the activity that must end before it, added to ``targets``."""
    linked = np.flatnonzero(launches.index >= 0)
    if linked.size < _LEAST + _SEEN:
        return
    calls = loops.calls
    call = loops.place[launches.index[linked]]
    order = np.argsort(calls.start[call], kind="stable")
    linked, call = linked[order], call[order]
    start, end, ended = calls.start[call], calls.end[call], np.sort(trace.device.end[linked])
    waiting = np.arange(linked.size) + 1 - np.searchsorted(ended, end, "right")
    depth = int(waiting.max())
    full, free = waiting >= 0.9 * depth, (end - start)[waiting < 0.5 * depth]
    if depth < _LEAST or not free.size:
        return
    blocked = full & (end - start > 3 * np.median(free))
    # Where launches at the greatest depth take no longer than others, it is merely how far the host got ahead.
    if blocked.sum() < _SEEN or 2 * blocked.sum() < full.sum():
        return
    _add(linked, call, depth, trace.device.end, end, targets)


def _add(
    linked: Ints, call: Ints, depth: int, ended: Ints, end: Ints, targets: list[tuple[int, ...]]
) -> None:
    for i in range(depth, linked.size):
        released_by = linked[i - depth]
        if not targets[call[i]] and ended[released_by] <= end[i]:
            targets[call[i]] = (int(released_by),)
