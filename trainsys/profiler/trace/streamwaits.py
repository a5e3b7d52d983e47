"""What an activity waited for on other streams: from the host's order of calls, and from what its start shows.

``cudaStreamWaitEvent`` names neither stream nor event in a trace. The next activity that its thread launches is taken
for the one that waits, and for what it waits for the last of another stream that was launched before the call and had
ended by then; in order, one by one, where as many of the
stream's activities have its name as there are waits for them. Such a dependency
holds even where it cost nothing in the trace and would once something else is faster.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import defaultdict

import numpy as np

from trainsys.profiler.trace.columns import RankTrace
from trainsys.profiler.trace.intervals import Ints, distinct
from trainsys.profiler.trace.link import Launches, launch_times
from trainsys.profiler.trace.lookup import previous

NEAR_NS = 20_000
"""An activity that starts this soon after another stream's end, and for no other reason, waited for it."""
_WAIT = re.compile(r"StreamWaitEvent")
_NONE = -1
_BACK = 64


def lanes(trace: RankTrace) -> Ints:
    return trace.device.device * 1_000_003 + trace.device.stream


def seen_near(trace: RankTrace, launches: Launches) -> tuple[Ints, Ints]:
    """(the activity before on the same stream, the one of another stream that its start shows it waited for)."""
    device = trace.device
    n = len(device)
    lane = lanes(trace)
    before = previous(lane, np.arange(n))
    by_end = np.argsort(device.end, kind="stable")
    ends = device.end[by_end]
    at = np.searchsorted(ends, device.start, "right") - 1
    candidate = np.where(at >= 0, by_end[np.maximum(at, 0)], _NONE)
    ready = np.maximum(np.where(before >= 0, device.end[np.maximum(before, 0)], 0), launches.start)
    gap = device.start - np.where(candidate >= 0, device.end[np.maximum(candidate, 0)], 0)
    seen = (candidate >= 0) & (lane[np.maximum(candidate, 0)] != lane) & (gap <= NEAR_NS)
    seen &= device.end[np.maximum(candidate, 0)] > ready
    # Equal instants and zero lengths could otherwise make a cause of what comes later.
    seen &= candidate != np.arange(n)
    return before, np.where(seen, candidate, _NONE)


def called_for(trace: RankTrace, launches: Launches) -> list[tuple[int, ...]]:
    """For each activity, those of other streams that the ``cudaStreamWaitEvent`` before its launch are for."""
    device, runtime = trace.device, trace.runtime
    out: list[tuple[int, ...]] = [()] * len(device)
    is_wait = np.array([_WAIT.search(s) is not None for s in trace.names], bool)
    if not len(device) or not len(runtime) or not (waits := np.flatnonzero(is_wait[runtime.name])).size:
        return out
    streams = _Streams(trace, launches)
    linked = np.flatnonzero(launches.index >= 0)
    pairs: dict[tuple[int, int, int], list[tuple[int, int]]] = defaultdict(list)
    for thread in distinct(runtime.thread[waits]).tolist():
        mine = linked[launches.thread[linked] == thread]
        mine = mine[np.argsort(launches.start[mine], kind="stable")]
        at = waits[runtime.thread[waits] == thread]
        following = np.searchsorted(launches.start[mine], runtime.end[at])
        calls: dict[int, list[int]] = defaultdict(list)
        for call, k in zip(at.tolist(), following.tolist(), strict=True):
            if k < mine.size:
                calls[int(mine[k])].append(int(runtime.start[call]))
        for waiter, times in calls.items():
            for source, activity in streams.over(waiter, times[-1])[: len(times)]:
                name = int(device.name[activity])
                pairs[int(streams.lane[waiter]), source, name].append((waiter, activity))
    for (_, source, name), found in pairs.items():
        of_source = streams.members[source]
        of_source = of_source[device.name[of_source] == name]
        waiters = np.array([w for w, _ in found])
        in_order = len(found) == of_source.size and (device.end[of_source] <= device.start[waiters]).all()
        sources = of_source.tolist() if in_order else [a for _, a in found]
        for waiter, activity in zip(waiters.tolist(), sources, strict=True):
            out[waiter] += (activity,)
    return out


class _Streams:
    def __init__(self, trace: RankTrace, launches: Launches) -> None:
        self.lane, self.device = lanes(trace), trace.device
        launched = launch_times(trace, launches)
        self.members: dict[int, Ints] = {}
        for key in distinct(self.lane).tolist():
            mine = np.flatnonzero(self.lane == key)
            self.members[key] = mine[np.argsort(launched[mine], kind="stable")]
        self._columns: list[tuple[int, list[int], list[int], list[int]]] = [
            (key, *(c.tolist() for c in (mine, launched[mine], trace.device.end[mine])))
            for key, mine in self.members.items()
        ]

    def over(self, waiter: int, at: int) -> list[tuple[int, int]]:
        """(stream, its last activity launched before ``at`` and over when ``waiter`` starts), the last to end first."""
        own, begin = int(self.lane[waiter]), int(self.device.start[waiter])
        found = []
        for key, mine, launched, ends in self._columns:
            if key == own:
                continue
            i = bisect_left(launched, at) - 1
            for j in range(i, max(-1, i - _BACK - 1), -1):
                if ends[j] <= begin:
                    found.append((-ends[j], key, mine[j]))
                    break
        found.sort(key=lambda f: f[0])
        return [(key, j) for _, key, j in found]
