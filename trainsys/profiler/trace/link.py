"""Device work to the host calls that launched it, and to the profiler step it belongs to."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from trainsys.profiler.trace.columns import Calls, RankTrace
from trainsys.profiler.trace.intervals import Ints, contains, distinct, union

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


def launch_times(trace: RankTrace, launches: Launches) -> Ints:
    """When each activity was launched; where no launch is recorded, when the one before it on its stream was."""
    device = trace.device
    lane = device.device * 1_000_003 + device.stream
    out = np.where(launches.index >= 0, launches.start, np.iinfo(np.int64).min)
    for key in distinct(lane):
        mine = np.flatnonzero(lane == key)
        out[mine] = np.maximum.accumulate(out[mine])
    return out


@dataclass(frozen=True, slots=True)
class Step:
    """One profiler step: its number and its stretch ``[start, end)`` of the device's time (ns)."""

    number: int
    start: int
    end: int


def host_steps(trace: RankTrace) -> list[tuple[int, int, int]]:
    """(start, end, number) of each ``ProfilerStep#n`` on the host, in order."""
    number = np.array([int(m.group(1)) if (m := STEP.match(n)) else -1 for n in trace.names], np.int64)
    notes = trace.notes
    chosen = np.flatnonzero(number[notes.name] >= 0) if len(notes) else np.zeros(0, np.int64)
    columns = (notes.start[chosen], notes.end[chosen], number[notes.name[chosen]])
    return sorted(set(zip(*(c.tolist() for c in columns), strict=True)))


def steps_at(trace: RankTrace, at: Ints) -> Ints:
    """The number of the profiler step the host was in at each instant, -1 outside of any."""
    marks = host_steps(trace)
    if not marks:
        return np.full(at.size, -1, np.int64)
    begin, end, number = (np.array(column, np.int64) for column in zip(*marks, strict=True))
    i = np.searchsorted(begin, at, "right") - 1
    return np.where((i >= 0) & (at < end[np.maximum(i, 0)]), number[np.maximum(i, 0)], -1)


def find_steps(trace: RankTrace, launches: Launches) -> list[Step]:
    """The device's stretch of each ``ProfilerStep#n``.

    A step begins, on the device, with the first activity launched during it on the host, and lasts until
    the next begins; the last one ends with the device's last activity. So the steps are disjoint and a
    kernel that outlives its host step is not lost. Without launch records host times are used as they are.
    """
    marks = host_steps(trace)
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
    out = np.zeros(at.size, bool)
    for t in distinct(calls.thread[chosen]):
        mine = chosen[calls.thread[chosen] == t]
        here = thread == t
        out[here] = contains(union(calls.start[mine], calls.end[mine]), at[here])
    return out


def enclosing(calls: Calls, at: Ints, thread: Ints) -> Ints:
    """For each (instant, thread): the index of the latest-started call of that thread open then, or -1.

    Right for calls that do not nest in each other, as leaf operators do not.
    """
    out = np.full(at.size, -1, np.int64)
    for t in distinct(calls.thread):
        mine = np.flatnonzero(calls.thread == t)
        here = np.flatnonzero(thread == t)
        i = np.searchsorted(calls.start[mine], at[here], "right") - 1
        ok = (i >= 0) & (at[here] < calls.end[mine[np.maximum(i, 0)]])
        out[here[ok]] = mine[i[ok]]
    return out
