"""Gaps between a host's calls that end with an activity's end: was it waiting, calling nothing?

Of a gap only what is no operator and no data loader counts. It was a wait if it ends where something that was launched
before has just ended, or about where what the thread launched last ends (a kernel may free the host before its end, and
the host may think before its next call), and if that is unlikely to be an accident: by itself, or because gaps between
the same two calls do so again and again.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from math import comb

import numpy as np

from trainsys.profiler.trace.columns import Calls, RankTrace
from trainsys.profiler.trace.idle import data_spans
from trainsys.profiler.trace.intervals import Ints, Spans, complement, covered, inside_each, merge, union
from trainsys.profiler.trace.lookup import CHANCE, HELD_NS, RETURN_NS, Lookup

_APART_NS, _APART_SHARE, _APART_MOST_NS = 50_000, 0.04, 500_000
"""How far the end of what was launched last may be from the end of the gap: this much, or this share of it."""
_LONG_NS = 1_000_000
"""What ends with nothing is doubtful from this length on."""
_BUSY = 0.9
"""A host cannot have waited for a device that was idle."""
_LEAST_ALIKE, _MOSTLY = 3, 0.8
"""So many gaps between the same two calls, and this share of them, must end with an activity: kernels as long as the
host thinks would otherwise look like what it waits for."""


@dataclass(frozen=True, slots=True)
class Gap:
    """``[low, high)`` ns in which the host did nothing recorded, and the ``activity`` it may have waited for then."""

    low: int
    high: int
    activity: int
    sure: bool


def find_gaps(trace: RankTrace, look: Lookup, calls: Calls, before: Ints) -> dict[int, Gap]:
    """By call: the gap since the call ``before`` it that was a wait or, with ``sure`` false, may have been one."""
    begin = np.where(before >= 0, calls.end[np.maximum(before, 0)], calls.start)
    known = merge(trace.host_busy, data_spans(trace))
    busy = union(trace.device.start, trace.device.end)
    out: dict[int, Gap] = {}
    alike: dict[tuple[int, int], list[tuple[int, int, int, int, float]]] = defaultdict(list)
    which, lows, highs = _longest(known, begin, calls.start)
    since = before[which]
    worked = covered(busy, lows, highs)
    columns = (which, lows, highs, worked, calls.thread[since], calls.name[since], calls.name[which])
    for i, low, high, work, thread, name, following in zip(*(c.tolist() for c in columns), strict=True):
        hit, chance = _end_at(look, thread, low, high)
        if hit < 0 and high - low >= _LONG_NS and work >= _BUSY * (high - low):
            during = look.ended(low, high, low)
            if during >= 0:
                out[i] = Gap(low, high, during, False)
        alike[name, following].append((i, low, high, hit, chance))
    for group in alike.values():
        hits, mean = sum(g[3] >= 0 for g in group), sum(g[4] for g in group) / len(group)
        often = (
            hits >= max(_LEAST_ALIKE, _MOSTLY * len(group))
            and at_least(hits, len(group), mean) <= CHANCE / 10
        )
        for i, low, high, hit, chance in group:
            if hit >= 0:
                out[i] = Gap(low, high, hit, often or chance <= CHANCE)
    return out


def _longest(known: Spans, begin: Ints, end: Ints) -> tuple[Ints, Ints, Ints]:
    """(i, low, high) of the gaps ``[begin[i], end[i])`` of which ``[low, high)``, half of it or more, is not known."""
    chosen = np.flatnonzero(end - begin >= HELD_NS)
    if not chosen.size:
        return chosen, chosen, chosen
    low, high = complement(known, int(begin[chosen].min()), int(end[chosen].max()))
    long = high - low >= HELD_NS
    which, low, high = inside_each((low[long], high[long]), begin[chosen], end[chosen])
    by_length = np.lexsort((low - high, which))
    first = np.diff(which[by_length], prepend=-1) > 0
    which, low, high = (c[by_length[first]] for c in (chosen[which], low, high))
    enough = (high - low >= HELD_NS) & (2 * (high - low) >= end[which] - begin[which])
    return which[enough], low[enough], high[enough]


def _end_at(look: Lookup, thread: int, low: int, high: int) -> tuple[int, float]:
    """(the activity that the gap ends with or -1, the probability that some gap as long would by accident)."""
    last = look.last_of(thread, low)
    apart = max(_APART_NS, min(_APART_MOST_NS, round(_APART_SHARE * (high - low))))
    if last >= 0 and look.end[last] > low and abs(high - look.end[last]) <= apart:
        chance = 2 * apart / (high - low)
        if chance <= CHANCE:
            return last, chance
    return look.ended(max(low, high - RETURN_NS), high, low), min(1.0, look.chance(low, high))


def at_least(k: int, n: int, p: float) -> float:
    """The probability of ``k`` or more successes in ``n`` trials of probability ``p``."""
    if n > 200:
        k, n = k * 200 // n, 200
    return sum(comb(n, j) * p**j * (1 - p) ** (n - j) for j in range(k, n + 1))
