"""What ranks did when, on one axis, as the pages of runs and traces draw it: the slowest and a typical rank first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
MOST_LANES = 64


@dataclass
class Lane:
    """One rank. ``tracks``: each a list of ``[gap, length, kind]`` after one another, in ticks: how long after the end of
    the one before (the first: after the axis' zero) it began, for how long, and which of the timeline's kinds."""

    rank: int
    note: str
    tracks: list[list[int]]


@dataclass
class Timeline:
    """``tick_s``: seconds of a tick. ``length``: of the axis, in ticks. ``steps``: (number, where it ends) in ticks.

    ``kinds``: names of what tracks are made of; ``tracks``: what each track of a lane is.
    """

    title: str
    tick_s: float
    length: int
    kinds: list[str]
    tracks: list[str]
    lanes: list[Lane]
    steps: list[tuple[int, int]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def track(starts: Ints, ends: Ints, kinds: Ints) -> list[int]:
    """A lane's track from spans in ticks [n], in order and not overlapping; those that round to nothing are left out."""
    ends = np.maximum(ends, starts)
    keep = ends > starts
    starts, ends, kinds = starts[keep], ends[keep], kinds[keep]
    before = np.concatenate([np.zeros(1, np.int64), ends[:-1]]) if ends.size else ends
    flat: list[int] = np.stack([starts - before, ends - starts, kinds], axis=1).ravel().tolist()
    return flat


def slowest_and_typical(slowness: Sequence[float]) -> tuple[int, int]:
    """(the one with the highest, the one next to the median): which of the ranks; nan is neither.

    With one rank, or none that is known, they are the same.
    """
    values = np.asarray(slowness, float)
    if not np.isfinite(values).any():
        return 0, 0
    slowest = int(np.nanargmax(values))
    away = np.abs(values - np.nanmedian(values))
    if values.size > 1:
        away[slowest] = np.nan
    return slowest, int(np.nanargmin(away)) if np.isfinite(away).any() else slowest


def lanes_shown(slowness: Sequence[float], most: int = MOST_LANES) -> list[int]:
    """Which ranks, by place, in what order: the slowest, a typical one, then in order of rank. Of more than ``most``,
    half are the slowest and half are spread over the others."""
    if not len(slowness):
        return []
    first = list(dict.fromkeys(slowest_and_typical(slowness)))
    others = [i for i in range(len(slowness)) if i not in first]
    room = most - len(first)
    if len(others) > room:
        values = np.nan_to_num(np.asarray(slowness, float), nan=-np.inf)
        worst = sorted(others, key=lambda i: -values[i])[: room // 2]
        rest = [i for i in others if i not in set(worst)]
        even = np.unique(np.linspace(0, len(rest) - 1, room - len(worst)).astype(int))
        others = sorted(worst + [rest[i] for i in even.tolist()])
    return first + others
