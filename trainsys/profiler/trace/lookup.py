"""What had been launched and what had ended at an instant."""

from __future__ import annotations

from bisect import bisect_left, bisect_right

import numpy as np

from trainsys.profiler.trace.columns import Calls, RankTrace
from trainsys.profiler.trace.intervals import Ints, distinct
from trainsys.profiler.trace.link import Launches, launch_times
from trainsys.profiler.trace.polling import Loops

HELD_NS = 50_000
"""A host that does nothing for less may as well be thinking."""
RETURN_NS = 15_000
"""It goes on this soon after what it waited for has ended."""
CHANCE = 0.1
"""What happens by accident this seldom is taken for no accident."""
_NONE = -1


def previous(lane: Ints, order: Ints) -> Ints:
    """For each element (given in time order) the one before it in its lane, or -1."""
    out = np.full(lane.size, _NONE, np.int64)
    by_lane = order[np.argsort(lane[order], kind="stable")]
    same = lane[by_lane][1:] == lane[by_lane][:-1]
    out[by_lane[1:][same]] = by_lane[:-1][same]
    return out


class Lookup:
    """Which activities had been launched, and which had ended, at an instant."""

    def __init__(self, trace: RankTrace, launches: Launches, calls: Calls, loops: Loops) -> None:
        device = trace.device
        self.end = device.end.tolist()
        self.launched = launch_times(trace, launches)
        by_end = np.argsort(device.end, kind="stable")
        self.by_end: list[int] = by_end.tolist()
        self.ends: list[int] = device.end[by_end].tolist()
        close = np.minimum(np.diff(device.end[by_end]), RETURN_NS)
        self.after_ends: list[int] = np.concatenate([[0], np.cumsum(close)]).tolist()
        lane = device.device * 1_000_003 + device.stream
        self.lane = lane.tolist()
        self.by_lane: dict[int, tuple[list[int], list[int]]] = {}
        for key in distinct(lane).tolist():
            mine = np.flatnonzero(lane == key)
            mine = mine[np.argsort(self.launched[mine], kind="stable")]
            self.by_lane[key] = (self.launched[mine].tolist(), mine.tolist())
        linked = np.flatnonzero(launches.index >= 0)
        call = loops.place[launches.index[linked]]
        self.launching = distinct(calls.thread[call]) if call.size else np.zeros(0, np.int64)
        order = np.argsort(calls.start[call], kind="stable")
        self.by_thread: dict[int, tuple[list[int], list[int]]] = {}
        for t in self.launching.tolist():
            mine = order[calls.thread[call[order]] == t]
            self.by_thread[t] = (calls.start[call[mine]].tolist(), linked[mine].tolist())
        self.launched_list = self.launched.tolist()

    def ended(self, after: int, until: int, launched: int) -> int:
        """The last to end in ``(after, until]`` of those launched no later than ``launched``; -1 if none."""
        i = bisect_right(self.ends, until) - 1
        for j in range(i, max(-1, i - 64), -1):
            if self.ends[j] <= after:
                break
            if self.launched_list[self.by_end[j]] <= launched:
                return self.by_end[j]
        return _NONE

    def last_on(self, lane: int, at: int) -> int:
        times, which = self.by_lane[lane]
        i = bisect_right(times, at) - 1
        return which[i] if i >= 0 else _NONE

    def last_of(self, thread: int, at: int) -> int:
        """What a thread had launched last; -1 if nothing."""
        times, which = self.by_thread.get(thread, ([], []))
        i = bisect_right(times, at) - 1
        return which[i] if i >= 0 else _NONE

    def chance(self, begin: int, end: int) -> float:
        """That an instant of ``[begin, end)`` follows some end by no more than ``RETURN_NS``."""
        i, j = bisect_left(self.ends, begin), bisect_left(self.ends, end)
        if i >= j:
            return 0.0
        after = self.after_ends[j - 1] - self.after_ends[i] + min(end - self.ends[j - 1], RETURN_NS)
        return after / max(1, end - begin)
