"""From one rank's steps to a window's mean, and from all ranks' means to what rank 0 shows.

A rank adds each step to a ``Window``; every few steps the engine gathers ``window.take()`` (a few dozen
float64) to rank 0, which makes ``aggregate(gathered)`` of it. Nothing grows with the run.
"""

from __future__ import annotations

import math

import msgspec
import numpy as np
import numpy.typing as npt

from trainsys.telemetry.events import COMM, COMM_AXES, Step
from trainsys.telemetry.vectors import BYTES, HOST, PLACE, TIMED, VECTOR, to_vector

Floats = npt.NDArray[np.float64]
FOLD = 64
"""Steps kept until they are summed: a mean of many at once costs a hundredth of adding each."""
_HIGHEST = [PLACE[name] for name in ("reserved", "peak")]
_LATEST = [PLACE[name] for name in ("step", "lr", "allocated", "rss", *HOST)]


class Window:
    """The mean step since the last ``take``, in constant memory.

    Times, bytes, tokens, loss and gradient norm are means per step (of the values that are there); step number,
    learning rate and current memory are the latest; reserved and peak memory the highest.
    """

    def __init__(self) -> None:
        self.count = 0
        self._rows: list[list[float]] = []
        self._sum = np.zeros(len(VECTOR))
        self._have = np.zeros(len(VECTOR))
        self._high = np.zeros(len(_HIGHEST))

    def add(self, step: Step) -> None:
        self._rows.append(to_vector(step))
        self.count += 1
        if len(self._rows) > FOLD:
            self._fold(self._rows[:-1])
            del self._rows[:-1]

    def _fold(self, steps: list[list[float]]) -> None:
        rows = np.array(steps)
        there = ~np.isnan(rows)
        self._sum += np.where(there, rows, 0.0).sum(axis=0)
        self._have += there.sum(axis=0)
        self._high = np.maximum(self._high, rows[:, _HIGHEST].max(axis=0))

    def take(self) -> Floats:
        """The window's vector (order ``VECTOR``); the next window starts empty. There must have been a
        step."""
        assert self.count, "take() of a window without a step"
        last = np.array(self._rows[-1])
        if self.count > 1:
            self._fold(self._rows)
            mean = np.divide(self._sum, self._have, out=np.full(len(VECTOR), math.nan), where=self._have > 0)
            mean[_LATEST] = last[_LATEST]
            mean[_HIGHEST] = self._high
            last = mean
            self._sum[:] = self._have[:] = 0.0
            self._high[:] = 0.0
        self._rows.clear()
        self.count = 0
        return last


class Spread(msgspec.Struct, frozen=True):
    """One quantity over the ranks."""

    mean: float
    min: float
    max: float
    min_rank: int
    max_rank: int


class Aggregate(msgspec.Struct, frozen=True):
    """All ranks' view of one step or window."""

    step: int
    ranks: int
    step_time_s: Spread
    phases: dict[str, Spread]
    """Seconds; the means sum to ``step_time_s.mean``. A rank without a phase counts as 0."""
    stalls_s: Spread
    comm_bytes: dict[str, float]
    """axis -> bytes of all ranks."""
    tokens: float
    """Real tokens of all data ranks, each row counted once."""
    tokens_padded: float
    attn_pairs: Spread
    memory_peak: Spread
    rss: Spread


def aggregate(ranks: Floats, replicas: int = 1) -> Aggregate:
    """``ranks[R, V]``: a row of ``VECTOR`` each; ``replicas``: how many ranks read the same rows of data.

    Raises ValueError for rows of another length: those of another version.
    """
    if ranks.shape[1] != len(VECTOR):
        raise ValueError(f"a step vector has {len(VECTOR)} values, not {ranks.shape[1]}")
    low, high, mean = ranks.min(axis=0), ranks.max(axis=0), ranks.mean(axis=0)
    low_rank, high_rank = ranks.argmin(axis=0), ranks.argmax(axis=0)

    def spread(name: str) -> Spread:
        i = PLACE[name]
        return Spread(float(mean[i]), float(low[i]), float(high[i]), int(low_rank[i]), int(high_rank[i]))

    count = len(ranks)
    return Aggregate(
        step=int(high[PLACE["step"]]),
        ranks=count,
        step_time_s=spread("step_time_s"),
        phases={name: spread(name) for name in TIMED if high[PLACE[name]] > 0 or name == "other"},
        stalls_s=spread("stalls_s"),
        comm_bytes={
            axis: float(mean[PLACE[BYTES + axis]]) * count
            for axis in COMM_AXES
            if high[PLACE[BYTES + axis]] > 0 or high[PLACE[COMM + axis]] > 0
        },
        tokens=float(mean[PLACE["tokens"]]) * count / replicas,
        tokens_padded=float(mean[PLACE["tokens_padded"]]) * count / replicas,
        attn_pairs=spread("attn_pairs"),
        memory_peak=spread("peak"),
        rss=spread("rss"),
    )
