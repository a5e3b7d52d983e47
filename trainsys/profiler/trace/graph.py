"""The trace as a graph of what waited for what.

Nodes are host calls and device activities. An activity starts after the one before it on its stream, after
its launch, and after the activity of another stream it waits for; a host call starts after the one before it on its
thread, after what the thread waited for (``hostwaits``), or after the thread that handed over to it; a call that
blocks ends after what it waited for. Each dependency has its *lag*: what passes between the cause and its effect. The
lag of the cause that held a node up is what the trace shows, that of the others what is usual, so with nothing changed
a replay reproduces the trace exactly, and a change moves all that depended on it and nothing else.

After Holmes et al.'s and HTA's critical path, and what-if analysis as in Daydream (Zhu et al. 2020).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from trainsys.profiler.trace.classify import CLASS_NAMES
from trainsys.profiler.trace.columns import RankTrace
from trainsys.profiler.trace.fetches import worker_fetches
from trainsys.profiler.trace.hostwaits import HostWaits, find_waits
from trainsys.profiler.trace.idle import data_spans
from trainsys.profiler.trace.intervals import Ints, covered
from trainsys.profiler.trace.link import Launches
from trainsys.profiler.trace.relaunch import with_lost_launches
from trainsys.profiler.trace.streamwaits import called_for, seen_near
from trainsys.profiler.trace.usual import Usual, usual

_NONE = -1
HOST, SYNCED = len(CLASS_NAMES), len(CLASS_NAMES) + 1
KIND_NAMES = (*CLASS_NAMES, "host", "sync")
Edges = tuple[tuple[int, int], ...]
"""(cause, lag): no sooner than the lag after the cause has ended."""


@dataclass(frozen=True, slots=True)
class After:
    """A host between two calls: it thinks, may wait for the device without a call, and thinks again. Times in ns."""

    program: int
    """The node of the call before; -1: there is none, and the call starts when it did."""
    before: int = 0
    gap: int = 0
    rest: int = 0
    data: int = 0
    """Of the rest, in a data loader."""
    held_by: int = -1
    """The node that the gap was, or may have been, a wait for."""
    back: int = 0
    """From that node's end to the gap's; negative where it freed the host before its end."""
    sure: bool = True


_FREE = After(_NONE)


@dataclass(slots=True)
class Graph:
    """Nodes in an order in which causes come first. A node without causes starts when it did."""

    start: list[int] = field(default_factory=list)
    end: list[int] = field(default_factory=list)
    kind: list[int] = field(default_factory=list)
    """Class of a device activity (``classify``); HOST or SYNCED (it waited for the device) for a host call."""
    name: list[int] = field(default_factory=list)
    length: list[int] = field(default_factory=list)
    """What the node takes by itself: of a call that waited, without the waiting."""
    causes: list[Edges] = field(default_factory=list)
    launch: list[tuple[int, int]] = field(default_factory=list)
    """Of an activity: (its launch, lag from that call's start), or (-1, 0)."""
    blocked: list[Edges] = field(default_factory=list)
    """Of a call: what must have ended before it ends."""
    after: list[After] = field(default_factory=list)
    """Of a call: what the host did since the call before it."""
    fetch: list[tuple[int, int]] = field(default_factory=list)
    """Of a call that follows a batch which loader workers were late with: (the call after the last batch, lag)."""
    inferred: int = 0
    """Dependencies that were inferred: between streams, and of the host on the device."""


def build(trace: RankTrace, kinds: Ints, launches: Launches) -> Graph:
    recorded = launches
    trace, launches = with_lost_launches(trace, launches)
    waits = find_waits(trace, launches)
    calls, device = waits.calls, trace.device
    nh, nd = len(calls), len(device)
    starts = calls.start.tolist()
    waited = (any(device.end[a] > begun for a in t) for t, begun in zip(waits.targets, starts, strict=True))
    synced = np.fromiter(waited, bool, nh)
    start, end = np.concatenate([calls.start, device.start]), np.concatenate([calls.end, device.end])
    # Host calls by start; an activity by start too, after its launch; a call that waits, and one that comes after a
    # wait, stands after what it waited for.
    key = start.copy()
    blocking = np.array([bool(t) for t in waits.targets], bool)
    key[:nh][blocking] = end[:nh][blocking]
    order = np.lexsort((np.arange(nh + nd) >= nh, key))
    place = np.empty(nh + nd, np.int64)
    place[order] = np.arange(nh + nd)
    g = Graph(start=start[order].tolist(), end=end[order].tolist())
    g.name = np.concatenate([calls.name, device.name])[order].tolist()
    g.kind = np.concatenate([np.where(synced, SYNCED, HOST), kinds]).astype(np.int64)[order].tolist()
    builder = _Builder(g, place.tolist(), nh, usual(trace, recorded, calls, waits.targets))
    builder.hosts = _host_columns(trace, waits)
    before, near = seen_near(trace, launches)
    builder.before, builder.near = before.tolist(), near.tolist()
    builder.called = called_for(trace, launches)
    by = np.full(nd, _NONE, np.int64)
    by[launches.index >= 0] = waits.place[launches.index[launches.index >= 0]]
    builder.launched_by = by.tolist()
    builder.targets = waits.targets
    for at, node in enumerate(order.tolist()):
        if node < nh:
            builder.call(at, node)
        else:
            builder.activity(at, node - nh)
    return g


@dataclass(slots=True)
class _Hosts:
    waits: HostWaits
    before: list[int]
    handed: list[int]
    data: list[int]
    fetch: list[int]


def _host_columns(trace: RankTrace, waits: HostWaits) -> _Hosts:
    calls, handed = waits.calls, waits.handed
    cause = np.where(handed >= 0, handed, waits.before)
    since = np.where(cause >= 0, calls.end[np.maximum(cause, 0)], calls.start) if len(calls) else calls.start
    for i, gap in waits.gaps.items():
        since[i] = gap.high
    data = covered(data_spans(trace), np.minimum(since, calls.start), calls.start)
    fetch = worker_fetches(trace, calls)
    return _Hosts(waits, *(c.tolist() for c in (waits.before, handed, data, fetch)))


class _Builder:
    """Adds nodes one by one, in order."""

    hosts: _Hosts
    before: list[int]
    near: list[int]
    called: list[tuple[int, ...]]
    launched_by: list[int]
    targets: list[tuple[int, ...]]

    def __init__(self, g: Graph, place: list[int], nh: int, usual: Usual) -> None:
        self.g, self.place, self.nh, self.usual = g, place, nh, usual

    def _add(self, length: int, causes: Edges, launch: tuple[int, int], blocked: Edges) -> None:
        g = self.g
        g.length.append(length)
        g.causes.append(causes)
        g.launch.append(launch)
        g.blocked.append(blocked)

    def activity(self, at: int, i: int) -> None:
        g, u = self.g, self.usual
        begin = g.start[at]
        found: dict[int, int] = {}
        if self.before[i] >= 0:
            found[self.place[self.nh + self.before[i]]] = u.gap
        for other in (*self.called[i], self.near[i]):
            if other >= 0:
                found.setdefault(self.place[self.nh + other], u.cross)
                g.inferred += other == self.near[i]
        edges = [(c, min(lag, begin - g.end[c])) for c, lag in found.items() if c < at and g.end[c] <= begin]
        # Streams that overlap themselves (graphs, damaged times): after its begin is all that is known.
        edges += [(c, begin - g.end[c]) for c in found if c < at and g.end[c] > begin]
        call = self.launched_by[i]
        launch = (_NONE, 0)
        if call >= 0 and self.place[call] < at:
            node = self.place[call]
            launch = (node, min(u.latency, begin - g.start[node]))
        ready = max([g.end[c] + lag for c, lag in edges], default=None)
        by_launch = launch[0] >= 0 and (ready is None or g.start[launch[0]] + launch[1] >= ready)
        if by_launch:
            launch = (launch[0], begin - g.start[launch[0]])
        elif ready is not None and ready < begin:
            k = max(range(len(edges)), key=lambda k: g.end[edges[k][0]] + edges[k][1])
            edges[k] = (edges[k][0], begin - g.end[edges[k][0]])
        self._add(g.end[at] - begin, tuple(edges), launch, ())
        g.after.append(_FREE)
        g.fetch.append((_NONE, 0))

    def call(self, at: int, i: int) -> None:
        g, h = self.g, self.hosts
        begin, end = g.start[at], g.end[at]
        g.after.append(self._since(at, i))
        fetch = self.place[h.fetch[i]] if h.fetch[i] >= 0 else _NONE
        g.fetch.append((fetch, begin - g.end[fetch]) if 0 <= fetch < at else (_NONE, 0))
        waited = [(n, g.end[n]) for a in self.targets[i] if (n := self._device(a, at)) >= 0]
        last = max((e for _, e in waited), default=begin)
        own, blocked = end - begin, []
        if last > begin:
            own = min(own, self.usual.own.get(g.name[at], own))
            blocked = [(n, end - e if e == last else min(end - e, end - last)) for n, e in waited]
        else:
            blocked = [(n, min(end - e, self.usual.back)) for n, e in waited]
        self._add(own, (), (_NONE, 0), tuple(blocked))

    def _since(self, at: int, i: int) -> After:
        g, h = self.g, self.hosts
        cause = h.handed[i] if h.handed[i] >= 0 else h.before[i]
        program = self.place[cause] if cause >= 0 else _NONE
        if not 0 <= program < at:
            return _FREE
        begin, left = g.start[at], g.end[program]
        gap = h.waits.gaps.get(i)
        held = self._device(gap.activity, at) if gap is not None else _NONE
        if gap is None or held < 0:
            return After(program, rest=begin - left, data=min(h.data[i], max(0, begin - left)))
        g.inferred += gap.sure
        back, rest = gap.high - g.end[held], begin - gap.high
        return After(program, gap.low - left, gap.high - gap.low, rest, h.data[i], held, back, gap.sure)

    def _device(self, activity: int, at: int) -> int:
        node = self.place[self.nh + activity] if activity >= 0 else _NONE
        return node if node < at else _NONE
