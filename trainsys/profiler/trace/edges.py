"""Dependencies as columns, and what is taken over all of one owner."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain

import numpy as np

from trainsys.profiler.trace.intervals import Ints


@dataclass(frozen=True, slots=True)
class Edges:
    """``node`` is no sooner than ``lag`` ns after ``cause`` has ended. Those of one node stand together."""

    node: Ints
    cause: Ints
    lag: Ints


def flat(lists: list[tuple[int, ...]]) -> tuple[Ints, Ints]:
    """(index of the list, value) of each value of each list, in order."""
    count = np.fromiter(map(len, lists), np.int64, len(lists))
    values = np.fromiter(chain.from_iterable(lists), np.int64, int(count.sum()))
    return np.repeat(np.arange(len(lists)), count), values


def greatest(owner: Ints, values: Ints, n: int, none: int) -> Ints:
    """[n]: the greatest of each owner's values, which stand together; ``none`` where there are none."""
    out = np.full(n, none, np.int64)
    first = np.flatnonzero(np.diff(owner, prepend=-1))
    if first.size:
        out[owner[first]] = np.maximum.reduceat(values, first)
    return out
