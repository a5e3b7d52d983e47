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

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from trainsys.profiler.straggler.episodes import best_stretch
from trainsys.profiler.straggler.noise import BLOCKS, MAD_TO_SIGMA, MEDIAN_ERROR, deviation, inflation
from trainsys.profiler.straggler.peers import median_of_others, median_where, ratio_to_others, row_medians

Floats = npt.NDArray[np.float64]

_ENOUGH_RANKS = 8
"""Below this many peers their spread says nothing of what is normal."""
_RESOLUTION = 1e-3
"""No spread is known to be smaller: work is compared to 0.1%."""
SAMPLE = 1024
"""Peers that tell what is normal; the spread of so many is known to 3%."""
LEAST_STEPS = 8
LASTING = 0.25
"""A stretch of fewer steps, or of less of the window, is a moment, not a state: a machine that others use has many."""
_PARTS = 16
"""A window of fewer steps is judged as a whole."""
_WHOLE = 0.9
"""A stretch of so much of the window was not chosen among many."""
_STRETCHES = 2.0
"""Stretches that are as good as independent, over the square of those that fit side by side; by simulation."""
_CAP = 4.0
"""A step weighs no more than so many effect floors in the choice of a stretch."""
_MOST_SLOW = 8
_PEAK = 0.03
"""Windows in which the highest of all healthy ranks is above that."""
_STANDS_OUT = 3.0
"""Evidence over that of the median peer, at the least."""
_BURST = 0.2
"""A step this much late, as a log-ratio, is one of those that ``now_and_then`` counts."""
_BURSTS = 0.08
"""Share of the window's steps that are, at the least."""


@dataclass(frozen=True, slots=True)
class Straggler:
    """One slow rank. ``cost_s``: what each step would save everyone if it were as fast as its slowest healthy peer."""

    index: int
    slowdown: float
    """Work over the peers' median, minus 1: 0.05 is 5% slow. In the steps in which it was."""
    z: float
    share: float
    """Share of the steps from ``since`` to ``until`` in which it was slower than its peers by over half the effect."""
    since: int
    """First row of the window in which it was slow."""
    until: int
    """The row behind the last."""
    cost_s: float
    now_and_then: bool = False
    """Not for a stretch: again and again, in ``share`` of the window's steps."""


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
        near = _look(table, mine, np.log1p(min_effect))
        found = _judge(near, alpha / r, np.log1p(min_effect), min_share)
        healthy = np.setdiff1d(mine, [s.index for s in found])
        slowest = table[:, healthy].max(axis=1) if found and healthy.size else None
        out += [s if slowest is None else _with_cost(s, table[:, s.index] - slowest) for s in found]
    return sorted(out, key=lambda s: -s.slowdown)


def _with_cost(s: Straggler, late: Floats) -> Straggler:
    cost = np.maximum(late, 0.0).mean() if s.now_and_then else np.median(late[s.since : s.until])
    return Straggler(s.index, s.slowdown, s.z, s.share, s.since, s.until, max(0.0, float(cost)), s.now_and_then)


@dataclass(frozen=True)
class _Near:
    """Ranks of one peer group that are looked at: ``normal`` ones tell the spread between ranks."""

    columns: npt.NDArray[np.int64]
    ratio: Floats
    normal: npt.NDArray[np.bool_]
    ranks: int
    """How many the group has."""


def _look(table: Floats, mine: npt.NDArray[np.int64], floor: float) -> _Near:
    """All of a small group; of a large one a sample, and whoever is above the floor in as many steps as the shortest
    stretch needs."""
    whole = mine.size == table.shape[1]
    x = table if whole else table[:, mine]
    if mine.size <= SAMPLE:
        return _Near(mine, ratio_to_others(np.log(x)), np.ones(mine.size, bool), mine.size)
    middle = row_medians(x)
    # Among so many the rank itself does not move the median.
    least = max(LEAST_STEPS, LASTING * len(x)) / 2 if len(x) >= _PARTS else (len(x) - 1) // 2
    late = np.count_nonzero(x >= (middle * np.exp(floor))[:, None], axis=0) >= least
    sampled = np.zeros(mine.size, bool)
    sampled[:: -(-mine.size // SAMPLE)] = True
    chosen = np.flatnonzero(late | sampled)
    return _Near(mine[chosen], np.log(x[:, chosen]) - np.log(middle)[:, None], sampled[chosen], mine.size)


def _judge(near: _Near, alpha: float, floor: float, min_share: float) -> list[Straggler]:
    """The slow ones of a group, without their cost; ``alpha`` for each rank."""
    ratio = near.ratio
    t, r = ratio.shape
    begin, end, weight = best_stretch(ratio, floor / 2, _CAP * floor)
    if t < _PARTS:
        begin, end = np.zeros_like(begin), np.full_like(end, t)
    n = end - begin
    inside = (np.arange(t)[:, None] >= begin) & (np.arange(t)[:, None] < end)
    middle = median_where(ratio, inside)
    residual = ratio - np.where(inside, middle, median_where(ratio, ~inside))
    shared = _memory(ratio, residual, near.normal)
    between = 0.0
    if near.normal.sum() >= _ENOUGH_RANKS:
        levels = np.median(ratio[:, near.normal], axis=0)
        between = float(MAD_TO_SIGMA * np.median(np.abs(levels - np.median(levels))))
    if t < 3:
        own = np.full(r, np.inf if r < _ENOUGH_RANKS else 0.0)
    else:
        # A rank that happens to be quiet in this window is no quieter than its peers.
        scatter = deviation(residual)
        own = MEDIAN_ERROR * np.maximum(scatter, np.median(scatter[near.normal])) * np.sqrt(shared / n)
    sigma = np.maximum(np.maximum(own, between), _RESOLUTION)
    whole = n >= _WHOLE * t
    least = min(t, max(LEAST_STEPS, LASTING * t))
    stretches = max(1.0, (t / least) ** 2 * _STRETCHES)
    thresholds = [NormalDist().inv_cdf(1 - alpha / 2 / k) for k in (1.0, stretches)]
    z = middle / sigma
    share = ((ratio > floor / 2) & inside).sum(axis=0) / n
    # Where everybody has such stretches it is the machine that others use.
    pieces = np.array_split(ratio[:, near.normal], 1 if t < _PARTS else round(1 / LASTING))
    error = np.maximum(np.maximum((own * np.sqrt(n / len(pieces[0])))[near.normal], between), _RESOLUTION)
    usual = _usual_peak(np.array([np.median(piece, axis=0) for piece in pieces]) / error, _PEAK / near.ranks)
    thresholds = [max(threshold, usual) for threshold in thresholds]
    slow = (z > np.where(whole, *thresholds)) & (middle >= floor) & (share >= min_share) & (n >= least)
    slow &= weight >= _STANDS_OUT * median_of_others(weight[None])[0]
    if (upper := _MOST_SLOW / near.normal.sum()) <= 0.25:
        slow &= weight >= 2 * np.quantile(weight[near.normal], 1 - upper)
    out = []
    for c in np.flatnonzero(slow).tolist():
        alone = residual[:, [c]]
        z_own = z[c] * min(1.0, np.sqrt(shared[c] / inflation(alone, level=False, sure=0.0))) if t >= _PARTS else z[c]
        if z_own > thresholds[0 if whole[c] else 1]:
            at, slowdown = (int(begin[c]), int(end[c])), float(np.expm1(middle[c]))
            out.append(Straggler(int(near.columns[c]), slowdown, float(z_own), float(share[c]), *at, 0.0))
    named = {s.index for s in out}
    return out + [s for s in _now_and_then(near, residual, thresholds[1]) if s.index not in named]


def _usual_peak(z: Floats, share: float) -> float:
    """What a ``share`` of many healthy ranks is above for a stretch, by the tail that their z [pieces, R] have (taken to
    fall exponentially, and so more slowly than that of a normal one); 0 for few ranks. ``_MOST_SLOW`` of them may be slow
    without a trace in it."""
    upper = max(_MOST_SLOW / z.shape[1], 0.01)
    if upper > 0.25 or not np.isfinite(z).all():
        return 0.0
    high, low = np.quantile(z, [1 - upper, 1 - min(0.5, 10 * upper)])
    per_fold = (high - low) / np.log(min(0.5, 10 * upper) / upper)
    return float(high + per_fold * np.log(upper / share))


def _memory(ratio: Floats, residual: Floats, normal: npt.NDArray[np.bool_]) -> Floats:
    """[R]: by how much each rank's noise is more uncertain than independent steps'. Of many ranks it is that of all as
    they are, of few that of the others: one of them may be slow."""
    r = ratio.shape[1]
    if r >= _ENOUGH_RANKS:
        return np.full(r, inflation(ratio[:, normal]))
    if r == 2:
        return np.full(r, inflation(residual, level=False))
    return np.array([inflation(np.delete(ratio, i, axis=1)) for i in range(r)])


def _now_and_then(near: _Near, residual: Floats, threshold: float) -> list[Straggler]:
    """Ranks that are far behind in many steps, all over the window, and that others are not."""
    ratio = near.ratio
    t, r = ratio.shape
    length = t // BLOCKS
    if length < 2:
        return []
    burst = ratio > max(_BURST, 4 * float(np.median(deviation(residual))))
    often = burst.mean(axis=0)
    chosen = np.flatnonzero(often >= _BURSTS)
    if not chosen.size:
        return []
    lateness = np.clip(ratio, 0.0, 1.0)
    blocks = lateness[: length * BLOCKS].reshape(BLOCKS, length, r).mean(axis=1)
    out = []
    for c in chosen.tolist():
        others = near.normal.copy()
        others[c] = False
        if not others.any() or often[others].max() > often[c] / _STANDS_OUT:
            continue
        excess = blocks[:, c] - blocks[:, others].mean(axis=1)
        sigma = max(float(excess.std(ddof=1)), 1e-3) / np.sqrt(BLOCKS)
        z = float(excess.mean()) / sigma
        in_blocks = burst[: length * BLOCKS, c].reshape(BLOCKS, length).any(axis=1).sum()
        if z > threshold and in_blocks > BLOCKS / 2:
            rows = np.flatnonzero(burst[:, c])
            slowdown = float(np.expm1(np.median(ratio[rows, c])))
            at = int(rows[0]), int(rows[-1]) + 1
            out.append(Straggler(int(near.columns[c]), slowdown, z, float(often[c]), *at, 0.0, now_and_then=True))
    return out
