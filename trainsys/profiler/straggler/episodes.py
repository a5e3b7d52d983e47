"""From which step to which a rank was slow: the stretch with the most evidence, which may have begun late and ended."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from trainsys.profiler.straggler.peers import median_where

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


_CLOSER = 0.9
"""Of what is left unexplained by a stretch a closer one leaves less than this: a real step does, luck seldom."""
_HIGH = 0.8


def best_stretch(ratio: Floats, level: float | Floats, cap: float | Floats) -> tuple[Ints, Ints, Floats]:
    """[T, R] log-ratios -> first row and row behind the last, [R] each, of the stretch whose sum of ``ratio - level`` is
    greatest, each step's part within ``cap``: one wild step weighs no more than a few that are surely slow. And that
    sum."""
    gain = np.cumsum(np.clip(ratio - level, -cap, cap), axis=0)
    before = np.vstack([np.zeros((1, ratio.shape[1])), gain[:-1]])
    low = np.minimum.accumulate(before, axis=0)
    end = np.argmax(gain - low, axis=0)
    rows = np.arange(ratio.shape[0])[:, None]
    begin = np.argmin(np.where(rows <= end, before, np.inf), axis=0)
    return begin, end + 1, np.asarray((gain - low).max(axis=0))


def closer_stretch(ratio: Floats, begin: Ints, end: Ints, least: float) -> tuple[Ints, Ints]:
    """The same for what lies above half of what a stretch itself reaches, and ``least``, where that explains a rank's
    steps better: noise around the lower level joins quiet steps to a fault's, and hides where it begins and ends."""
    inside = rows_within(begin, end, len(ratio))
    ordered = np.sort(np.where(inside, ratio, np.inf), axis=0)
    reached = ordered[(_HIGH * (end - begin - 1)).astype(int), np.arange(ratio.shape[1])]
    level = np.maximum(least, reached / 2)
    first, last, _ = best_stretch(ratio, level, level)
    better = _left(ratio, rows_within(first, last, len(ratio))) < _CLOSER * _left(ratio, inside)
    return np.where(better, first, begin), np.where(better, last, end)


def rows_within(begin: Ints, end: Ints, rows: int) -> npt.NDArray[np.bool_]:
    """[rows, R]"""
    at = np.arange(rows)[:, None]
    return np.asarray((at >= begin) & (at < end))


def _left(ratio: Floats, inside: npt.NDArray[np.bool_]) -> Floats:
    """[R]: the sum of deviations from one median within and another outside."""
    level = np.where(inside, median_where(ratio, inside), median_where(ratio, ~inside))
    return np.asarray(np.abs(ratio - level).sum(axis=0))
