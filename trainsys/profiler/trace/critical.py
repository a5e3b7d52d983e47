"""Critical path of a rank, and what-if: how long the span had been with one thing ideal."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from trainsys.profiler.trace.classify import CLASS_NAMES, COMM, COMPUTE, COPY, MATMUL
from trainsys.profiler.trace.columns import RankTrace
from trainsys.profiler.trace.graph import HOST, KIND_NAMES, Graph, build
from trainsys.profiler.trace.intervals import EMPTY, Ints, merge, subtract, total, union
from trainsys.profiler.trace.link import Launches
from trainsys.profiler.trace.replay import replay
from trainsys.profiler.trace.whatif import WhatIf, what_ifs


@dataclass(frozen=True, slots=True)
class Stretch:
    """``[start, end)`` ns of a critical path, and what held it then: ``kind`` in general, ``name`` in particular."""

    start: int
    end: int
    kind: str
    name: str


@dataclass(slots=True)
class CriticalPath:
    """``by_kind``: ns of the path by what held it; sums to ``span_ns``. ``top``: names with most of it.

    ``faithful``: the unchanged replay ended when the trace did; where not, no what-if is given.
    """

    span_ns: int
    by_kind: dict[str, int]
    top: list[tuple[str, str, int]]
    what_if: list[WhatIf] = field(default_factory=list)
    withheld: dict[str, str] = field(default_factory=dict)
    """What-ifs that the trace cannot answer, and why."""
    inferred: int = 0
    faithful: bool = True


def critical_path(
    trace: RankTrace, kinds: Ints, launches: Launches, waits: Ints | None = None
) -> CriticalPath | None:
    """Of the whole trace. ``waits``: ns of each device activity spent waiting for other ranks, if matched.

    None without device activities. O(n log n); about 2 s per million activities and calls.
    """
    if not len(trace.device):
        return None
    g = build(trace, kinds, launches)
    low, high = int(trace.device.start.min()), int(trace.device.end.max())
    by_kind: Counter[str] = Counter()
    by_name: Counter[tuple[str, str]] = Counter()
    for stretch in _settled(_walk(g, trace, low), trace, kinds):
        by_kind[stretch.kind] += stretch.end - stretch.start
        by_name[stretch.kind, stretch.name] += stretch.end - stretch.start
    top = [(kind, name, ns) for (kind, name), ns in by_name.most_common(25)]
    out = CriticalPath(high - low, dict(by_kind), top, inferred=g.inferred)
    out.faithful = replay(g) == g.end
    if out.faithful:
        busy = total(union(trace.device.start, trace.device.end))
        out.what_if, out.withheld = what_ifs(g, high - low - busy, _waits_by_node(g, waits))
    return out


def stretches(trace: RankTrace, kinds: Ints, launches: Launches) -> list[Stretch]:
    """The critical path itself, in order of time: adjacent, and together the whole of the trace's span."""
    if not len(trace.device):
        return []
    path = _walk(build(trace, kinds, launches), trace, int(trace.device.start.min()))
    return _settled(path, trace, kinds)


_ON_HOST = frozenset({"host", "data", "sync", "launch"})


def _settled(path: list[Stretch], trace: RankTrace, kinds: Ints) -> list[Stretch]:
    """The path, in which the host holds up only an idle device: while kernels run, they do.

    So the host's share never exceeds the idle share, whatever waits for the device were not recognised as such.
    """
    device = trace.device
    runs: list[tuple[int, int, str]] = []
    taken = EMPTY
    for k in (MATMUL, COMPUTE, COMM, COPY):
        own = subtract(union(device.start[kinds == k], device.end[kinds == k]), taken)
        taken = merge(taken, own)
        runs += [(a, b, CLASS_NAMES[k]) for a, b in zip(*(x.tolist() for x in own), strict=True)]
    runs.sort()
    out: list[Stretch] = []
    i = 0  # the first run that ends after what is settled
    for part in reversed(path):
        if part.kind not in _ON_HOST:
            out.append(part)
            continue
        at = part.start
        while i < len(runs) and runs[i][1] <= at:
            i += 1
        while i < len(runs) and runs[i][0] < part.end:
            start, end, kind = runs[i]
            start, until = max(start, at), min(end, part.end)
            if start > at:
                out.append(Stretch(at, start, part.kind, part.name))
            out.append(Stretch(start, until, kind, "while the host went on"))
            at = until
            if end > part.end:
                break
            i += 1
        if at < part.end:
            out.append(Stretch(at, part.end, part.kind, part.name))
    return out


def _walk(g: Graph, trace: RankTrace, low: int) -> list[Stretch]:
    """From the last end back: at each node its own time, then its lag, then the cause that held it."""
    device_nodes = [i for i in range(len(g.start)) if g.kind[i] < HOST]
    node = max(device_nodes, key=lambda i: g.end[i])
    path: list[Stretch] = []
    now = g.end[node]

    def spend(kind: str, name: str, until: int) -> None:
        nonlocal now
        until = max(until, low)
        if now > until:
            path.append(Stretch(until, now, kind, name))
        now = min(now, until)

    while now > low:
        name, kind = trace.names[g.name[node]], KIND_NAMES[g.kind[node]]
        held_by = max((c for c, _ in g.blocked[node]), key=lambda c: g.end[c], default=-1)
        if held_by >= 0 and now > g.end[held_by] > g.start[node]:
            spend("sync", name, g.end[held_by])
            node = held_by
            continue
        spend(kind, name, g.start[node])
        after = g.after[node]
        causes = (*(c for c, _ in g.causes[node]), after.program, after.held_by if after.sure else -1)
        options = [(g.end[c], c) for c in causes if c >= 0]
        if g.launch[node][0] >= 0:
            options.append((g.start[g.launch[node][0]], g.launch[node][0]))
        if not options:
            spend("host", "before the first recorded call", low)
            break
        ready, cause = max(options)
        # Between the last cause and the start: the host thinking, or the device's own latency.
        if g.kind[node] >= HOST:
            spend("data" if after.data * 2 > now - ready > 0 else "host", f"before {name}", ready)
        else:
            spend("launch" if g.kind[cause] >= HOST else "device gap", f"before {name}", ready)
        node = cause
    return path


def _waits_by_node(g: Graph, waits: Ints | None) -> list[int] | None:
    if waits is None or not waits.any():
        return None
    order = iter(waits.tolist())
    # Device nodes appear in the graph in their order of start, as the columns do.
    return [next(order) if k < HOST else 0 for k in g.kind]
