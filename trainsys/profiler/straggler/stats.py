"""Slow ranks among many, with a bound on false alarms.

What is compared is *work*: seconds a rank spent between collectives, which a collective does not
equalise as it does the phases that contain one. The steps of the method:

1. log-ratio of each rank's work to the median of its peers' (same stage, same phase, same step). Logs make
   "10% slower" mean the same for a long and a short phase, and the peers' median ignores the slow ones;
2. the stretch of steps with the most evidence (``episodes``), which may have ended, and the median over it: one slow
   step (garbage collection, a checkpoint) is not a slow rank;
3. a robust z: against the spread *between* ranks (MAD) where there are ranks enough to know it, and against
   the noise *in time*, whose memory is estimated too (``noise``), whichever is larger;
4. Bonferroni: the threshold grows with the number of ranks and of stretches, so that a whole window of healthy ranks
   raises a false alarm with probability <= ``alpha``. At 10,000 ranks and alpha 0.01 that is z > 4.9;
5. an effect floor and persistence: what costs under 3%, or is slow in fewer than 60% of the stretch's steps, is not
   worth a name. A rank that is late again and again, and no other is, has a test of its own (``now_and_then``).

Cost: one median and one comparison over [T, R]. In a large group only ranks that can still be slow after these, and a
sample that tells what is normal, are looked at closer: 16,384 ranks x 50 steps take a few tens of milliseconds.
"""

from __future__ import annotations

from dataclasses import replace
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from trainsys.profiler.straggler.episodes import best_stretch, closer_stretch, rows_within
from trainsys.profiler.straggler.group import LASTING, LEAST_STEPS, PARTS, STANDS_OUT, Near, Straggler, look
from trainsys.profiler.straggler.noise import MAD_TO_SIGMA, MEDIAN_ERROR, deviation, inflation
from trainsys.profiler.straggler.now_and_then import now_and_then
from trainsys.profiler.straggler.peers import median_of_others, median_where

Floats = npt.NDArray[np.float64]

_ENOUGH_RANKS = 8
"""Below this many peers their spread says nothing of what is normal."""
_RESOLUTION = 1e-3
"""No spread is known to be smaller: work is compared to 0.1%."""
_WHOLE = 0.9
"""A stretch of so much of the window was not chosen among many."""
_STRETCHES = 2.0
"""Stretches that are as good as independent, over the square of those that fit side by side; by simulation."""
_CAP = 4.0
"""A step weighs no more than so many effect floors in the choice of a stretch."""
_MOST_SLOW = 8
_PEAK = 0.03
"""Windows in which the highest of all healthy ranks is above that."""


def find_stragglers(
    work: npt.ArrayLike,
    peers: npt.ArrayLike | None = None,
    *,
    alpha: float = 0.01,
    min_effect: float = 0.03,
    min_share: float = 0.6,
) -> list[Straggler]:
    """Slow ranks of a window, worst first.

    Args:
        work: seconds [T steps, R ranks] spent between collectives; NaN where a rank or step is missing.
        peers: label of each rank's peer group [R], e.g. its pipeline stage; None: one group.
        alpha: probability that a window of healthy ranks raises any alarm.
        min_effect: least slowdown worth naming, as a fraction.
        min_share: least share of a stretch's steps in which it must show.

    One step can only be judged against the spread between ranks, so of fewer than eight ranks nothing is
    said from a single step.
    """
    table = np.asarray(work, float)
    assert table.ndim == 2, table.shape
    t, r = table.shape
    if t == 0 or r < 2:
        return []
    labels = np.zeros(r, np.int64) if peers is None else np.asarray(peers, np.int64)
    holes = ~np.isfinite(table) | (table <= 0)
    if holes.any():
        table = table.copy()
        present = np.ma.masked_array(table, holes)
        fill = np.ma.filled(np.ma.median(present, axis=1), 1.0)  # type: ignore[no-untyped-call]
        table[holes] = np.broadcast_to(fill[:, None], table.shape)[holes]
    out: list[Straggler] = []
    for label in np.unique(labels):
        mine = np.flatnonzero(labels == label)
        if mine.size < 2:
            continue
        near = look(table, mine, np.log1p(min_effect))
        found = _judge(near, alpha / r, np.log1p(min_effect), min_share)
        healthy = np.setdiff1d(mine, [s.index for s in found])
        slowest = table[:, healthy].max(axis=1) if found and healthy.size else None
        out += [s if slowest is None else _with_cost(s, table[:, s.index] - slowest) for s in found]
    return sorted(out, key=lambda s: -s.slowdown)


def _with_cost(s: Straggler, late: Floats) -> Straggler:
    cost = np.maximum(late, 0.0).mean() if s.now_and_then else np.median(late[s.since : s.until])
    return replace(s, cost_s=max(0.0, float(cost)))


def _judge(near: Near, alpha: float, floor: float, min_share: float) -> list[Straggler]:
    """The slow ones of a group, without their cost; ``alpha`` for each rank."""
    ratio = near.ratio
    t = len(ratio)
    least = min(t, max(LEAST_STEPS, LASTING * t))
    level, cap = floor / 2, _CAP * floor
    begin, end, weight = best_stretch(ratio, level, cap)
    suspect = np.flatnonzero(_stands_out(weight, near.normal))
    if t < PARTS:
        begin, end = np.zeros_like(begin), np.full_like(end, t)
    else:
        begin[suspect], end[suspect] = closer_stretch(
            ratio[:, suspect], begin[suspect], end[suspect], level, cap, least
        )
    n = end - begin
    inside = rows_within(begin, end, t)
    middle = median_where(ratio, inside)
    residual = ratio - np.where(inside, middle, median_where(ratio, ~inside))
    shared = _memory(ratio, residual, near.normal)
    step = _scatter(residual, shared, near.normal)
    between = _between(ratio[:, near.normal])
    z = middle / _sigma(step / np.sqrt(n), between)
    usual = _usual_peak(ratio[:, near.normal], step[near.normal], between, _PEAK / near.ranks)
    stretches = max(1.0, (t / least) ** 2 * _STRETCHES)
    sure, sure_of_many = (max(usual, NormalDist().inv_cdf(1 - alpha / 2 / k)) for k in (1.0, stretches))
    threshold = np.where(n >= _WHOLE * t, sure, sure_of_many)
    share = ((ratio > level) & inside).sum(axis=0) / n
    slow = (z > threshold) & (middle >= floor) & (share >= min_share) & (n >= least)
    out = []
    for c in suspect[slow[suspect]].tolist():
        if t >= PARTS:  # its own noise may have more memory than its peers'
            z[c] *= min(1.0, np.sqrt(shared[c] / inflation(residual[:, [c]], level=False, sure=0.0)))
        if z[c] > threshold[c]:
            slowdown = float(np.expm1(middle[c]))
            at = int(begin[c]), int(end[c])
            out.append(Straggler(int(near.columns[c]), slowdown, float(z[c]), float(share[c]), *at, 0.0))
    named = {s.index for s in out}
    return out + [s for s in now_and_then(near, residual, sure_of_many) if s.index not in named]


def _scatter(residual: Floats, shared: Floats, normal: npt.NDArray[np.bool_]) -> Floats:
    """[R]: the error of a median over one step, which falls with the root of their number; of one or two steps it is not
    known."""
    t, r = residual.shape
    if t < 3:
        return np.full(r, np.inf if r < _ENOUGH_RANKS else 0.0)
    own = deviation(residual)
    # A rank that happens to be quiet in this window is no quieter than its peers.
    return np.asarray(MEDIAN_ERROR * np.maximum(own, np.median(own[normal])) * np.sqrt(shared))


def _between(normal: Floats) -> float:
    """The spread between ranks [T, R] that stays; 0 where they are too few to tell."""
    if normal.shape[1] < _ENOUGH_RANKS:
        return 0.0
    levels = np.median(normal, axis=0)
    return float(MAD_TO_SIGMA * np.median(np.abs(levels - np.median(levels))))


def _sigma(error: Floats, between: float) -> Floats:
    return np.maximum(np.maximum(error, between), _RESOLUTION)


def _stands_out(weight: Floats, normal: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """[R]: whether a stretch has more evidence than those of others. Where everybody has such it is the machine."""
    out = weight >= STANDS_OUT * median_of_others(weight[None])[0]
    if (upper := _MOST_SLOW / normal.sum()) <= 0.25:
        out &= weight >= 2 * np.quantile(weight[normal], 1 - upper)
    return np.asarray(out)


def _usual_peak(normal: Floats, step: Floats, between: float, share: float) -> float:
    """What a ``share`` of many healthy ranks is above for a stretch, by the tail that the z of pieces of ``normal``
    [T, R] have (taken to fall exponentially, and so more slowly than that of a normal one); 0 for few ranks.
    ``_MOST_SLOW`` of them may be slow without a trace in it. ``step``: `_scatter`'s."""
    upper = max(_MOST_SLOW / normal.shape[1], 0.01)
    if upper > 0.25:
        return 0.0
    pieces = np.array_split(normal, 1 if len(normal) < PARTS else round(1 / LASTING))
    z = np.array([np.median(piece, axis=0) for piece in pieces]) / _sigma(step / np.sqrt(len(pieces[0])), between)
    lower = min(0.5, 10 * upper)
    high, low = np.quantile(z, [1 - upper, 1 - lower])
    return float(high + (high - low) / np.log(lower / upper) * np.log(upper / share))


def _memory(ratio: Floats, residual: Floats, normal: npt.NDArray[np.bool_]) -> Floats:
    """[R]: by how much each rank's noise is more uncertain than independent steps'. Of many ranks it is that of all as
    they are, of few that of the others: one of them may be slow."""
    r = ratio.shape[1]
    if r >= _ENOUGH_RANKS:
        return np.full(r, inflation(ratio[:, normal]))
    if r == 2:
        return np.full(r, inflation(residual, level=False))
    return np.array([inflation(np.delete(ratio, i, axis=1)) for i in range(r)])


