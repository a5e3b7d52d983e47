"""One slow rank, and the ranks of a peer group that have to be looked at to find it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from trainsys.profiler.straggler.peers import ratio_to_others, row_medians

Floats = npt.NDArray[np.float64]

SAMPLE = 1024
"""Peers that tell what is normal; the spread of so many is known to 3%."""
LEAST_STEPS = 8
LASTING = 0.25
"""A stretch of fewer steps, or of less of the window, is a moment, not a state: a machine that others use has many."""
PARTS = 16
"""A window of fewer steps is judged as a whole."""
STANDS_OUT = 3.0
"""Evidence over that of the median peer, at the least."""


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


@dataclass(frozen=True)
class Near:
    """Ranks of one peer group that are looked at: ``normal`` ones tell the spread between ranks."""

    columns: npt.NDArray[np.int64]
    ratio: Floats
    normal: npt.NDArray[np.bool_]
    ranks: int
    """How many the group has."""


def look(table: Floats, mine: npt.NDArray[np.int64], floor: float) -> Near:
    """All of a small group; of a large one a sample, and whoever is above the floor in as many steps as the shortest
    stretch needs."""
    whole = mine.size == table.shape[1]
    x = table if whole else table[:, mine]
    if mine.size <= SAMPLE:
        return Near(mine, ratio_to_others(np.log(x)), np.ones(mine.size, bool), mine.size)
    middle = row_medians(x)
    # Among so many the rank itself does not move the median.
    least = max(LEAST_STEPS, LASTING * len(x)) / 2 if len(x) >= PARTS else (len(x) - 1) // 2
    late = np.count_nonzero(x >= (middle * np.exp(floor))[:, None], axis=0) >= least
    sampled = np.zeros(mine.size, bool)
    sampled[:: -(-mine.size // SAMPLE)] = True
    chosen = np.flatnonzero(late | sampled)
    return Near(mine[chosen], np.log(x[:, chosen]) - np.log(middle)[:, None], sampled[chosen], mine.size)
