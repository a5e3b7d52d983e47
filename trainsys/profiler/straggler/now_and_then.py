"""Ranks that are late again and again, which the median over a stretch does not see."""

from __future__ import annotations

import numpy as np

from trainsys.profiler.straggler.group import STANDS_OUT, Floats, Near, Straggler
from trainsys.profiler.straggler.noise import BLOCKS, deviation

_BURST = 0.2
"""A step this much late, as a log-ratio, is one of those that count."""
_BURSTS = 0.08
"""Share of the window's steps that are, at the least."""


def now_and_then(near: Near, residual: Floats, threshold: float) -> list[Straggler]:
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
        if not others.any() or often[others].max() > often[c] / STANDS_OUT:
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
