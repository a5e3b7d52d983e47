"""A rank beside its peers, of whom it is none."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


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
        out[:, mine] = ratio_to_others(logs[:, mine])
    return out


def ratio_to_others(logs: Floats) -> Floats:
    return logs - median_of_others(logs) if logs.shape[1] > 1 else np.zeros_like(logs)


def median_of_others(x: Floats) -> Floats:
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


def row_medians(x: Floats) -> Floats:
    """Median of each row: one partition, where ``np.median`` makes several."""
    n = x.shape[1]
    part = np.partition(x, n // 2, axis=1)
    high = part[:, n // 2]
    return np.asarray(high if n % 2 else (part[:, : n // 2].max(axis=1) + high) / 2)


def median_where(x: Floats, here: npt.NDArray[np.bool_]) -> Floats:
    """Median of each column over the rows that are ``here``; 0 where none is."""
    ordered = np.sort(np.where(here, x, np.inf), axis=0)
    n = here.sum(axis=0)
    columns = np.arange(x.shape[1])
    middle = (ordered[np.maximum(0, (n - 1) // 2), columns] + ordered[np.minimum(n // 2, len(x) - 1), columns]) / 2
    return np.asarray(np.where(n > 0, middle, 0.0))
