"""From one rank's steps to a window's mean, and from all ranks' vectors to what rank 0 shows.

A rank adds each step to a ``Window``; every few steps the engine gathers ``window.take()`` (a few dozen
float64) to rank 0, which makes ``aggregate([Step.from_vector(v) for v in gathered])`` of it. Nothing grows
with the run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec

from trainsys.telemetry.events import VECTOR, Step

_HIGHEST = tuple(VECTOR.index(name) for name in ("reserved", "peak"))
_LATEST = tuple(VECTOR.index(name) for name in ("step", "lr", "allocated", "rss"))


class Window:
    """The mean step since the last ``take``, in constant memory.

    Times, bytes, tokens, loss and gradient norm are means a step (of the values that are there); step number,
    learning rate and current memory are the latest; reserved and peak memory the highest.
    """

    def __init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        self.count = 0
        self._sum = [0.0] * len(VECTOR)
        self._have = [0] * len(VECTOR)
        self._last = [math.nan] * len(VECTOR)
        self._high = [0.0] * len(_HIGHEST)

    def add(self, step: Step) -> None:
        vector = step.vector()
        for i, value in enumerate(vector):
            if value == value:  # not nan: the value is there
                self._sum[i] += value
                self._have[i] += 1
        self._last = vector
        self._high = [max(old, vector[i]) for old, i in zip(self._high, _HIGHEST, strict=True)]
        self.count += 1

    def take(self) -> list[float]:
        """The window's vector (order ``VECTOR``); the next window starts empty. There must have been a
        step."""
        assert self.count, "take() of a window without a step"
        mean = [s / n if n else math.nan for s, n in zip(self._sum, self._have, strict=True)]
        for i in _LATEST:
            mean[i] = self._last[i]
        for high, i in zip(self._high, _HIGHEST, strict=True):
            mean[i] = high
        self._clear()
        return mean


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


def aggregate(steps: Sequence[Step], replicas: int = 1) -> Aggregate:
    """``steps[i]`` is rank i's; ``replicas`` is how many ranks read the same rows (world / data ranks)."""
    if not steps:
        raise ValueError("no steps to aggregate")
    names: dict[str, None] = {}
    axes: dict[str, None] = {}
    for s in steps:
        names.update(dict.fromkeys(s.phases))
        axes.update(dict.fromkeys(s.comm))
    memory = [s.memory for s in steps]
    return Aggregate(
        step=max(s.step for s in steps),
        ranks=len(steps),
        step_time_s=_spread([s.step_time_s for s in steps]),
        phases={name: _spread([s.phases.get(name, 0.0) for s in steps]) for name in names},
        stalls_s=_spread([sum(s.stalls.values()) for s in steps]),
        comm_bytes={
            axis: float(sum(c.bytes for s in steps for c in s.comm.get(axis, {}).values())) for axis in axes
        },
        tokens=sum(s.tokens for s in steps) / replicas,
        tokens_padded=sum(s.tokens_padded for s in steps) / replicas,
        attn_pairs=_spread([float(s.attn_pairs) for s in steps]),
        memory_peak=_spread([float(m.peak) if m else 0.0 for m in memory]),
        rss=_spread([float(m.rss) if m else 0.0 for m in memory]),
    )


def _spread(values: list[float]) -> Spread:
    low, high = min(values), max(values)
    return Spread(math.fsum(values) / len(values), low, high, values.index(low), values.index(high))
