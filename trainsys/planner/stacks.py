"""What the training software decides: fused kernels, gradient dtype, overlap, memory habits.

A user names the stack; for a table of published runs it is inferred from what the row says of its sharding,
attention kernel and flags. ``default`` is a current Megatron-like stack.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from trainsys.config.engines import EngineName
from trainsys.planner.runs_csv import Run


@dataclass(frozen=True)
class Stack:
    """``modern``: overlapped communication and fused layers; ``eager``: stock PyTorch modules;
    ``selective_is_half``: selective recomputation re-runs about half of a layer's matmuls, as op-level policies do,
    not the attention core alone."""

    name: str
    engine: EngineName = "native"  # whose table says what it can run
    grad_bytes: float = 4.0
    fused_norm: bool = True
    compiled: bool = False
    modern: bool = False
    eager: bool = False
    selective_is_half: bool = False
    tp_overlap: bool = False
    gathered_logits: bool = False
    plain_accumulation: bool = False
    fp32_reduce: bool = False
    single_rail: bool = False


STACKS = {
    s.name: s
    for s in (
        Stack("native", eager=True),
        Stack("megatron", "megatron", modern=True, tp_overlap=True),
        Stack("megatron-lm", "megatron", modern=True),
        Stack("megatron-classic", "megatron", grad_bytes=2.0),
        Stack("megatron-deepspeed", "deepspeed", grad_bytes=2.0, plain_accumulation=True),
        Stack(
            "deepspeed-pipeline",
            "deepspeed",
            grad_bytes=2.0,
            plain_accumulation=True,
            gathered_logits=True,
            fp32_reduce=True,
        ),
        Stack("deepspeed", "deepspeed", grad_bytes=2.0, eager=True, single_rail=True),
        Stack("fsdp", grad_bytes=2.0, eager=True, selective_is_half=True),
        Stack("torchtitan", eager=True, selective_is_half=True),
        Stack("internevo", grad_bytes=2.0),
        Stack("jax", grad_bytes=2.0, compiled=True, modern=True, tp_overlap=True),
    )
}


def stack_of(run: Run, recent: bool) -> Stack:
    """Infer the stack of a row; ``recent``: on Hopper or later."""
    flags, kernel = run.text["flags"].lower(), run.text["attention_kernel"].lower()
    words = set(re.findall(r"[a-z0-9_-]+", flags))
    overlap = "asynctp" in re.sub(r"[ _-]", "", flags)
    sharded = bool(run.flag["fsdp"]) or run.n("zero_stage") == 3
    if words & {"jax", "maxtext", "paxml"}:
        return STACKS["jax"]
    if "te" in re.split(r"[^a-z]+", kernel) or "cudnn" in kernel:
        return STACKS["megatron-lm" if "megatron-lm" in words else "megatron"]
    if sharded and "deepspeed" in words:
        return STACKS["deepspeed"]
    if "sdpa" in kernel or "compile" in words:
        compiled = "compile" in words
        return replace(STACKS["torchtitan"], fused_norm=compiled, compiled=compiled, tp_overlap=overlap)
    if sharded:
        return STACKS["fsdp"]
    if "zero1_group" in flags:
        return STACKS["internevo"]
    if re.search("fp8|fp4", run.text["dtype"].lower()) or "dualpipe" in run.text["schedule"].lower():
        return STACKS["megatron"]
    if run.gated and recent:
        # By then such models were trained by Megatron-Core and its like, not by DeepSpeed's pipeline.
        return STACKS["megatron-lm"]
    # Before Transformer Engine no common stack fused RMSNorm, which gated (Llama-like) models use.
    fused = not run.gated or "fused_rmsnorm" in flags or "fused_norm" in flags
    if run.gated:
        return replace(STACKS["deepspeed-pipeline"], fused_norm=fused)
    if run.n("zero_stage") in (1.0, 2.0) or "megatron-deepspeed" in words:
        return STACKS["megatron-deepspeed"]
    return STACKS["megatron-classic"]
