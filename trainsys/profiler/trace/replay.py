"""The graph of a trace run again: when everything had ended, had something been faster or not been there."""

from __future__ import annotations

from dataclasses import dataclass, field

from trainsys.profiler.trace.graph import HOST, KIND_NAMES, Graph


@dataclass(frozen=True, slots=True)
class Changed:
    """What is different in a replay. ``factor``: of each kind's own time; 1 where it is not named."""

    factor: dict[int, float] = field(default_factory=dict)
    shorter: list[int] | None = None
    """ns by which each node is shorter, before the factor."""
    loader: bool = True
    """The data loader takes its time."""
    waits: bool = True
    """The host waits for the device."""
    trust: bool = True
    """Doubtful gaps are the host's own; else it waited."""


AS_IT_WAS = Changed()


def replay(g: Graph, changed: Changed = AS_IT_WAS) -> list[int]:
    """End of every node, ns, with what is changed."""
    start, end = [0] * len(g.start), [0] * len(g.start)
    factor = [changed.factor.get(k, 1.0) for k in range(len(KIND_NAMES))]
    host = factor[HOST]
    for i, kind in enumerate(g.kind):
        length = g.length[i]
        if kind < HOST:
            begin = _activity_start(g, i, start, end)
            if changed.shorter is not None:
                length = max(0, length - changed.shorter[i])
            length = length if factor[kind] == 1.0 else round(length * factor[kind])
        else:
            begin = _call_start(g, i, end, changed, host)
            length = length if host == 1.0 else round(length * host)
        done = begin + length
        if changed.waits:
            for c, lag in g.blocked[i]:
                if end[c] + lag > done:
                    done = end[c] + lag
        start[i], end[i] = begin, done
    return end


def _activity_start(g: Graph, i: int, start: list[int], end: list[int]) -> int:
    ready: int | None = None
    for c, lag in g.causes[i]:
        if ready is None or end[c] + lag > ready:
            ready = end[c] + lag
    launch, lag = g.launch[i]
    if launch >= 0 and (ready is None or start[launch] + lag > ready):
        ready = start[launch] + lag
    return g.start[i] if ready is None else ready


def _call_start(g: Graph, i: int, end: list[int], changed: Changed, host: float) -> int:
    a = g.after[i]
    if a.program < 0:
        return g.start[i]
    ready = end[a.program] + round(a.before * host)
    if a.held_by >= 0 and (a.sure or not changed.trust):
        if changed.waits:
            ready = max(ready, end[a.held_by] + a.back)
    else:
        ready += round(a.gap * host)
    fetch, since = g.fetch[i]
    thinking = a.rest - a.data
    ready += round(thinking * host) if thinking > 0 else thinking
    if changed.loader:
        ready = ready + a.data if fetch < 0 else max(ready, end[fetch] + since)
    return ready
