"""From which step to which a rank was slow: the stretch with the most evidence, which may have begun late and ended."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from trainsys.profiler.straggler.peers import median_where

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


def best_stretch(ratio: Floats, level: float, cap: float) -> tuple[Ints, Ints, Floats]:
    """[T, R] log-ratios -> first row and row behind the last, [R] each, of the stretch whose sum of ``ratio - level`` is
    greatest, each step's part within ``cap``: one wild step weighs no more than a few that are surely slow. And that
    sum."""
    return _greatest(np.clip(ratio - level, -cap, cap))


def closer_stretch(
    ratio: Floats, begin: Ints, end: Ints, level: float, cap: float, least: float
) -> tuple[Ints, Ints]:
    """Where what a stretch shows begins and ends.

    Steps that are a little late by chance count for a stretch, and would join one that is much later. So its ends are
    looked for once more within it, above half of what it shows: the same test, with that for ``level``. A stretch
    shorter than ``least`` rows is left as it is.
    """
    inside = rows_within(begin, end, len(ratio))
    # Where half of what it shows is no more than ``level`` the answer is the same.
    high = (inside & (ratio > 2 * level)).sum(axis=0)
    c = np.flatnonzero((2 * high > end - begin) & (end - begin >= least))
    own = median_where(ratio[:, c], inside[:, c]) / 2
    most = cap * own / level
    first, last = begin.copy(), end.copy()
    part = np.clip(ratio[:, c] - own, -most, most)
    first[c], last[c], _ = _greatest(np.where(inside[:, c], part, -most))
    return first, last


def rows_within(begin: Ints, end: Ints, rows: int) -> npt.NDArray[np.bool_]:
    """[rows, R]"""
    at = np.arange(rows)[:, None]
    return np.asarray((at >= begin) & (at < end))


def _greatest(part: Floats) -> tuple[Ints, Ints, Floats]:
    """First row, row behind the last and sum of each column's run of rows with the greatest sum."""
    gain = np.cumsum(part, axis=0)
    before = np.vstack([np.zeros((1, part.shape[1])), gain[:-1]])
    low = np.minimum.accumulate(before, axis=0)
    end = np.argmax(gain - low, axis=0)
    begin = np.argmin(np.where(np.arange(len(part))[:, None] <= end, before, np.inf), axis=0)
    return begin, end + 1, np.asarray((gain - low).max(axis=0))
