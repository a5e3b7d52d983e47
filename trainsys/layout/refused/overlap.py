"""Tensor-parallel products in parts around a ring, and what they do not go with."""

from __future__ import annotations

from trainsys.layout.refused.case import Case, Refusal
from trainsys.schedules.build import splits_backward


def _on(c: Case) -> bool:
    return c.parallel.overlap.tensor and c.layout.tp > 1


ON: dict[str, object] = {"parallel.tp": 2, "parallel.overlap.tensor": True}

TABLE = (
    Refusal(
        "overlap of tensor parallelism without sequence parallelism",
        lambda c: _on(c) and not c.parallel.sequence_parallel,
        lambda c: (
            "parallel.overlap.tensor with sequence_parallel=false: what travels are parts of the sequence, and every "
            "rank has all of it; set parallel.sequence_parallel=true"
        ),
        {**ON, "parallel.sequence_parallel": False},
    ),
    Refusal(
        "overlap of tensor parallelism, compiled",
        lambda c: _on(c) and c.train.compile,
        lambda c: (
            "parallel.overlap.tensor with train.compile: a compiled block would take the placeholder of what is "
            "still on its way for data; switch one of them off"
        ),
        {**ON, "train.compile": True},
    ),
    Refusal(
        "overlap of tensor parallelism in a schedule that splits backward",
        lambda c: _on(c) and c.layout.pp > 1 and splits_backward(c.parallel.pipeline.schedule),
        lambda c: (
            f"parallel.overlap.tensor with parallel.pipeline.schedule={c.parallel.pipeline.schedule}: its weight "
            "gradients cover transfers, so they cannot be put off; use 1f1b or interleaved_1f1b, or switch it off"
        ),
        {**ON, "parallel.pp": 2, "parallel.pipeline.schedule": "zero_bubble"},
    ),
    Refusal(
        "overlap of tensor parallelism with a streamed block",
        lambda c: _on(c) and bool(c.recompute.stream_ffn or c.recompute.stream_attention),
        lambda c: (
            "parallel.overlap.tensor with recompute.stream_ffn or stream_attention: both cut the sequence, and "
            "streaming needs all of it to be here; switch one of them off"
        ),
        {**ON, "recompute.stream_ffn": 8},
    ),
)
