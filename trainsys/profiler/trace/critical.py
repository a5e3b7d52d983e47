"""Critical path of a rank, and what-if: how long the span had been with one thing ideal."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from trainsys.profiler.trace.classify import CLASS_NAMES, COMM, COMPUTE, COPY, MATMUL
from trainsys.profiler.trace.columns import RankTrace
from trainsys.profiler.trace.graph import HOST, KIND_NAMES, SYNCED, Graph, build
from trainsys.profiler.trace.intervals import (
    EMPTY,
    Ints,
    Spans,
    complement,
    distinct,
    inside_each,
    merge,
    subtract,
    total,
    union,
)
from trainsys.profiler.trace.link import Launches
from trainsys.profiler.trace.replay import Replay
from trainsys.profiler.trace.whatif import WhatIf, what_ifs


class Stretch(NamedTuple):
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
    """The whole trace's critical path. ``waits``: ns of each device activity spent waiting for other ranks, if matched.

    None without device activities. O(n log n).
    """
    if not len(trace.device):
        return None
    g = build(trace, kinds, launches)
    low, high = int(trace.device.start.min()), int(trace.device.end.max())
    by_kind: Counter[str] = Counter()
    by_name: Counter[tuple[str, str]] = Counter()
    start, end, label, labels = _settled(_walk(g, trace, low), trace, kinds)
    length = np.zeros(len(labels), np.int64)
    np.add.at(length, label, end - start)
    first = np.full(len(labels), label.size)
    np.minimum.at(first, label, np.arange(label.size))
    for i in np.argsort(first, kind="stable")[: int((first < label.size).sum())].tolist():
        by_kind[labels[i][0]] += int(length[i])
        by_name[labels[i]] += int(length[i])
    top = [(kind, name, ns) for (kind, name), ns in by_name.most_common(25)]
    out = CriticalPath(high - low, dict(by_kind), top, inferred=g.inferred)
    again = Replay(g)
    out.faithful = bool((again.ends() == g.end).all())
    if out.faithful:
        busy = total(union(trace.device.start, trace.device.end))
        out.what_if, out.withheld = what_ifs(again, high - low - busy, _waits_by_node(g, waits))
    return out


def stretches(trace: RankTrace, kinds: Ints, launches: Launches) -> list[Stretch]:
    """The critical path itself, in order of time: adjacent, and together the whole of the trace's span."""
    if not len(trace.device):
        return []
    path = _walk(build(trace, kinds, launches), trace, int(trace.device.start.min()))
    start, end, label, labels = _settled(path, trace, kinds)
    columns = (start.tolist(), end.tolist(), label.tolist())
    return [Stretch(a, b, *labels[i]) for a, b, i in zip(*columns, strict=True)]


_ON_HOST = frozenset({"host", "data", "sync", "launch"})
_Label = tuple[str, str]
_Path = tuple[Ints, Ints, Ints, list[_Label]]
"""Starts, ends and labels of stretches, the latter as indices into the (kind, name) that come last."""


def _settled(path: _Path, trace: RankTrace, kinds: Ints) -> _Path:
    """The path in order of time, in which the host holds up only an idle device: while kernels run, they do.

    So the host's share never exceeds the idle share, whatever waits for the device were not recognised as such.
    """
    start, end, label, labels = path
    on_host = np.array([kind in _ON_HOST for kind, _ in labels], bool)[label]
    host, own = np.flatnonzero(on_host), np.flatnonzero(~on_host)
    parts = [(start[own], end[own], label[own])]

    def cut(by: Spans, labelled: Ints) -> None:
        which, a, b = inside_each(by, start[host], end[host])
        parts.append((a, b, labelled[host[which]]))

    device, taken = trace.device, EMPTY
    for k in (MATMUL, COMPUTE, COMM, COPY):
        spans = subtract(union(device.start[kinds == k], device.end[kinds == k]), taken)
        taken = merge(taken, spans)
        cut(spans, np.full(label.size, len(labels)))
        labels.append((CLASS_NAMES[k], "while the host went on"))
    cut(complement(taken, int(start.min(initial=0)), int(end.max(initial=0))), label)
    start, end, label = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.argsort(start, kind="stable")
    return start[order], end[order], label[order], labels


_BEFORE = ("data", "host", "launch", "device gap")
"""What held a node between the last of its causes and its start."""


def _walk(g: Graph, trace: RankTrace, low: int) -> _Path:
    """From the last end back: at each node its own time, then its lag, then the cause that held it."""
    on_device = np.flatnonzero(g.kind < HOST)
    node = int(on_device[np.argmax(g.end[on_device])])
    start, end, name, kinds = g.start.tolist(), g.end.tolist(), g.name.tolist(), g.kind.tolist()
    ready, causes = (c.tolist() for c in _held_up(g))
    data, held = g.data.tolist(), _blocked_by(g)
    n = len(trace.names)
    begins: list[int] = []
    ends: list[int] = []
    codes: list[int] = []
    now = end[node]

    def spend(code: int, until: int) -> None:
        nonlocal now
        until = max(until, low)
        if now > until:
            begins.append(until)
            ends.append(now)
            codes.append(code)
            now = until

    while now > low:
        held_by = held.get(node, -1)
        if held_by >= 0 and now > end[held_by] > start[node]:
            spend(SYNCED * n + name[node], end[held_by])
            node = held_by
            continue
        spend(kinds[node] * n + name[node], start[node])
        cause, since = causes[node], ready[node]
        # Between the last cause and the start: the host thinking, or the device's own latency.
        if cause < 0:
            spend((SYNCED + 1 + len(_BEFORE)) * n, low)
            break
        if kinds[node] >= HOST:
            role = 1 if data[node] * 2 > now - since > 0 else 2
        else:
            role = 3 if kinds[cause] >= HOST else 4
        spend((SYNCED + role) * n + name[node], since)
        node = cause
    coded = np.array(codes, np.int64)
    present = distinct(coded)
    labels = [_label(code // n, code % n, trace.names) for code in present.tolist()]
    return np.array(begins, np.int64), np.array(ends, np.int64), np.searchsorted(present, coded), labels


def _label(role: int, name: int, names: list[str]) -> _Label:
    if role <= SYNCED:
        return KIND_NAMES[role], names[name]
    if role <= SYNCED + len(_BEFORE):
        return _BEFORE[role - SYNCED - 1], f"before {names[name]}"
    return "host", "before the first recorded call"


def _held_up(g: Graph) -> tuple[Ints, Ints]:
    """By node: (when the last of its causes was ready, that cause), or -1 for the cause; of several the later node."""
    n = g.start.size
    edges = g.causes
    last = np.lexsort((edges.cause, g.end[edges.cause], edges.node))
    last = last[np.diff(edges.node[last], append=n) > 0]
    by_edge = np.full(n, -1, np.int64)
    by_edge[edges.node[last]] = edges.cause[last]
    ready, cause = np.full(n, np.iinfo(np.int64).min), np.full(n, -1, np.int64)
    options = (
        (by_edge, g.end),
        (g.program, g.end),
        (np.where(g.sure, g.held_by, -1), g.end),
        (g.launch, g.start),
    )
    for other, at in options:
        when = at[np.maximum(other, 0)]
        later = (other >= 0) & ((when > ready) | ((when == ready) & (other > cause)))
        ready, cause = np.where(later, when, ready), np.where(later, other, cause)
    return ready, cause


def _blocked_by(g: Graph) -> dict[int, int]:
    """By call that waited: the first of what it waited for that ended last."""
    edges = g.blocked
    order = np.lexsort((-np.arange(edges.node.size), g.end[edges.cause], edges.node))
    return dict(zip(edges.node[order].tolist(), edges.cause[order].tolist(), strict=True))


def _waits_by_node(g: Graph, waits: Ints | None) -> Ints | None:
    if waits is None or not waits.any():
        return None
    out = np.zeros(g.start.size, np.int64)
    # Device nodes appear in the graph in their order of start, as the columns do.
    out[g.kind < HOST] = waits
    return out
