"""Device work to the host calls that launched it, and to the profiler step it belongs to."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from trainsys.profiler.trace.columns import Calls, RankTrace
from trainsys.profiler.trace.intervals import Ints

STEP = re.compile(r"^ProfilerStep#(\d+)$")


@dataclass(frozen=True, slots=True)
class Launches:
    """For each device activity, the runtime call that launched it; ``index`` -1 where none was recorded."""

    index: Ints
    start: Ints
    end: Ints
    thread: Ints

    @property
    def unlinked(self) -> int:
        return int((self.index < 0).sum())


def link_launches(trace: RankTrace) -> Launches:
    """Match by correlation id. Unlinked activities get start = end = -1."""
    device, runtime = trace.device, trace.runtime
    n = len(device)
    index = np.full(n, -1, np.int64)
    have = np.flatnonzero(runtime.correlation >= 0)
    if have.size and n:
        order = have[np.argsort(runtime.correlation[have], kind="stable")]
        ids = runtime.correlation[order]
        at = np.minimum(np.searchsorted(ids, device.correlation), ids.size - 1)
        hit = (ids[at] == device.correlation) & (device.correlation >= 0)
        index[hit] = order[at[hit]]
    linked = index >= 0
    safe = np.maximum(index, 0)
    none = np.full(n, -1, np.int64)
    if not len(runtime):
        return Launches(index, none, none, none)
    return Launches(
        index,
        np.where(linked, runtime.start[safe], -1),
        np.where(linked, runtime.end[safe], -1),
        np.where(linked, runtime.thread[safe], -1),
    )


@dataclass(frozen=True, slots=True)
class Step:
    """One profiler step: its number and its stretch ``[start, end)`` of the device's time (ns)."""

    number: int
    start: int
    end: int


def find_steps(trace: RankTrace, launches: Launches) -> list[Step]:
    """The device's stretch of each ``ProfilerStep#n``.

    A step begins, on the device, with the first activity launched during it on the host, and lasts until
    the next begins; the last one ends with the device's last activity. So the steps are disjoint and a
    kernel that outlives its host step is not lost. Without launch records host times are used as they are.
    """
    marks: list[tuple[int, int, int]] = []
    for i in range(len(trace.notes)):
        found = STEP.match(trace.names[trace.notes.name[i]])
        if found:
            marks.append((int(trace.notes.start[i]), int(trace.notes.end[i]), int(found.group(1))))
    marks = sorted(set(marks))
    if not marks:
        return []
    linked = launches.index >= 0
    if not linked.any():
        return [Step(n, a, b) for a, b, n in marks]
    begun = np.sort(launches.start[linked])
    starts_by_launch = trace.device.start[linked][np.argsort(launches.start[linked], kind="stable")]
    out: list[Step] = []
    for a, b, n in marks:
        i, j = int(np.searchsorted(begun, a)), int(np.searchsorted(begun, b))
        if i < j:
            out.append(Step(n, int(starts_by_launch[i:j].min()), 0))
    # Streams overlap: a step may seem to begin before its predecessor does. Keep them in order.
    last = int(trace.device.end.max())
    bounds = np.maximum.accumulate([s.start for s in out] + [last]).tolist() if out else []
    return [Step(s.number, bounds[i], bounds[i + 1]) for i, s in enumerate(out)]


def inside_calls(
    calls: Calls, chosen: Ints, at: Ints, thread: Ints
) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """For each (instant, thread): whether one of the chosen calls of that thread is then open."""
    from trainsys.profiler.trace.intervals import contains, union

    out = np.zeros(at.size, bool)
    for t in np.unique(calls.thread[chosen]):
        mine = chosen[calls.thread[chosen] == t]
        here = thread == t
        out[here] = contains(union(calls.start[mine], calls.end[mine]), at[here])
    return out


def enclosing(calls: Calls, at: Ints, thread: Ints) -> Ints:
    """For each (instant, thread): the index of the latest-started call of that thread open then, or -1.

    Right for calls that do not nest in each other, as leaf operators do not.
    """
    out = np.full(at.size, -1, np.int64)
    for t in np.unique(calls.thread):
        mine = np.flatnonzero(calls.thread == t)
        here = np.flatnonzero(thread == t)
        i = np.searchsorted(calls.start[mine], at[here], "right") - 1
        ok = (i >= 0) & (at[here] < calls.end[mine[np.maximum(i, 0)]])
        out[here[ok]] = mine[i[ok]]
    return out
