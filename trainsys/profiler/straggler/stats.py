"""Slow ranks among many, with a bound on false alarms.

What is compared is *work*: seconds a rank spent between collectives, which a collective does not
equalise as it does the phases that contain one. The steps of the method:

1. log-ratio of each rank's work to the median of its peers' (same stage, same phase, same step). Logs make
   "10% slower" mean the same for a long and a short phase, and the peers' median ignores the slow ones;
2. median over the window's steps: one slow step (garbage collection, a checkpoint) is not a slow rank;
3. a robust z: against the spread *between* ranks (MAD) where there are ranks enough to know it, and against
   the rank's own scatter *in time* (the standard error of a median), whichever is larger;
4. Bonferroni: the threshold grows with the number of ranks, so that a whole window of healthy ranks raises a
   false alarm with probability <= ``alpha``. At 10,000 ranks and alpha 0.01 that is z > 4.75;
5. an effect floor and persistence: what costs under 3%, or is slow in fewer than 60% of the steps, is not
   worth a name.

Cost: one median and one comparison over [T, R]. In a large group only ranks that can still be slow after these, and a
sample that tells what is normal, are looked at closer: 16,384 ranks x 50 steps take a few tens of milliseconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

_MAD_TO_SIGMA = 1.4826
_MEDIAN_ERROR = 1.2533
"""Standard error of a median against that of a mean, for normal noise: sqrt(pi/2)."""
_ENOUGH_RANKS = 8
"""Below this many peers their spread says nothing of what is normal."""
SAMPLE = 1024
"""Peers that tell what is normal; the spread of so many is known to 3%."""


@dataclass(frozen=True, slots=True)
class Straggler:
    """One slow rank. ``cost_s``: what each step would save everyone if it were as fast as its slowest healthy peer."""

    index: int
    slowdown: float
    """Work over the peers' median, minus 1: 0.05 is 5% slow."""
    z: float
    share: float
    """Share of the window's steps in which it was slower than its peers by more than half the effect."""
    since: int
    """First step of the window from which it stayed slow."""
    cost_s: float


def peer_log_ratio(work: Floats, peers: npt.NDArray[np.int64] | None = None) -> Floats:
    """ln(work / median of the rank's peers), the rank itself left out. [T, R] -> [T, R].

    ``peers[R]`` labels who compares with whom (None: all). A rank with no peer gets 0. Leaving the rank
    out matters where peers are few: of two ranks the median is the mean, which the slow one drags along.
    """
    logs = np.log(np.maximum(work, np.finfo(float).tiny))
    labels = np.zeros(work.shape[1], np.int64) if peers is None else np.asarray(peers)
    out = np.zeros_like(logs)
    for label in np.unique(labels):
        mine = np.flatnonzero(labels == label)
        out[:, mine] = _ratio_to_others(logs[:, mine])
    return out


def _ratio_to_others(logs: Floats) -> Floats:
    return logs - _median_of_others(logs) if logs.shape[1] > 1 else np.zeros_like(logs)


def _median_of_others(x: Floats) -> Floats:
    """For each column the median over the other columns, from one partial sort. [T, R] -> [T, R]."""
    n = x.shape[1]
    if n == 2:
        return x[:, ::-1]
    # Without one element the median moves by at most one place: it depends on which side the element lies.
    lo, hi = (n - 2) // 2, n // 2
    places = sorted({lo, lo + 1, hi, (n - 1) // 2, min(hi + 1, n - 1)})
    part = np.partition(x, places, axis=1)
    if n % 2:  # n-1 others, even: mean of the two middle ones
        a, b, c = part[:, n // 2 - 1, None], part[:, n // 2, None], part[:, n // 2 + 1, None]
        return np.where(x < b, (b + c) / 2, np.where(x > b, (a + b) / 2, (a + c) / 2))
    a, b = part[:, n // 2 - 1, None], part[:, n // 2, None]
    return np.where(x <= a, b, a)


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
        min_share: least share of steps in which it must show.

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
    floor = np.log1p(min_effect)
    near = [_look(table, np.flatnonzero(labels == label), floor) for label in np.unique(labels)]
    columns = np.concatenate([n.columns for n in near])
    ratio = np.concatenate([n.ratio for n in near], axis=1)
    middle = np.median(ratio, axis=0)
    normal = np.concatenate([n.normal for n in near])
    sigma = np.maximum(_scatter_in_time(ratio, middle), _spread_between(middle, labels[columns], normal))
    z = np.divide(middle, sigma, out=np.zeros(middle.size), where=np.isfinite(sigma) & (sigma > 0))
    z[(sigma == 0) & (middle > 0)] = np.inf
    threshold = NormalDist().inv_cdf(1 - alpha / r)
    share = (ratio > floor / 2).mean(axis=0)
    chosen = np.flatnonzero((z > threshold) & (middle >= floor) & (share >= min_share))
    slow = columns[chosen]
    out = []
    for label in np.unique(labels[slow]):
        healthy = labels == label
        healthy[slow] = False
        slowest = table[:, healthy].max(axis=1) if healthy.any() else None
        for c in chosen[labels[slow] == label].tolist():
            i = int(columns[c])
            cost = 0.0 if slowest is None else float(np.median(table[:, i] - slowest))
            since = _since(ratio[:, c] > floor / 2)
            out.append(
                Straggler(i, float(np.expm1(middle[c])), float(z[c]), float(share[c]), since, max(cost, 0.0))
            )
    return sorted(out, key=lambda s: -s.slowdown)


@dataclass(frozen=True)
class _Near:
    """Ranks of one peer group that are looked at: ``normal`` ones tell the spread between ranks."""

    columns: npt.NDArray[np.int64]
    ratio: Floats
    normal: npt.NDArray[np.bool_]


def _look(table: Floats, mine: npt.NDArray[np.int64], floor: float) -> _Near:
    """All of a small group; of a large one a sample, and whoever is above the floor in half of the steps: a median
    over time that is above the floor cannot do with less."""
    whole = mine.size == table.shape[1]
    x = table if whole else table[:, mine]
    if mine.size <= SAMPLE:
        return _Near(mine, _ratio_to_others(np.log(x)), np.ones(mine.size, bool))
    middle = row_medians(x)
    # Among so many the rank itself does not move the median.
    late = np.count_nonzero(x >= (middle * np.exp(floor))[:, None], axis=0) >= (len(x) - 1) // 2
    sampled = np.zeros(mine.size, bool)
    sampled[:: -(-mine.size // SAMPLE)] = True
    chosen = np.flatnonzero(late | sampled)
    return _Near(mine[chosen], np.log(x[:, chosen]) - np.log(middle)[:, None], sampled[chosen])


def row_medians(x: Floats) -> Floats:
    """Median of each row: one partition, where ``np.median`` makes several."""
    n = x.shape[1]
    part = np.partition(x, n // 2, axis=1)
    high = part[:, n // 2]
    return np.asarray(high if n % 2 else (part[:, : n // 2].max(axis=1) + high) / 2)


def _scatter_in_time(ratio: Floats, middle: Floats) -> Floats:
    """Standard error of each rank's median over time; infinite from a single step."""
    t = ratio.shape[0]
    if t < 3:
        return np.full(middle.shape, np.inf if middle.size < _ENOUGH_RANKS else 0.0)
    mad = np.median(np.abs(ratio - middle), axis=0)
    return np.asarray(_MEDIAN_ERROR * _MAD_TO_SIGMA * mad / np.sqrt(t))


def _spread_between(
    middle: Floats, labels: npt.NDArray[np.int64], normal: npt.NDArray[np.bool_]
) -> Floats:
    """MAD between the ``normal`` ranks of a peer group, as a sigma; 0 where they are too few to tell."""
    out = np.zeros(middle.shape)
    for label in np.unique(labels):
        mine = labels == label
        x = middle[mine & normal]
        if x.size >= _ENOUGH_RANKS:
            out[mine] = _MAD_TO_SIGMA * np.median(np.abs(x - np.median(x)))
    return out


def _since(slow: npt.NDArray[np.bool_]) -> int:
    """The step from which the most of "slow" and the least of "not slow" follows (a change point by counting)."""
    gain = np.cumsum(np.where(slow[::-1], 1.0, -1.5))[::-1]
    return int(np.argmax(gain))
