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
norms of two draws of a tensor of 8 elements differ by more than 4 in 1 of 1,000. 2 x 4 = 8.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch

from trainsys.parallel.parallelize import DTYPES

K = 8.0
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
    def between(cls, got: Answer, want: Answer) -> Gaps:
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
        gaps.weights = {name: distance(w, want.parameters[name]) for name, w in got.parameters.items()}
        return gaps

    def items(self) -> Iterator[tuple[str, float]]:
        yield "the loss", self.loss
        yield "the gradient norm", self.norm
        yield from ((f"the gradient of {name}", gap) for name, gap in self.gradients.items())
        yield from ((f"the weight {name}", gap) for name, gap in self.weights.items())


@dataclass(frozen=True)
class Reference:
    """The answer in float64, and by how much rounding in the run's own dtype moves each part of it."""

    exact: Answer
    noise: dict[str, float]

    @classmethod
    def of(cls, exact: Answer, rounded: Sequence[Answer], ceiling: float = CEILING) -> Reference:
        noise: dict[str, float] = {}
        for answer in rounded:
            for what, gap in Gaps.between(answer, exact).items():
                noise[what] = max(noise.get(what, FLOOR), gap)
        worst = max(noise, key=lambda what: noise[what])
        assert noise[worst] < ceiling, f"{worst} is off by {noise[worst]:.1e} in one process: this measures nothing"
        return cls(exact, noise)

    def check_losses(self, losses: Sequence[float], norms: Sequence[float] = (), first: int = 0) -> None:
        """The same for a run that goes on at step ``first``, of which no more is known."""
        for what, got, exact in (("the loss", losses, self.exact.losses), ("the gradient norm", norms, self.exact.norms)):
            for step, (ours, theirs) in enumerate(zip(got, exact[first:], strict=False), first):
                gap, bound = abs(ours / theirs - 1), K * self.noise[what]
                assert gap < bound, f"{what} of step {step} is off by {gap:.1e}, rounding explains {bound:.1e}"

    def check(self, got: Answer, k: float = K) -> Gaps:
        """AssertionError where ``got`` is further from the exact answer than rounding explains; how far it is."""
        gaps = Gaps.between(got, self.exact)
        import os
        if f := os.environ.get("RATIOS"):
            with open(f, "a") as o:
                w = max((g/self.noise[n], n, g, self.noise[n]) for n, g in gaps.items())
                o.write(f"{w[0]:.2f} {w[2]:.1e} {w[3]:.1e} {w[1]} {os.environ.get('PYTEST_CURRENT_TEST')}\n")
        far = {what: gap for what, gap in gaps.items() if not gap < k * self.noise[what]}
        assert not far, "; ".join(
            f"{what} is off by {gap:.1e}, rounding explains {k * self.noise[what]:.1e}" for what, gap in far.items()
        )
        return gaps
