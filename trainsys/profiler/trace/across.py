"""What the ranks say together: who waits, who comes last, who is slow, how fast the links are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from trainsys.profiler.straggler import Straggler, find_stragglers
from trainsys.profiler.trace.intervals import Ints
from trainsys.profiler.trace.matching import Matched, Matches, align_clocks

if TYPE_CHECKING:
    from trainsys.hardware import Device


@dataclass(frozen=True, slots=True)
class RankInComms:
    """One rank over all matched collectives. ns.

    ``wait``: own duration minus the shortest one of the same collective: time spent waiting for others.
    ``last``: collectives in which it arrived last by more than the clocks' and the ends' noise, of ``collectives``.
    ``caused``: what all the others waited in those, summed.
    """

    rank: int
    collectives: int
    comm_ns: int
    wait_ns: int
    last: int
    caused_ns: int
    clock_offset_ns: int


@dataclass(frozen=True, slots=True)
class BandwidthRow:
    """One operation of one communicator at one size.

    ``bus_gb_s``: NCCL-tests' bus bandwidth over the shortest member's duration (so waiting is not in it),
    median over calls, in GB/s (10^9); None where the size is unknown. ``spread``: 90th over 10th percentile.
    """

    group: str
    axis: str
    op: str
    members: int
    size: int
    calls: int
    shortest_ns: int
    """Median over calls of the shortest member's duration."""
    bus_gb_s: float | None
    spread: float
    wait_ns: int
    link_gb_s: float | None = None
    """The catalogue's rate of the link the group must use: the fast domain, or the network if it is larger."""


@dataclass(frozen=True, slots=True)
class SlowRank:
    """A straggler by its work between collectives; see ``trainsys.profiler.straggler``."""

    rank: int
    group: str
    slowdown: float
    z: float
    share: float
    cost_s: float


@dataclass(slots=True)
class Across:
    """All ranks together. ``wait_map``: per rank its waits in ns over the matched collectives, in order."""

    ranks: list[RankInComms] = field(default_factory=list)
    bandwidth: list[BandwidthRow] = field(default_factory=list)
    stragglers: list[SlowRank] = field(default_factory=list)
    clock_residual_ns: int | None = None
    matched: int = 0
    end_spread_ns: int = 0
    """Largest difference of a synchronising collective's ends over its members, clocks aligned."""
    wait_map: dict[int, list[int]] = field(default_factory=dict)
    said: dict[str, int] = field(default_factory=dict)
    withheld: list[str] = field(default_factory=list)
    """Ranks that are not compared, and why: a pairing without evidence gives no verdict."""


def bus_factor(op: str, n: int) -> float:
    """Bus bytes per message byte of an n-member collective (nccl-tests, doc/PERFORMANCE.md)."""
    if n < 2:
        return 1.0
    if op == "all_reduce":
        return 2 * (n - 1) / n
    if op in ("all_gather", "reduce_scatter", "all_to_all"):
        return (n - 1) / n
    return 1.0


LEAST_LEAD_NS = 5_000
"""Nobody is last by less: timestamps and a collective's own end differ by so much."""


def compare_ranks(
    windows: Sequence[Matches], hosts: Mapping[int, str], device: Device | None = None
) -> Across:
    """Align clocks, and account for waiting. ``hosts`` (empty: unknown) by rank.

    ``windows``: the ranks' communications in each captured stretch of time, matched within it.
    """
    out = Across()
    groups: list[Matched] = []
    offsets: dict[int, int] = {}
    residuals = []
    for found in windows:
        for what, n in found.said.items():
            out.said[what] = out.said.get(what, 0) + n
        out.withheld += [w for w in found.withheld if w not in out.withheld]
        if found.groups:
            # Clocks drift from one capture to the next; the first one's offsets are those shown.
            own, residual = align_clocks(found.groups, hosts)
            offsets = own | offsets
            residuals += [residual] if residual is not None else []
            groups += found.groups
    if not groups:
        return out
    out.clock_residual_ns = max(residuals, default=None)
    tally: dict[int, list[int]] = {r: [0, 0, 0, 0, 0] for g in groups for r in g.ranks}
    for g in groups:
        length = g.end - g.start
        wait = length - length.min(axis=1, keepdims=True)
        last = last_arrivals(g)
        for j, r in enumerate(g.ranks):
            mine = last == j
            row = tally[r]
            row[0] += length.shape[0]
            row[1] += int(length[:, j].sum())
            row[2] += int(wait[:, j].sum())
            row[3] += int(mine.sum())
            row[4] += int(wait[mine].sum() - wait[mine, j].sum())
        if g.sync.any():
            out.end_spread_ns = max(out.end_spread_ns, int(g.end_spread.max()))
        out.matched += length.shape[0]
        out.bandwidth += _bandwidth(g, device)
        out.stragglers += _stragglers(g)
    out.ranks = [
        RankInComms(r, n, comm_ns, wait_ns, last, caused_ns, offsets.get(r, 0))
        for r, (n, comm_ns, wait_ns, last, caused_ns) in sorted(tally.items())
    ]
    out.bandwidth.sort(key=lambda b: -(b.shortest_ns * b.calls + b.wait_ns))
    out.stragglers = _worst_of_each(out.stragglers)
    out.wait_map = _wait_map(groups)
    return out


def last_arrivals(g: Matched) -> Ints:
    """Which member arrived last in each collective, -1 where nobody did by more than noise. [N]

    Two witnesses must agree: the latest start by aligned clocks, and the shortest stay. A tie names nobody.
    """
    out = np.full(g.start.shape[0], -1, np.int64)
    start, length = g.start - g.ahead, g.end - g.start
    order = np.sort(start, axis=1)
    latest = np.argmax(start, axis=1)
    spread = np.zeros(out.size, np.int64)
    spread[g.sync] = g.end_spread
    noise = np.maximum(spread, max(LEAST_LEAD_NS, 2 * int(np.median(g.end_spread)) if g.sync.any() else 0))
    own = np.take_along_axis(length, latest[:, None], axis=1)[:, 0]
    named = g.sync & (order[:, -1] - order[:, -2] > noise) & (own - length.min(axis=1) <= noise)
    out[named] = latest[named]
    return out


def waits_by_start(windows: Sequence[Matches]) -> dict[int, dict[int, int]]:
    """For each rank: ns waited in the communication that began at an instant (the rank's own clock)."""
    out: dict[int, dict[int, int]] = {}
    for found in windows:
        for g in found.groups:
            length = g.end - g.start
            wait = length - length.min(axis=1, keepdims=True)
            for j, r in enumerate(g.ranks):
                out.setdefault(r, {}).update(zip(g.start[:, j].tolist(), wait[:, j].tolist(), strict=True))
    return out


def _bandwidth(g: Matched, device: Device | None) -> list[BandwidthRow]:
    length = g.end - g.start
    shortest = length.min(axis=1)
    # A size of 0 or 1 byte is a barrier in disguise: no bandwidth.
    rows = []
    table: dict[tuple[str, int], list[int]] = {}
    for i, (op, size) in enumerate(zip(g.op, g.size.tolist(), strict=True)):
        table.setdefault((op, size), []).append(i)
    members = max(len(g.ranks), len(g.key.ranks))
    link = None
    if device is not None:
        link = device.scale_up.gb_s if members <= device.scale_up.domain else device.network_gb_s
    for (op, size), calls in table.items():
        own = shortest[calls]
        rates = size * bus_factor(op, members) / np.maximum(own, 1) if size > 1 else np.zeros(0)
        low, high = np.percentile(own, [10, 90])
        rows.append(
            BandwidthRow(
                g.key.label,
                g.key.axis,
                op,
                members,
                size,
                len(calls),
                int(np.median(own)),
                round(float(np.median(rates)), 3) if rates.size else None,
                round(float(high / low), 2) if low else 0.0,
                int((length[calls] - own[:, None]).sum()),
                link,
            )
        )
    return rows


def work_between(g: Matched) -> tuple[np.ndarray[tuple[int, int], np.dtype[np.float64]], int]:
    """Seconds each member worked between consecutive collectives of the group, [N-1, M], summed into steps.

    A stretch begins when the member leaves one collective and ends when it arrives at the next. Where the
    same short sequence of collectives repeats, whole repetitions are summed, as short stretches are mostly
    noise. Returns (work, collectives summed into a row).
    """
    work = (g.start[1:] - g.end[:-1]) / 1e9
    # Where a collective between them has no partner, its time and its waiting would count as work.
    adjacent = (np.diff(g.place, axis=0) == 1).all(axis=1)
    if not adjacent.all():
        return np.maximum(work[adjacent], 0), 1
    period = _period(list(zip(g.op, g.size.tolist(), strict=True)))
    rows = work.shape[0] // period
    return np.maximum(work[: rows * period], 0).reshape(rows, period, -1).sum(axis=1), period


def _period(signature: list[tuple[str, int]]) -> int:
    """Smallest repetition of the sequence that leaves five or more whole ones; else 1."""
    n = len(signature)
    for p in range(1, n // 5 + 1):
        if all(signature[i] == signature[i - p] for i in range(p, n)):
            return p
    return 1


def _stragglers(g: Matched) -> list[SlowRank]:
    if g.start.shape[0] < 4:
        return []
    work, _ = work_between(g)
    found: list[Straggler] = find_stragglers(work)
    return [SlowRank(g.ranks[s.index], g.key.label, s.slowdown, s.z, s.share, s.cost_s) for s in found]


def _worst_of_each(found: list[SlowRank]) -> list[SlowRank]:
    best: dict[int, SlowRank] = {}
    for s in found:
        if s.rank not in best or s.cost_s > best[s.rank].cost_s:
            best[s.rank] = s
    return sorted(best.values(), key=lambda s: -s.cost_s)


def _wait_map(groups: list[Matched], columns: int = 400) -> dict[int, list[int]]:
    """Waits over time for a heat map: at most ``columns`` bins of consecutive collectives, summed."""
    biggest = max(groups, key=lambda g: g.start.size)
    length = biggest.end - biggest.start
    wait = length - length.min(axis=1, keepdims=True)
    edges = np.unique(np.linspace(0, wait.shape[0], min(columns, wait.shape[0]) + 1).astype(int))[:-1]
    binned = np.add.reduceat(wait, edges, axis=0)
    return {r: binned[:, j].tolist() for j, r in enumerate(biggest.ranks)}
