"""The loss over a run as a page draws it: the mean of each bin of steps, and the range within it."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from trainsys.profiler.run_steps import RunSteps

BINS = 600


@dataclass
class LossCurve:
    """By bin: its first step, and mean, lowest and highest of its finite losses. ``per_bin``: steps in one.

    ``not_finite``: steps whose loss was nan or infinite, the first ``BINS`` of them.
    """

    rank: int
    steps: list[int]
    mean: list[float]
    low: list[float]
    high: list[float]
    per_bin: int
    not_finite: list[int] = field(default_factory=list)


def loss_curve(steps: RunSteps, rank: int) -> LossCurve | None:
    """The curve of the losses that one rank recorded; None where it recorded none."""
    if rank not in steps.ranks:
        return None
    # A step without a loss reads as 0, which no cross-entropy is.
    losses = steps.column(rank, "loss")
    told = np.flatnonzero(losses != 0)
    finite = told[np.isfinite(losses[told])]
    if not finite.size:
        return None
    size = -(-finite.size // BINS)
    begins = np.arange(0, finite.size, size)
    values = losses[finite]
    counts = np.diff(np.append(begins, finite.size))

    def rounded(of: np.ufunc) -> list[float]:
        return [float(f"{v:.6g}") for v in of.reduceat(values, begins)]

    means = [float(f"{v:.6g}") for v in np.add.reduceat(values, begins) / counts]
    wrong = told[~np.isfinite(losses[told])]
    return LossCurve(
        rank, steps.steps[finite[begins]].tolist(), means, rounded(np.minimum), rounded(np.maximum), size,
        steps.steps[wrong][:BINS].tolist(),
    )  # fmt: skip
