"""From which step to which a rank was slow: the stretch with the most evidence, which may have begun late and ended."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


def best_stretch(ratio: Floats, level: float, cap: float) -> tuple[Ints, Ints, Floats]:
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
