"""The trace as a graph of what waited for what: its critical path, and the step had something been faster.

Nodes are host calls and device activities. An activity starts after the one before it on its stream, after
its launch, and after the activity of another stream it was seen to wait for; a host call starts after the one
before it on its thread; a synchronising call ends after what it waited for. Whatever time is left between a
node and the last of its causes is the node's own *lag* and is kept. So with nothing changed the replay
reproduces the trace exactly, and a change moves all that depended on it and nothing else.

What it does not know: CUDA events name no stream in a trace, so a dependency between streams is inferred
where an activity starts within ``NEAR_NS`` of another stream's end and nothing else explains its start.
After Holmes et al.'s and HTA's critical path, and what-if analysis as in Daydream (Zhu et al. 2020).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trainsys.profiler.trace.classify import CLASS_NAMES
from trainsys.profiler.trace.columns import RankTrace
from trainsys.profiler.trace.idle import SYNC, data_spans
from trainsys.profiler.trace.intervals import Ints, covered
from trainsys.profiler.trace.link import Launches

NEAR_NS = 20_000
HELD_NS = 50_000
"""A host that does nothing for less may as well be thinking."""
RETURN_NS = 15_000
"""It goes on this soon after what it waited for has ended."""
_NONE = -1


@dataclass(slots=True)
class Graph:
    """Nodes in an order in which causes come first. ``start[i] = max(ready of causes) + lag[i]``.

    ``at_start``: cause is done when it has started (a launch) rather than ended.
    """

    length: list[int]
    lag: list[int]
    causes: list[tuple[int, ...]]
    launch_of: list[int]
    start: list[int]
    end: list[int]
    kind: list[int]
    """Class of a device activity (``classify``); HOST or SYNCED for a host call."""
    name: list[int]
    data_wait: list[int]
    """The part of the lag spent in a data loader."""
    inferred: int
    """Dependencies between streams that were inferred."""


HOST, SYNCED = len(CLASS_NAMES), len(CLASS_NAMES) + 1
KIND_NAMES = (*CLASS_NAMES, "host", "sync")


def build(trace: RankTrace, kinds: Ints, launches: Launches) -> Graph:
    device, runtime = trace.device, trace.runtime
    nd, nh = len(device), len(runtime)
    synced = np.array([SYNC.search(n) is not None for n in trace.names], bool)
    is_sync = synced[runtime.name] if nh else np.zeros(0, bool)
    thread_prev = _previous(runtime.thread, np.arange(nh)) if nh else np.zeros(0, np.int64)
    is_sync |= _held(trace, launches, runtime.start, runtime.end) >= 0
    begin_gap = (
        np.where(thread_prev >= 0, runtime.end[np.maximum(thread_prev, 0)], runtime.start)
        if nh
        else runtime.start
    )
    held_by = _held(trace, launches, begin_gap, runtime.start)
    start = np.concatenate([runtime.start, device.start])
    end = np.concatenate([runtime.end, device.end])
    kind = np.concatenate([np.where(is_sync, SYNCED, HOST), kinds]).astype(np.int64)
    # Host calls by start; an activity by start too, after its launch; a synchronising call by its end, so that
    # what it waited for stands before it.
    key = start.copy()
    key[:nh][is_sync] = end[:nh][is_sync]
    order = np.lexsort((np.arange(nh + nd) >= nh, key))
    place = np.empty(nh + nd, np.int64)
    place[order] = np.arange(nh + nd)

    stream_prev, other = _stream_causes(trace, launches)
    waited = _waited_for(trace, is_sync)
    loading = data_spans(trace)
    g = Graph([], [], [], [], [], [], [], np.concatenate([runtime.name, device.name])[order].tolist(), [], 0)
    starts, ends = start.tolist(), end.tolist()
    for node in order.tolist():
        causes: list[int] = []
        launch = _NONE
        if node < nh:
            if thread_prev[node] >= 0:
                causes.append(int(place[thread_prev[node]]))
            if held_by[node] >= 0:
                causes.append(int(place[nh + held_by[node]]))
                g.inferred += 1
        else:
            i = node - nh
            if stream_prev[i] >= 0:
                causes.append(int(place[nh + stream_prev[i]]))
            if other[i] >= 0:
                causes.append(int(place[nh + other[i]]))
                g.inferred += 1
            if launches.index[i] >= 0:
                launch = int(place[launches.index[i]])
        at = len(g.start)
        causes = [c for c in causes if c < at]
        launch = launch if launch < at else _NONE
        s, e = starts[node], ends[node]
        ready = max([g.end[c] for c in causes] + ([g.start[launch]] if launch >= 0 else []), default=s)
        g.start.append(s)
        g.end.append(e)
        g.lag.append(s - ready)
        if node < nh and is_sync[node]:
            # Its end follows what it waited for; what is left of its length is its own overhead.
            target = int(place[nh + waited[node]]) if waited[node] >= 0 else _NONE
            if 0 <= target < at:
                launch = target
        g.length.append(e - s)
        g.causes.append(tuple(causes))
        g.launch_of.append(launch)
    g.kind = kind[order].tolist()
    lag_from = np.array(g.start) - np.maximum(np.array(g.lag), 0)
    g.data_wait = covered(loading, lag_from, np.array(g.start)).tolist() if g.start else []
    return g


def _previous(lane: Ints, order: Ints) -> Ints:
    """For each element (given in time order) the one before it in its lane, or -1."""
    out = np.full(lane.size, _NONE, np.int64)
    by_lane = order[np.argsort(lane[order], kind="stable")]
    same = lane[by_lane][1:] == lane[by_lane][:-1]
    out[by_lane[1:][same]] = by_lane[:-1][same]
    return out


def _stream_causes(trace: RankTrace, launches: Launches) -> tuple[Ints, Ints]:
    """(the activity before on the same stream, the one of another stream it seems to have waited for)."""
    device = trace.device
    n = len(device)
    lane = device.device * 1_000_003 + device.stream
    before = _previous(lane, np.arange(n))
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


def _held(trace: RankTrace, launches: Launches, begin: Ints, end: Ints) -> Ints:
    """For each stretch of a host thread: the activity whose end ended it, or -1.

    A program that reads a result, copies to pageable memory or polls an event makes no synchronising call, or a
    short one again and again; what shows is that it goes on just after something ended that it had launched before.
    """
    device = trace.device
    out = np.full(begin.size, _NONE, np.int64)
    if not len(device) or not begin.size:
        return out
    by_end = np.argsort(device.end, kind="stable")
    last = by_end[np.maximum(np.searchsorted(device.end[by_end], end, "right") - 1, 0)]
    after = end - device.end[last]
    hit = (end - begin >= HELD_NS) & (after >= 0) & (after <= RETURN_NS) & (device.end[last] > begin)
    hit &= (launches.start[last] >= 0) & (launches.start[last] <= begin)
    out[hit] = last[hit]
    return out


def _waited_for(trace: RankTrace, is_sync: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> Ints:
    """For a synchronising call, the last activity to end within it; -1 if it found the device idle."""
    device, runtime = trace.device, trace.runtime
    out = np.full(len(runtime), _NONE, np.int64)
    if not len(device) or not is_sync.any():
        return out
    by_end = np.argsort(device.end, kind="stable")
    ends = device.end[by_end]
    at = np.searchsorted(ends, runtime.end, "right") - 1
    last = by_end[np.maximum(at, 0)]
    ok = is_sync & (at >= 0) & (device.end[last] > runtime.start)
    out[ok] = last[ok]
    return out


def replay(g: Graph, length: list[int] | None = None, lag: list[int] | None = None) -> list[int]:
    """End of every node with the given lengths and lags in place of the trace's."""
    length, lag = length or g.length, lag or g.lag
    end: list[int] = []
    start: list[int] = []
    causes, launch_of, kind = g.causes, g.launch_of, g.kind
    for i in range(len(g.start)):
        ready = _NONE
        for c in causes[i]:
            if end[c] > ready:
                ready = end[c]
        launch = launch_of[i]
        if kind[i] != SYNCED:
            if launch >= 0 and start[launch] > ready:
                ready = start[launch]
            begin = (ready if ready >= 0 else g.start[i] - lag[i]) + lag[i]
            start.append(begin)
            end.append(begin + length[i])
        else:
            begin = (ready if ready >= 0 else g.start[i] - lag[i]) + lag[i]
            start.append(begin)
            # The overhead after what it waited for is kept; waiting itself is not.
            end.append(
                max(begin, end[launch]) + g.end[i] - max(g.start[i], g.end[launch])
                if launch >= 0
                else begin + length[i]
            )
    return end
