"""How uncertain a mean over steps is when steps resemble their neighbours.

Temperature, other jobs and the data drift slowly, so a rank that is slow in one step is likely slow in the next without
being broken. The error of a mean over n such steps is not sigma / sqrt(n) but sigma * sqrt(V / n), with V the ratio of
the noise's long-run variance to its variance. V is taken from the data, all ranks of a group together, on the safe side.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

MAD_TO_SIGMA = 1.4826
MEDIAN_ERROR = 1.2533
"""Standard error of a median against that of a mean, for normal noise: sqrt(pi/2)."""
BLOCKS = 8
"""Pieces of a window whose medians tell about slow changes ..."""
SHORT = 8
"""... and steps of a piece whose medians tell of spells: other work that comes and goes."""
_CAP = 4.0
"""Deviations beyond so many sigma count as so many in the lag-1 correlation: a pause is not memory."""
_SURE = 2.0
"""Standard errors that are added to an estimate from few steps."""
_MOST = 0.98


def deviation(residual: Floats) -> Floats:
    """[T, R] -> [R]: the robust standard deviation of each column about its median."""
    return np.asarray(MAD_TO_SIGMA * np.median(np.abs(residual - np.median(residual, axis=0)), axis=0))


def inflation(residual: Floats, level: bool = True, sure: float = _SURE) -> float:
    """V, at least 1, of noise [T, R] that columns share the kind of.

    The largest of three estimates: of a process with one memory (its lag-1 correlation, corrected for what the mean took
    away: Kendall 1954), and of medians over long and short blocks, which also see slow change beneath quick noise, and
    spells. ``level``: each column still has its own level. ``sure``: standard errors that are added to each.
    """
    t, r = residual.shape
    if t < 4:
        return 1.0
    sigma = np.maximum(deviation(residual), 1e-12)
    x = residual - np.median(residual, axis=0) if level else residual
    x = x / sigma
    near = np.clip(x, -_CAP, _CAP)
    if level:
        near = near - near.mean(axis=0)
    power = float((near**2).sum())
    if power <= 0:
        return 1.0
    independent = max(1, r - 1)  # ratios to peers: one column follows from the others
    rho = float((near[1:] * near[:-1]).sum()) / power * t / (t - 1)
    rho += (1 + 3 * max(rho, 0.0)) / t + sure / math.sqrt(t * independent)
    rho = min(max(rho, 0.0), _MOST)
    memory: float = (1 + rho) / (1 - rho)
    return max([memory, *(_of_blocks(x, length, sure, independent) for length in {SHORT, t // BLOCKS} if length >= 2)])


def _of_blocks(x: Floats, length: int, sure: float, independent: int) -> float:
    """V from the medians of blocks of ``length`` steps, beside what they would vary by without memory."""
    t, r = x.shape
    blocks = t // length
    if blocks < 3:
        return 1.0
    middle = np.median(x[: blocks * length].reshape(blocks, length, r), axis=1)
    found = float(middle.var(axis=0, ddof=1).mean()) * length / MEDIAN_ERROR**2
    return float(found * (1 + sure * math.sqrt(2 / ((blocks - 1) * independent))))
