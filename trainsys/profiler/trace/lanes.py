"""What the devices of a trace did when, thinned to what a page can hold, and put on one axis by aligned clocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from trainsys.profiler.timeline import MOST_LANES, Lane, Timeline, lanes_shown, track
from trainsys.profiler.trace import intervals as iv
from trainsys.profiler.trace.classify import COMM, COMPUTE, COPY, MATMUL
from trainsys.profiler.trace.columns import RankTrace
from trainsys.profiler.trace.commlist import CommList
from trainsys.profiler.trace.intervals import Ints, Spans

if TYPE_CHECKING:
    from trainsys.profiler.trace.analyse import Analysed
    from trainsys.profiler.trace.report import Report

KINDS = ["matmul", "other compute", "communication", "copies"]
TRACKS = ["compute", "communication and copies"]
ALL_SPANS = 400_000
"""Spans of all ranks together while they are gathered: about 10 MB."""
FINE, COARSE = 5_000, 18_000
"""Spans per track of the first two ranks on a page, and of all the others together."""


@dataclass(slots=True)
class Busy:
    """One rank by its own clock (ns): per track the starts, ends and kinds of what ran. ``step_ns``: of what was thinned,
    the length of the stretches of which only what took most is kept; 0: all is there."""

    start: int
    end: int
    tracks: list[tuple[Ints, Ints, Ints]]
    step_ns: int = 0


def busy_of(trace: RankTrace, kinds: Ints, comms: CommList, ranks: int) -> Busy | None:
    """``ranks``: how many files there are, which share what may be kept. None where nothing is timed."""
    device = trace.device
    if len(device):

        def spans(kind: int) -> Spans:
            mine = kinds == kind
            return iv.union(device.start[mine], device.end[mine])

        matmul, other, comm, copies = (spans(k) for k in (MATMUL, COMPUTE, COMM, COPY))
        low, high = int(device.start.min()), int(device.end.max())
    else:
        matmul = iv.union(trace.ops.start, trace.ops.end)
        other, comm, copies = trace.host_busy, iv.union(comms.start, comms.end), iv.EMPTY
        low, high = trace.span
    if high <= low:
        return None
    tracks = [_together(0, matmul, iv.subtract(other, matmul)), _together(2, comm, iv.subtract(copies, comm))]
    return thinned(Busy(low, high, tracks), max(100, min(FINE, ALL_SPANS // max(1, ranks))))


def _together(first: int, *sets: Spans) -> tuple[Ints, Ints, Ints]:
    """Disjoint sets as one track; they are of kinds ``first``, ``first + 1``, ..."""
    starts, ends = (np.concatenate([s[i] for s in sets]) for i in (0, 1))
    kinds = np.repeat(np.arange(first, first + len(sets)), [s[0].size for s in sets])
    order = np.argsort(starts, kind="stable")
    return starts[order], ends[order], kinds[order]


def thinned(busy: Busy, most: int) -> Busy:
    """With at most ``most`` spans per track. Where there are more, the time is cut into so many equal stretches, and each
    is what took most of it, nothing included."""
    if all(starts.size <= most for starts, _, _ in busy.tracks):
        return busy
    edges = np.unique(np.linspace(busy.start, busy.end, most + 1).astype(np.int64))
    tracks = []
    for starts, ends, kinds in busy.tracks:
        if starts.size <= most:
            tracks.append((starts, ends, kinds))
            continue
        names = np.unique(kinds)
        took = np.stack(
            [iv.covered(iv.union(starts[kinds == k], ends[kinds == k]), edges[:-1], edges[1:]) for k in names]
        )
        idle = np.diff(edges) - took.sum(axis=0)
        winner = np.argmax(np.concatenate([took, idle[None]]), axis=0)
        begin = np.flatnonzero(np.diff(winner, prepend=-1) != 0)
        end = np.append(begin[1:], winner.size)
        ran = winner[begin] < names.size
        tracks.append((edges[begin[ran]], edges[end[ran]], names[winner[begin[ran]]]))
    return Busy(busy.start, busy.end, tracks, max(busy.step_ns, int(edges[1] - edges[0])))


def timeline_of(report: Report, captures: Sequence[Analysed]) -> Timeline | None:
    """The timeline of the captured window with the slowest rank; ``captures``: each rank's, with ``busy``."""
    window, slowness = _slowest_window(captures)
    if report.across is not None and any(r.caused_ns for r in report.across.ranks):
        # Who made the others wait is better evidence than who was busy for longest.
        slowness = {r.rank: float(r.caused_ns) for r in report.across.ranks}
    mine = [c for c in captures if c.report.window == window and c.busy is not None]
    if not mine:
        return None
    offsets, aligned = _offsets(report, mine)
    order = lanes_shown([slowness.get(c.report.rank, float("nan")) for c in mine])
    chosen = [mine[i] for i in order]
    spans = {c.report.rank: _fitting(c, place, len(chosen)) for place, c in enumerate(chosen)}
    zero = min(b.start - offsets[r] for r, b in spans.items())
    last = max(b.end - offsets[r] for r, b in spans.items())
    # A tick is a fifth of the finest stretch, or exact to 100 ns: digits that nobody can see are half of a page.
    tick = max(100, min(b.step_ns for b in spans.values()) // 5)
    lanes = []
    for place, c in enumerate(chosen):
        rank = c.report.rank
        note = "" if len(chosen) < 3 else "slowest" if place == 0 else "typical" if place == 1 else ""
        moved = [
            track((s - offsets[rank] - zero) // tick, (e - offsets[rank] - zero) // tick, k)
            for s, e, k in spans[rank].tracks
        ]
        lanes.append(Lane(rank, note, moved))
    first = chosen[0].report.breakdown
    shift = offsets[chosen[0].report.rank] + zero
    out = Timeline(
        "", tick / 1e9, -(-(last - zero) // tick), KINDS, TRACKS, lanes,
        [] if first is None else [(t.step or 0, (t.end - shift) // tick) for t in first.steps if t.step is not None],
    )  # fmt: skip
    if not aligned:
        out.notes.append("Clocks of different hosts could not be aligned: each rank begins at zero.")
    coarse = {b.step_ns for b in spans.values() if b.step_ns}
    if coarse:
        out.notes.append(
            f"Of stretches of {min(coarse) / 1e3:,.0f} to {max(coarse) / 1e3:,.0f} us only what took most is drawn; "
            "--perfetto has everything."
        )
    if len(mine) > MOST_LANES:
        out.notes.append(f"{len(chosen)} of {len(mine)} ranks: half of them the slowest.")
    return out


def _fitting(capture: Analysed, place: int, lanes: int) -> Busy:
    assert capture.busy is not None
    return thinned(capture.busy, FINE if place < 2 else min(FINE // 2, COARSE // (lanes - 2)))


def _slowest_window(captures: Sequence[Analysed]) -> tuple[int, dict[int, float]]:
    """(the window of the rank with the longest work, slowness of that window's ranks): work is what is not exposed
    communication, in which a rank waits for others."""
    work = {
        (c.report.window, c.report.rank): float(w.matmul + w.other_compute + w.memcpy_exposed + w.idle)
        for c in captures
        if c.report.breakdown is not None
        for w in [c.report.breakdown.whole]
    }
    if not work:
        return 0, {}
    window = max(work, key=lambda k: work[k])[0]
    return window, {rank: s for (w, rank), s in work.items() if w == window}


def _offsets(report: Report, captures: Sequence[Analysed]) -> tuple[dict[int, int], bool]:
    """By how much (ns) each rank's clock is ahead; whether they are then on one axis."""
    known = {} if report.across is None else {r.rank: r.clock_offset_ns for r in report.across.ranks}
    ranks = [c.report.rank for c in captures]
    if all(r in known for r in ranks):
        return {r: known[r] for r in ranks}, True
    if len({c.report.host for c in captures}) == 1 and captures[0].report.host:
        return dict.fromkeys(ranks, 0), True
    return {c.report.rank: c.busy.start for c in captures if c.busy is not None}, len(captures) == 1
