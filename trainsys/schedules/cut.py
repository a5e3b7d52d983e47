"""A row of costs cut into consecutive parts, at the least value of a measure of the parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def largest(before: Array, part: Array) -> Array:
    """The largest part so far."""
    return np.maximum(before, part)


def squares(before: Array, part: Array) -> Array:
    """The sum of squares so far."""
    return before + part * part


def cut(
    costs: Sequence[float],
    parts: int,
    fold: Callable[[Array, Array], Array],
    others: Sequence[float] = (),
    limit: float = float("inf"),
) -> tuple[float, list[int]]:
    """The places ``[0, …, n]`` that cut ``costs`` into non-empty parts at the smallest value, and that value.

    ``fold(value of the parts before, sum of a part)``, growing in both, gives the value. No part's sum of
    ``others`` may pass ``limit``. Dynamic programming over (parts, items): exact.
    """
    n = len(costs)
    part = _sums(costs)
    allowed = np.triu(np.ones((n + 1, n + 1), bool), 1)
    if others:
        allowed &= _sums(others) <= limit
    best = np.full(n + 1, np.inf)
    best[0] = 0.0
    choices = []
    for _ in range(parts):
        value = np.where(allowed, fold(best[:, None], part), np.inf)
        choices.append(n - np.argmin(value[::-1], axis=0))  # of equal ones the last
        best = value[choices[-1], np.arange(n + 1)]
    cuts = [n]
    for choice in reversed(choices):
        cuts.append(int(choice[cuts[-1]]))
    return float(best[n]), cuts[::-1]


def _sums(costs: Sequence[float]) -> Array:
    """[i, j]: the sum of items i to j - 1."""
    total = np.concatenate([[0.0], np.cumsum(costs)])
    out: Array = total[None, :] - total[:, None]
    return out
