"""Recomputation, streaming and the chunked loss, and what they do not go with."""

from __future__ import annotations

from trainsys.layout.refused.case import Case, Refusal
from trainsys.layout.refused.model import MOE
from trainsys.schedules.build import splits_backward


def _streams(c: Case) -> list[str]:
    said = {"stream_ffn": c.recompute.stream_ffn, "stream_attention": c.recompute.stream_attention}
    return [f"recompute.{name}={value}" for name, value in said.items() if value]


TABLE = (
    Refusal(
        "streaming a mixture of experts",
        lambda c: bool(c.recompute.stream_ffn) and c.model.moe is not None,
        lambda c: (
            f"recompute.stream_ffn={c.recompute.stream_ffn} with experts (model.moe): capacity and balance are of "
            "whole rows, so pieces of one cannot be routed apart; use recompute.policy=full"
        ),
        {**MOE, "recompute.stream_ffn": 8},
    ),
    Refusal(
        "streaming in a schedule that splits backward",
        lambda c: bool(_streams(c)) and c.layout.pp > 1 and splits_backward(c.parallel.pipeline.schedule),
        lambda c: (
            f"{' and '.join(_streams(c))} with parallel.pipeline.schedule={c.parallel.pipeline.schedule}: a "
            "streamed backward sums weight gradients piece by piece, so none are left to put off; use 1f1b or "
            "interleaved_1f1b, or recompute.policy=full"
        ),
        {"recompute.stream_ffn": 8, "parallel.pp": 2, "parallel.pipeline.schedule": "zbv"},
    ),
    Refusal(
        "streaming attention over context ranks",
        lambda c: bool(c.recompute.stream_attention) and c.layout.cp > 1,
        lambda c: (
            f"recompute.stream_attention={c.recompute.stream_attention} with parallel.cp={c.layout.cp}: every "
            "piece of the queries would send the keys round once more; use a larger cp, or recompute.policy=full"
        ),
        {"recompute.stream_attention": 8, "parallel.cp": 2},
    ),
    Refusal(
        "streaming attention whose core is recomputed by itself",
        lambda c: bool(c.recompute.stream_attention) and c.recompute.policy in ("selective", "selective++"),
        lambda c: (
            f"recompute.stream_attention={c.recompute.stream_attention} with policy={c.recompute.policy}: both "
            "say what attention keeps; use policy none, full or every_n with streaming"
        ),
        {"recompute.stream_attention": 8, "recompute.policy": "selective"},
    ),
    Refusal(
        "streaming attention through a kernel of one's choice",
        lambda c: bool(c.recompute.stream_attention) and c.train.attention != "auto",
        lambda c: (
            f"recompute.stream_attention={c.recompute.stream_attention} with train.attention={c.train.attention}: "
            "pieces of the queries go through the device's own kernel; use train.attention=auto"
        ),
        {"recompute.stream_attention": 8, "train.attention": "flex"},
    ),
    Refusal(
        "flex_attention on the CPU",
        lambda c: c.train.attention == "flex" and c.train.device == "cpu",
        lambda c: (
            "train.attention=flex with train.device=cpu: flex_attention has no backward there; "
            "use train.attention=auto"
        ),
        {"train.attention": "flex", "train.device": "cpu"},
    ),
    Refusal(
        "a chunked loss on whole logits",
        lambda c: bool(c.train.loss_chunk) and c.layout.tp > 1 and not c.parallel.loss_parallel,
        lambda c: (
            f"train.loss_chunk={c.train.loss_chunk} with parallel.loss_parallel=false and tp={c.layout.tp}: a "
            "chunk's logits stay where its part of the head is; set parallel.loss_parallel=true"
        ),
        {"train.loss_chunk": 8, "parallel.tp": 2, "parallel.loss_parallel": False},
    ),
)
