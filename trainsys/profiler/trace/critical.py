"""Critical path of a rank, and what-if: how long the span had been with one thing ideal."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from trainsys.profiler.trace.classify import CLASS_NAMES, COMM, COMPUTE, COPY, MATMUL
from trainsys.profiler.trace.columns import RankTrace
from trainsys.profiler.trace.intervals import EMPTY, Ints, clip, complement, merge, subtract, total, union
from trainsys.profiler.trace.link import Launches
from trainsys.profiler.trace.replay import HOST, KIND_NAMES, SYNCED, Graph, build, replay


@dataclass(frozen=True, slots=True)
class WhatIf:
    """``saved_share`` of the span had ``what`` been so."""

    what: str
    span_ns: int
    saved_ns: int
    saved_share: float


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
        out.what_if = _what_ifs(g, low, high, _waits_by_node(g, trace, waits), high - low - busy)
    return out


def stretches(trace: RankTrace, kinds: Ints, launches: Launches) -> list[Stretch]:
    """The critical path itself, in order of time: adjacent, and together the whole of the trace's span."""
    if not len(trace.device):
        return []
    path = _walk(build(trace, kinds, launches), trace, int(trace.device.start.min()))
    return sorted(_settled(path, trace, kinds), key=lambda s: s.start)


_ON_HOST = frozenset({"host", "data", "sync", "launch"})


def _settled(path: list[Stretch], trace: RankTrace, kinds: Ints) -> list[Stretch]:
    """The path, in which the host holds up only an idle device: while kernels run, they do.

    So the host's share never exceeds the idle share, whatever waits for the device were not recognised as such.
    """
    device = trace.device
    sets, taken = [], EMPTY
    for k in (MATMUL, COMPUTE, COMM, COPY):
        own = subtract(union(device.start[kinds == k], device.end[kinds == k]), taken)
        taken = merge(taken, own)
        sets.append((CLASS_NAMES[k], own))
    out: list[Stretch] = []
    for part in path:
        if part.kind not in _ON_HOST:
            out.append(part)
            continue
        for kind, own in sets:
            spans = clip(own, part.start, part.end)
            out += [
                Stretch(a, b, kind, "while the host went on")
                for a, b in zip(*(x.tolist() for x in spans), strict=True)
            ]
        left = complement(taken, part.start, part.end)
        out += [Stretch(a, b, part.kind, part.name) for a, b in zip(*(x.tolist() for x in left), strict=True)]
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
        if (
            g.kind[node] == SYNCED
            and g.launch_of[node] >= 0
            and now > g.end[g.launch_of[node]] >= g.start[node]
        ):
            spend("sync", name, g.end[g.launch_of[node]])
            node = g.launch_of[node]
            continue
        spend(kind, name, g.start[node])
        options = [(g.end[c], c) for c in g.causes[node]]
        launch = g.launch_of[node]
        if launch >= 0 and g.kind[node] != SYNCED:
            options.append((g.start[launch], launch))
        if not options:
            spend("host", "before the first recorded call", low)
            break
        ready, cause = max(options)
        # Between the last cause and the start: the host thinking, or the device's own latency.
        if g.kind[node] >= HOST:
            spend("data" if g.data_wait[node] * 2 > now - ready > 0 else "host", f"before {name}", ready)
        else:
            spend("launch" if g.kind[cause] >= HOST else "device gap", f"before {name}", ready)
        node = cause
    return path


def _waits_by_node(g: Graph, trace: RankTrace, waits: Ints | None) -> list[int] | None:
    if waits is None:
        return None
    order = iter(waits.tolist())
    # Device nodes appear in the graph in their order of start, as the columns do.
    return [next(order) if k < HOST else 0 for k in g.kind]


def _what_ifs(g: Graph, low: int, high: int, waits: list[int] | None, idle: int) -> list[WhatIf]:
    """``idle``: ns the device was idle: the host cannot cost more, and a replay that says so is withheld."""
    span = high - low
    last = [i for i, k in enumerate(g.kind) if k < HOST]

    def ask(what: str, length: list[int], lag: list[int] | None = None) -> WhatIf:
        ends = replay(g, length, lag)
        new = max(ends[i] for i in last) - low
        return WhatIf(what, new, span - new, round((span - new) / span, 5) if span else 0.0)

    def without(*gone: int) -> list[int]:
        return [0 if k in gone else n for n, k in zip(g.length, g.kind, strict=True)]

    out = []
    if COMM in g.kind:
        out.append(ask("communication took no time", without(COMM)))
    if waits is not None and any(waits):
        shorter = [max(0, n - w) for n, w in zip(g.length, waits, strict=True)]
        out.append(ask("no waiting for other ranks in collectives", shorter))
    if COPY in g.kind:
        out.append(ask("copies took no time", without(COPY)))
    if any(g.data_wait):
        lag = [n - min(w, max(n, 0)) for n, w in zip(g.lag, g.data_wait, strict=True)]
        out.append(ask("the data loader never made anyone wait", g.length, lag))
    faster = [n // 2 if k >= HOST and n > 0 else n for n, k in zip(g.lag, g.kind, strict=True)]
    halved = [n // 2 if k == HOST else n for n, k in zip(g.length, g.kind, strict=True)]
    quicker = ask("the host were twice as fast", halved, faster)
    if quicker.saved_ns <= idle:
        out.append(quicker)
    out.append(
        ask(
            "matmuls were 20% faster",
            [n * 5 // 6 if k == MATMUL else n for n, k in zip(g.length, g.kind, strict=True)],
        )
    )
    out.append(
        ask(
            "other kernels took half the time (fusion)",
            [n // 2 if k == COMPUTE else n for n, k in zip(g.length, g.kind, strict=True)],
        )
    )
    return sorted(out, key=lambda w: -w.saved_ns)
