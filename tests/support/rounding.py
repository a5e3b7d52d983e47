"""How far apart two correct runs may be: what rounding alone does to this model, measured on this machine.

The one-process run is made twice more: in float64, which is what every layout is compared with, and in its own
dtype, whole and one row at a time. How far those two are from float64 is the noise: of the loss, of the gradient
norm, and of each gradient and weight in the 2-norm, relative to its own size. A parallel run rounds as they do, in
another order, so its bound is ``K`` times the noise. Nothing here knows the instruction set or the kernels: a
machine that rounds otherwise measures other noise. A gradient that cancels (a key's norm, say) has noise of its own.

``K``. A layout adds at most one rounding an element for every reduction: 2 a layer forward and 2 backward over tp, one
a block over cp, one over each of fsdp, dp_replicate and pp, and the sums over micro-batches; below 60 for the largest
case here, against some 20 products a layer that one process rounds as well. Independent roundings add up as the square
root of their number, so a factor of 2 covers them. The rest is for small tensors: the noise is one draw of two, and
norms of two draws of a tensor of 8 elements differ by more than 4 in 1 of 1,000. Weights may also differ by
what AdamW makes of gradients that are all rounding (``_undecided``), and the next step's gradients follow such a weight:
another 2 (the nearest case here, a mixture over ring, tp and ep, is off by 7 times the noise). 2 x 4 x 2 = 16.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch

from trainsys.parallel.parallelize import DTYPES

K = 16.0
FLOOR = 4 * 2.0**-24
"""Noise below this is luck: a few roundings of fp32, which is also what losses and norms are reported in."""
CEILING = 1e-3
"""Noise above this in fp32 is no rounding: a choice fell the other way (an expert's router), and a bound from it
would hide faults."""


@contextmanager
def in_float64() -> Iterator[None]:
    """Engines that are built inside hold weights, activations and moments in float64, from the same fp32 draws."""
    kept, default = dict(DTYPES), torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    DTYPES.update(dict.fromkeys(DTYPES, torch.float64))
    try:
        yield
    finally:
        torch.set_default_dtype(default)
        DTYPES.update(kept)


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """|a - b| / |b| in the 2-norm; 0 where both are zero."""
    scale = float(np.linalg.norm(b.astype(np.float64)))
    gap = float(np.linalg.norm(a.astype(np.float64) - b.astype(np.float64)))
    return gap / scale if scale else (0.0 if gap == 0.0 else float("inf"))


@dataclass(frozen=True)
class Answer:
    """What a run computed: by step loss, gradient norm and (of the first steps at least) every gradient, and the
    weights after the last."""

    losses: list[float]
    norms: list[float]
    gradients: list[dict[str, np.ndarray]]
    parameters: dict[str, np.ndarray]


@dataclass
class Gaps:
    """Relative distances of one answer from another, the largest over the steps."""

    loss: float = 0.0
    norm: float = 0.0
    gradients: dict[str, float] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)

    @classmethod
    def between(cls, got: Answer, want: Answer, slack: Mapping[str, np.ndarray] | None = None) -> Gaps:
        """``slack``: by how much each element of a weight may be off and count as equal (None: nothing)."""
        assert len(got.losses) == len(want.losses)
        gaps = cls(
            max(abs(a / b - 1) for a, b in zip(got.losses, want.losses, strict=True)),
            max(abs(a / b - 1) for a, b in zip(got.norms, want.norms, strict=True)),
        )
        for ours, theirs in zip(got.gradients, want.gradients, strict=False):
            assert ours.keys() == theirs.keys()
            for name, gradient in ours.items():
                gaps.gradients[name] = max(gaps.gradients.get(name, 0.0), distance(gradient, theirs[name]))
        assert got.parameters.keys() == want.parameters.keys()
        for name, weight in got.parameters.items():
            exact = want.parameters[name].astype(np.float64)
            off = np.abs(weight - exact) - (0.0 if slack is None else slack[name])
            gaps.weights[name] = float(np.linalg.norm(np.maximum(off, 0.0)) / np.linalg.norm(exact))
        return gaps

    def items(self) -> Iterator[tuple[str, float]]:
        yield "the loss", self.loss
        yield "the gradient norm", self.norm
        yield from ((f"the gradient of {name}", gap) for name, gap in self.gradients.items())
        yield from ((f"the weight {name}", gap) for name, gap in self.weights.items())


@dataclass(frozen=True)
class Reference:
    """The answer in float64, and how far from it rounding in the run's own dtype may lead, for each part of it."""

    exact: Answer
    bounds: dict[str, float]
    slack: dict[str, np.ndarray]
    """What each element of a weight may be off besides, see ``_undecided``."""

    @classmethod
    def of(cls, exact: Answer, rounded: Sequence[Answer], lr: float, ceiling: float = CEILING) -> Reference:
        """``rounded``: one process in the run's own dtype; ``lr``: the highest learning rate."""

        def noise(slack: Mapping[str, np.ndarray] | None = None) -> dict[str, float]:
            gaps = [dict(Gaps.between(answer, exact, slack).items()) for answer in rounded]
            return {what: max(FLOOR, *(gap[what] for gap in gaps)) for what in gaps[0]}

        first = noise()
        slack = {
            name: lr * _undecided([g[name] for g in exact.gradients], K * first[f"the gradient of {name}"])
            for name in exact.parameters
        }
        known = noise(slack)
        worst = max(known, key=lambda what: known[what])
        assert known[worst] < ceiling, f"{worst} is off by {known[worst]:.1e} in one process: this measures nothing"
        return cls(exact, {what: K * gap for what, gap in known.items()}, slack)

    def check_losses(self, losses: Sequence[float], norms: Sequence[float] = (), first: int = 0) -> None:
        """As ``check`` for a run that goes on at step ``first``, of which no more is known."""
        for what, got, exact in (("the loss", losses, self.exact.losses), ("the gradient norm", norms, self.exact.norms)):
            for step, (ours, theirs) in enumerate(zip(got, exact[first:], strict=False), first):
                gap, bound = abs(ours / theirs - 1), self.bounds[what]
                assert gap < bound, f"{what} of step {step} is off by {gap:.1e}, rounding explains {bound:.1e}"

    def check(self, got: Answer) -> Gaps:
        """AssertionError where ``got`` is further from the exact answer than rounding explains; how far it is."""
        gaps = Gaps.between(got, self.exact, self.slack)
        far = {what: gap for what, gap in gaps.items() if not gap < self.bounds[what]}
        assert not far, "; ".join(
            f"{what} is off by {gap:.1e}, rounding explains {self.bounds[what]:.1e}" for what, gap in far.items()
        )
        return gaps


def _undecided(gradients: Sequence[np.ndarray], bound: float) -> np.ndarray:
    """How far, in learning rates, AdamW may move each element by what is rounding in its gradients.

    It divides each element by its own root mean square so far, so an element no larger than its error goes a learning
    rate one way or the other, by chance: too rare for two runs to show, and met by one in dozens. The error of each
    element is taken as the tensor's bound, spread evenly; an element that is 0 in float64 is 0 in every run.
    """
    moved = np.zeros(gradients[0].shape)
    squares = np.zeros_like(moved)
    for step, gradient in enumerate(gradients, 1):
        squares += gradient.astype(np.float64) ** 2
        error = bound * np.linalg.norm(gradient) / np.sqrt(gradient.size)
        with np.errstate(divide="ignore"):
            moved += np.where(squares > 0, np.minimum(2.0, error / np.sqrt(squares / step)), 0.0)
    return moved
