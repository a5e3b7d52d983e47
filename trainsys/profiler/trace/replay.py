"""The graph of a trace run again: when everything had ended, had something been faster or not been there.

A host call that waits for nothing but the call before it keeps its distance from that one whatever the device does, so
a run of them is one value and running sums. What is left to go through one by one are activities, calls that waited and
the first of each run: as rows, each of which is the later of two values, with something on top of each. All what-ifs
share that preparation.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from trainsys.profiler.trace.graph import HOST, Graph
from trainsys.profiler.trace.intervals import Ints

_NEVER, _ORIGIN = 0, 1
"""Values that are always there: one that everything is later than, and zero, for what starts at a given time."""
_AWAY = -(1 << 61)
"""On top of a value, it makes one that holds nothing up."""
_BLOCK = 1 << 16
"""Rows that are Python's own integers at a time."""


@dataclass(frozen=True, slots=True)
class Changed:
    """What is different in a replay. ``factor``: of each kind's own time; 1 where it is not named."""

    factor: dict[int, float] = field(default_factory=dict)
    shorter: Ints | None = None
    """ns by which each node is shorter, before the factor."""
    loader: bool = True
    """The data loader takes its time."""
    waits: bool = True
    """The host waits for the device."""
    trust: bool = True
    """Doubtful gaps are the host's own; else it waited."""


AS_IT_WAS = Changed()


class Replay:
    """A graph prepared for :meth:`ends`."""

    def __init__(self, graph: Graph) -> None:
        self.graph = g = graph
        n = g.start.size
        nodes = np.arange(n)
        on_host, moves = g.kind >= HOST, g.program >= 0
        blocked = np.zeros(n, bool)
        blocked[g.blocked.node] = True
        chained = moves & (g.held_by < 0) & (g.fetch < 0)
        # Of the calls that follow one call, only one can be of its run.
        follower = np.full(n, -1, np.int64)
        follower[g.program[chained][::-1]] = nodes[chained][::-1]
        chained[chained] = follower[g.program[chained]] == nodes[chained]
        linked = chained.copy()
        linked[chained] = ~blocked[g.program[chained]]
        root = np.where(linked, g.program, nodes)
        while bool(linked[root].any()):
            root = root[root]
        self._blocked, self._chained, self._linked, self._root = blocked, chained, linked, root
        host = np.flatnonzero(on_host)
        self._host = host[np.argsort(root[host], kind="stable")]
        """Calls by run; in a run each follows its own cause."""
        self._head = np.maximum.accumulate(np.where(linked[self._host], 0, np.arange(host.size)))
        self._free = np.flatnonzero(moves & ~chained)
        self._held, self._late = (
            np.flatnonzero(moves & (g.held_by >= 0)),
            np.flatnonzero(moves & (g.fetch >= 0)),
        )
        self._by_launch = np.flatnonzero(g.launch >= 0)
        caused = moves | (g.launch >= 0)
        caused[g.causes.node] = True
        self._fixed = np.flatnonzero(~caused)
        self._lay_out(np.flatnonzero(blocked), n)

    def _lay_out(self, blocked: Ints, n: int) -> None:
        """The rows. Edges in the order of :meth:`_tops`: what each is of, its source, and where it stands."""
        g, free = self.graph, self._free
        starts = (g.causes.node, self._by_launch, free, self._held, self._late, self._fixed)
        of = np.concatenate([2 * np.concatenate(starts), 2 * np.concatenate([blocked, g.blocked.node]) + 1])
        sources = (
            2 * g.causes.cause + 1,
            2 * g.launch[self._by_launch],
            2 * g.program[free] + 1,
            2 * g.held_by[self._held] + 1,
            2 * g.fetch[self._late] + 1,
            np.full(self._fixed.size, -1, np.int64),
            2 * blocked,
            2 * g.blocked.cause + 1,
        )
        self._source = np.concatenate(sources)
        """Twice the node, and one more for its end instead of its start; -1: a given time."""
        order = np.argsort(of, kind="stable")
        first = np.flatnonzero(np.diff(of[order], prepend=-1))
        count = np.diff(np.append(first, of.size))
        # What has more than two edges goes on in the next row, which begins with the one before.
        rows = np.maximum(1, count - 1)
        begin = np.cumsum(rows) - rows
        rank = np.arange(of.size) - np.repeat(first, count)
        self._row, self._second = np.empty(of.size, np.int64), np.empty(of.size, bool)
        self._row[order] = np.repeat(begin, count) + np.maximum(0, rank - 1)
        self._second[order] = rank > 0
        self._rows = int(rows.sum())
        value = np.full(2 * n, -1, np.int64)
        value[of[order][first]] = begin + rows - 1 + 2
        root, lead = self._root, self._chained & ~self._linked
        # A run that follows a call that waited hangs on that call's end.
        base = np.where(lead, value[2 * np.where(lead, g.program, 0) + 1], value[2 * np.arange(n)])
        self._start_value = base[root]
        self._end_value = np.where(self._blocked, value[1::2], self._start_value)
        ends = np.stack([self._start_value, self._end_value], axis=1).ravel()
        given = self._source < 0
        self._values = np.zeros((2, self._rows), np.int64)
        self._values[0] = np.arange(self._rows) + 1
        at = np.where(given, _ORIGIN, ends[np.where(given, 0, self._source)])
        self._values[self._second.astype(np.int64), self._row] = at

    def length(self, changed: Changed) -> Ints:
        """[nodes]: what each takes by itself, ns."""
        g, host = self.graph, changed.factor.get(HOST, 1.0)
        length = g.length if changed.shorter is None else np.maximum(0, g.length - changed.shorter)
        length = np.where(g.kind >= HOST, g.length, length)
        factor = np.array([changed.factor.get(k, 1.0) for k in range(HOST)])
        return _times(length, np.where(g.kind < HOST, factor[np.minimum(g.kind, HOST - 1)], host))

    def ends(self, changed: Changed = AS_IT_WAS) -> Ints:
        """[nodes]: when each ends, ns, with what is changed."""
        g, host = self.graph, changed.factor.get(HOST, 1.0)
        length = self.length(changed)
        thinking = g.rest - g.data
        between = np.where(thinking > 0, _times(thinking, host), thinking)
        if changed.loader:
            between = between + np.where(g.fetch < 0, g.data, 0)
        behind = np.zeros(g.start.size, np.int64)
        """Each start after the value it hangs on: none but in a run."""
        calls, linked = self._host, self._linked[self._host]
        steps = np.where(linked, length[np.where(linked, g.program[calls], 0)] + between[calls], 0)
        sums = np.cumsum(steps)
        leads = calls[self._head]
        first = np.where(self._chained[leads], between[leads], 0)
        behind[calls] = sums - sums[self._head] + first
        over = np.where(self._blocked, 0, behind + length)
        on_top = np.stack([behind, over], axis=1).ravel()
        given = self._source < 0
        tops = self._tops(changed, host, length, between) + np.where(
            given, 0, on_top[np.where(given, 0, self._source)]
        )
        placed = np.zeros((2, self._rows), np.int64)
        placed[self._second.astype(np.int64), self._row] = tops
        values = np.array(_play(self._values, placed), np.int64)
        return values[self._end_value] + over

    def _tops(self, changed: Changed, host: float, length: Ints, between: Ints) -> Ints:
        """What each edge adds to its source."""
        g, free, held = self.graph, self._free, self._held
        blocked = np.flatnonzero(self._blocked)
        waited = (g.held_by >= 0) & (g.sure | (not changed.trust))
        alone = np.where(waited, 0, _times(g.gap, host))
        tops = (
            g.causes.lag,
            g.launch_lag[self._by_launch],
            (_times(g.before, host) + alone + between)[free],
            np.where(waited[held] & changed.waits, g.back[held] + between[held], _AWAY),
            g.since[self._late] if changed.loader else np.full(self._late.size, _AWAY),
            g.start[self._fixed],
            length[blocked],
            g.blocked.lag if changed.waits else np.full(g.blocked.lag.size, _AWAY),
        )
        return np.concatenate(tops)


def _times(values: Ints, factor: float | npt.NDArray[np.float64]) -> Ints:
    return np.asarray(np.rint(values * factor), np.int64)


def _play(values: Ints, tops: Ints) -> list[int]:
    """The values, with the two that are always there before the rows'."""
    out = [-(1 << 62), 0]
    put = out.append
    for at in range(0, values.shape[1], _BLOCK):
        block = slice(at, at + _BLOCK)
        for a, b, on_a, on_b in zip(*values[:, block].tolist(), *tops[:, block].tolist(), strict=True):
            one, other = out[a] + on_a, out[b] + on_b
            put(one if one > other else other)
    return out
