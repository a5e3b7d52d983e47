"""The collectives of two ranks, paired and the pairing checked: nobody leaves a synchronising collective early.

A pairing is only as good as its evidence. All members leave a synchronising collective together, so the ends of
truly paired ones differ by the two clocks' offset (and drift) and by little else. Sequence numbers propose a pairing;
without them, or where the ends contradict them, the offset at which most ends coincide does. A pair whose ends still
disagree is left out, and a pairing that most ends contradict, or that a shift by a step explains as well, is refused.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from trainsys.profiler.trace.intervals import Ints

SYNCHRONISING = frozenset(
    {"all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send_recv", "communication"}
)
"""Operations no rank can leave before all have come. A broadcast's root may."""

LOOSE = frozenset({"all_to_all", "send_recv", "communication"})
"""Operations whose sizes may differ over ranks."""
_END_NS = 50_000
"""Ends of one collective differ by this much on real devices; long ones by ``_END_SHARE`` of their length."""
_END_SHARE = 0.05
_DRIFT = 1e-4
"""Largest difference in the speed of two clocks: 100 us a second."""
_MOST = 4_000_000
"""Differences of ends looked at to find an offset."""
_CANDIDATES = 16
_CLEAR = 3.0
"""How much closer the ends must agree than under any other offset."""
_WITNESSES = 4
"""Pairs that are too few to be believed may still speak against others."""
_RIVAL = 0.7
"""Share of its pairs that another offset must have to be one."""
_RESOLUTION_NS = 1_000
_AGREE_NS = 10_000
"""Ends of one collective do, on devices, where nothing else tells the same from the similar."""
_ENOUGH = {True: (3, 0.4), False: (5, 0.6)}
"""Coincidences, and their share of what both recorded, that make a pairing: with step numbers to go by, and without."""

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Column:
    """One rank's collectives in one communicator, in order of start. ``key``: whatever must agree within a pair."""

    start: Ints
    end: Ints
    sync: npt.NDArray[np.bool_]
    key: Ints
    """Operation and size as one number, the same for all columns of a communicator."""
    sequence: Ints
    """-1 where unknown."""
    step: Ints
    """Number of the profiler step it was launched in, -1 where unknown."""
    on_host: bool = False
    """The host's own times: it leaves when it is scheduled, so that all that is known is that stays overlap."""

    def __len__(self) -> int:
        return int(self.start.size)


@dataclass(frozen=True, slots=True)
class Pairing:
    """``left[i]`` of the one rank is ``right[i]`` of the other, whose clock is ``ahead`` (ns) at that pair."""

    left: Ints
    right: Ints
    ahead: Ints


def pair(a: Column, b: Column, one_clock: bool) -> Pairing | str:
    """Pair two ranks' collectives; why not, where the evidence does not carry a pairing.

    ``one_clock``: both ranks are of one host, so that their clocks agree.
    """
    if not len(a) or not len(b):
        return "no collective was recorded on both"
    why = ""
    if bool((a.sequence >= 0).all() and (b.sequence >= 0).all()):
        left, right = _by_sequence(a, b)
        if not left.size:
            return "they recorded no collective in common: their sequence numbers do not overlap"
        found = _checked(a, b, left, right, one_clock, trusted=True)
        if not isinstance(found, str):
            return found
        why = found
    found = _by_time(a, b, one_clock)
    return f"{why}; by time: {found}" if why and isinstance(found, str) else found


def _by_sequence(a: Column, b: Column) -> tuple[Ints, Ints]:
    """Coalesced operations share a number, so the nth of a number is paired with the nth."""
    places = {(s, n): i for i, (s, n) in enumerate(_numbered(a.sequence))}
    pairs = [(places[k], j) for j, k in enumerate(_numbered(b.sequence)) if k in places]
    left, right = (np.array([p[x] for p in pairs], np.int64) for x in (0, 1))
    same = a.key[left] == b.key[right]
    return left[same], right[same]


def _numbered(sequence: Ints) -> list[tuple[int, int]]:
    seen: dict[int, int] = {}
    out = []
    for s in sequence.tolist():
        seen[s] = seen.get(s, -1) + 1
        out.append((s, seen[s]))
    return out


def _tolerance(a: Column, b: Column, left: Ints, right: Ints) -> Floats:
    """By how much the ends of each pair may differ, clocks aligned."""
    of_a, of_b = a.end[left] - a.start[left], b.end[right] - b.start[right]
    if a.on_host:
        return np.asarray(np.maximum(of_a, of_b), float)
    length = np.minimum(of_a, of_b)
    return np.asarray(np.maximum(_END_NS, _END_SHARE * length), float)


def _checked(
    a: Column, b: Column, left: Ints, right: Ints, one_clock: bool, *, trusted: bool
) -> Pairing | str:
    """The pairs whose ends agree under one clock difference; why not, where most do not."""
    sync = a.sync[left] & b.sync[right]
    if not sync.any():
        return (
            Pairing(left, right, np.zeros(left.size, np.int64))
            if one_clock or trusted
            else "nothing synchronises them"
        )
    away = (b.end[right] - a.end[left]).astype(float)
    at = a.end[left].astype(float)
    allowed = _tolerance(a, b, left, right)
    ahead = np.zeros(left.size) if one_clock else _clock_line(at, away, sync, allowed)
    good = np.abs(away - ahead) <= allowed
    # One member may leave a broadcast or reduce long before another: only the order speaks for its pair.
    good |= ~sync
    share = float(good[sync].mean())
    if share < 0.5:
        worst = float(np.median(np.abs(away - ahead)[sync])) / 1e6
        return f"the ends of what would be the same collectives disagree, by {worst:,.3f} ms in the middle"
    return Pairing(left[good], right[good], np.rint(ahead[good]).astype(np.int64))


def _clock_line(at: Floats, away: Floats, sync: npt.NDArray[np.bool_], allowed: Floats) -> Floats:
    """The clocks' difference at each pair: constant, or a line where the ends clearly show drift."""
    x, y = at[sync], away[sync]
    offset = np.full(at.size, np.median(y))
    reach = float(np.ptp(x)) * _DRIFT
    near = np.abs(y - np.median(y)) <= allowed[sync] + reach
    if near.sum() < 4 or not np.ptp(x[near]):
        return offset
    slope, base = np.polyfit(x[near] - x[0], y[near], 1)
    line = base + slope * (at - x[0])
    flat, tilted = (float(np.abs(y[near] - f[sync][near]).mean()) for f in (offset, line))
    return line if abs(slope) <= 2 * _DRIFT and flat > 1_000 and tilted < flat / 2 else offset


def _by_time(a: Column, b: Column, one_clock: bool) -> Pairing | str:
    """By the ends alone, within steps of one number where both recorded such."""
    if not (a.sync.any() and b.sync.any()):
        return "nothing synchronises them"
    length = np.concatenate([(c.end - c.start)[c.sync] for c in (a, b)])
    rough = float(length.max()) if a.on_host else max(_END_NS, _END_SHARE * float(np.median(length)))
    rough += _DRIFT / 2 * float(max(np.ptp(a.end), np.ptp(b.end)))
    steps = np.intersect1d(a.step[a.step >= 0], b.step).size > 0
    return _coinciding(a, b, one_clock, steps, rough)


def _coinciding(a: Column, b: Column, one_clock: bool, steps: bool, near: float) -> Pairing | str:
    """Pair by the offset at which most ends coincide within ``near`` ns; ``steps``: only within steps of one number.

    Steps that repeat make other offsets nearly as good. Under the true one the ends agree as well as clocks do,
    under another only as well as steps resemble each other: it must be clearly the closest.
    """
    fewest, least = _ENOUGH[steps or one_clock]
    found: list[tuple[float, bool, Ints, Ints, float]] = []
    for offset in [0.0] if one_clock else _offsets(a, b, steps, near):
        left, right = _nearest(a, b, offset, near, steps)
        whole = left.size == len(a) == len(b)
        if whole or left.size >= (1 if one_clock else min(fewest, _WITNESSES)):
            found.append((_disagreement(a, b, left, right), not whole, left, right, offset))
    if not found:
        return "too few ends coincide to know which collectives are the same"
    best, part, left, right, offset = min(found, key=lambda f: (max(f[0], _RESOLUTION_NS), f[1]))
    rivals = [f[0] for f in found if f[4] != offset and f[2].size >= _RIVAL * left.size]
    if part and rivals and min(rivals) < _CLEAR * max(best, _RESOLUTION_NS):
        return "shifted by a step the ends agree as well, so which is which is not known"
    if part and (left.size < least * _in_common(a, b, offset) or (left.size < fewest and not one_clock)):
        return "too few ends coincide to know which collectives are the same"
    if not (steps or one_clock) and best > _AGREE_NS:
        return "the ends coincide only roughly, and neither a clock nor a sequence says which are the same"
    return _checked(a, b, left, right, one_clock, trusted=False)


def _offsets(a: Column, b: Column, steps: bool, near: float) -> list[float]:
    """The differences of the clocks, at least ``near`` apart, at which most ends coincide; best first."""
    some_a, some_b = np.flatnonzero(a.sync), np.flatnonzero(b.sync)
    some_a = some_a[:: max(1, some_a.size * some_b.size // _MOST)]
    same = a.key[some_a][:, None] == b.key[some_b][None, :]
    if steps:
        same &= a.step[some_a][:, None] == b.step[some_b][None, :]
    apart = np.sort((b.end[some_b][None, :] - a.end[some_a][:, None])[same]).astype(float)
    many = np.searchsorted(apart, apart + 2 * near, "right") - np.arange(apart.size)
    out: list[float] = []
    for i in np.argsort(-many, kind="stable").tolist():
        offset = float(np.median(apart[i : i + many[i]]))
        if all(abs(offset - o) > near for o in out):
            out.append(offset)
            if len(out) == _CANDIDATES:
                break
    return out


def _disagreement(a: Column, b: Column, left: Ints, right: Ints) -> float:
    """By how much the ends of the pairs typically differ, under the clock difference that suits them. ns"""
    away, at = (b.end[right] - a.end[left]).astype(float), a.end[left].astype(float)
    line = _clock_line(at, away, a.sync[left] & b.sync[right], _tolerance(a, b, left, right))
    return float(np.median(np.abs(away - line)))


def _nearest(a: Column, b: Column, offset: float, near: float, steps: bool) -> tuple[Ints, Ints]:
    """Pairs that are each other's nearest end, within ``near`` ns."""
    low = min(a.end.min(), b.end.min() - offset)
    ours, theirs = a.end - low, b.end - offset - low
    if steps:
        # Further apart than anything within a step: the nearest is of the same step if there is one.
        away = 2 * max(ours.max(), theirs.max()) + near
        ours, theirs = ours + away * a.step, theirs + away * b.step
    order = np.argsort(theirs, kind="stable")
    ends = theirs[order]
    at = np.searchsorted(ends, ours)
    options = np.stack([np.maximum(at - 1, 0), np.minimum(at, ends.size - 1)])
    gap = np.abs(ends[options] - ours[None, :])
    pick = options[np.argmin(gap, axis=0), np.arange(len(a))]
    right, left = order[pick], np.arange(len(a))
    distance = np.abs(theirs[right] - ours)
    ok = (distance <= near) & (a.key == b.key[right])
    if steps:
        ok &= a.step == b.step[right]
    left, right, distance = left[ok], right[ok], distance[ok]
    first = np.lexsort((distance, right))
    keep = np.append(True, right[first][1:] != right[first][:-1]) if first.size else np.zeros(0, bool)
    chosen = np.sort(first[keep])
    return left[chosen], right[chosen]


def _in_common(a: Column, b: Column, offset: float) -> int:
    """How many collectives the shorter recording has of the time that both recorded."""
    low = max(a.end.min(), b.end.min() - offset)
    high = min(a.end.max(), b.end.max() - offset)
    inside = [
        int(((c.end - o >= low - 1) & (c.end - o <= high + 1)).sum()) for c, o in ((a, 0.0), (b, offset))
    ]
    return min(inside)
