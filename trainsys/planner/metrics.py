"""How good predictions are: errors, ranking within groups, regret of the first pick, out-of-memory calls."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainsys.planner.cases import Array

Bools = NDArray[np.bool_]
MIN_LAYOUTS = 8


def mape(predicted: Array, measured: Array) -> float:
    """Mean absolute error over measured, in percent; NaN of nothing."""
    return float(np.mean(np.abs(predicted / measured - 1.0)) * 100.0) if len(measured) else float("nan")


def median_error(predicted: Array, measured: Array) -> float:
    """Median absolute error over measured, in percent."""
    return float(np.median(np.abs(predicted / measured - 1.0)) * 100.0) if len(measured) else float("nan")


def ranks(values: Array) -> Array:
    """1-based ranks, ties averaged."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    out: Array = (ends - (counts - 1) / 2.0)[inverse]
    return out


def spearman(a: Array, b: Array) -> float:
    """Rank correlation; NaN where either is constant."""
    ra, rb = ranks(a), ranks(b)
    if np.ptp(ra) == 0 or np.ptp(rb) == 0:
        return float("nan")
    return float(np.corrcoef(ra, rb)[0, 1])


def balanced_accuracy(called: Bools, truth: Bools) -> float:
    """Mean of the share of true OOM rows called and of running rows not called, percent; NaN without both."""
    if truth.all() or not truth.any():
        return float("nan")
    return float(50.0 * (np.mean(called[truth]) + np.mean(~called[~truth])))


@dataclass(frozen=True)
class GroupScore:
    key: Hashable
    layouts: int
    spearman: float
    regret: float  # percent; NaN where nothing that ran was picked
    pick_oom: bool


def score_groups(
    keys: Sequence[Hashable],
    layouts: Sequence[Hashable],
    predicted_s: Array,
    measured_s: Array,
    oom: Bools,
    called_oom: Bools,
    memory: Array,
) -> list[GroupScore]:
    """One score for each group of at least ``MIN_LAYOUTS`` distinct layouts.

    The first pick is the fastest predicted among the rows predicted to fit (the smallest where none is). Its regret
    is its measured time over the group's best, less one; a pick that really ran out of memory counts as such, and
    the regret is then that of the next pick that ran.
    """
    members: dict[Hashable, list[int]] = defaultdict(list)
    for i, key in enumerate(keys):
        if oom[i] or np.isfinite(measured_s[i]):
            members[key].append(i)
    out = []
    for key, rows in members.items():
        if len({layouts[i] for i in rows}) < MIN_LAYOUTS:
            continue
        index = np.asarray(rows)
        ran = index[~oom[index]]
        if not len(ran):
            continue
        fits = ~called_oom[index]
        order = index[np.argsort(np.where(fits, predicted_s[index], 1e12 + memory[index]), kind="stable")]
        first_ran = order[~oom[order]][0]
        best = float(np.min(measured_s[ran]))
        out.append(
            GroupScore(
                key,
                len({layouts[i] for i in rows}),
                spearman(predicted_s[ran], measured_s[ran]) if len(ran) > 2 else float("nan"),
                float((measured_s[first_ran] / best - 1.0) * 100.0),
                bool(oom[order[0]]),
            )
        )
    return out
