"""The planner's memory of the native engine against dry runs of its real step: an 8-layer Llama-3-8B under many layouts.

    python profiling/dryrun_memory.py [NAME …] # writes profiling/results/dryrun_memory.json, minutes of one core;
                                               # with names, of these cases alone, and keeps the others

The dry run holds what CUDA would (``train.device=cuda``);
tests/planner/test_native_memory.py holds the planner to the file.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from trainsys.config.loader import load_run
from trainsys.dryrun.ranks import distinct_ranks
from trainsys.dryrun.step import dry_step
from trainsys.layout import Layout

RESULT = Path(__file__).parent / "results" / "dryrun_memory.json"
BASE = (
    "data.source=synthetic", "data.path=null", "data.document_mask=false", "parallel.dp_shard=1", "train.seq_len=4096",
    "train.global_batch=1", "train.micro_batch=1", "train.dtype=bf16", "train.device=cuda", "train.compile=false",
    "model.n_layers=8", "recompute.policy=none", "parallel.fsdp.reduce_each_micro_batch=false",
)  # fmt: skip
_MOE = (
    "model.n_layers=4", "model.d_model=2048", "model.n_kv_heads=4", "model.head_dim=128", "model.vocab=32000",
    "model.qk_norm=true",
    "model.moe={n_experts: 128, top_k: 8, d_ff: 768}",
)  # fmt: skip
"""Four layers of Qwen3-30B-A3B, with a smaller vocabulary."""
_WIDE_MOE = ("model.n_layers=4", "model.moe={n_experts: 8, top_k: 2, d_ff: 14336}")
"""Four layers of Mixtral 8x7B."""
_OPTIM, _GRADS = "parallel.shard.optim=over_replicas", "parallel.shard.grads=over_replicas"
_EACH = "parallel.fsdp.reduce_each_micro_batch=true"
CASES: dict[str, tuple[int, tuple[str, ...]]] = {
    "one": (1, ()),
    "one-full": (1, ("recompute.policy=full",)),
    "one-kept-attention": (1, ("recompute.policy=selective++",)),
    "one-chunked-loss": (1, ("train.loss_chunk=512",)),
    "accumulation": (1, ("train.global_batch=2",)),
    "micro-batch-4": (1, ("train.global_batch=4", "train.micro_batch=4")),
    "fsdp8": (8, ("parallel.dp_shard=8", "train.global_batch=8")),
    "fsdp8-accumulation": (8, ("parallel.dp_shard=8", "train.global_batch=16")),
    "fsdp8-each": (8, ("parallel.dp_shard=8", "train.global_batch=24", _EACH)),
    "fsdp64-each-full": (64, ("parallel.dp_shard=64", "train.global_batch=128", "recompute.policy=full", _EACH)),
    "fsdp8-each-kept": (
        8, ("parallel.dp_shard=8", "train.global_batch=16", "parallel.fsdp.reshard_after_forward=false", _EACH),
    ),
    "hsdp-each": (16, ("parallel.dp_replicate=2", "parallel.dp_shard=8", "train.global_batch=32", _EACH)),
    "tp8-fsdp8-each": (64, ("parallel.tp=8", "parallel.dp_shard=8", "train.global_batch=16", _EACH)),
    "fsdp8-full": (8, ("parallel.dp_shard=8", "train.global_batch=8", "recompute.policy=full")),
    "fsdp8-kept": (8, ("parallel.dp_shard=8", "train.global_batch=8", "parallel.fsdp.reshard_after_forward=false")),
    "fsdp64-full-chunked-loss": (
        64, ("parallel.dp_shard=64", "train.global_batch=64", "recompute.policy=full", "train.loss_chunk=512"),
    ),
    "tp8": (8, ("parallel.tp=8",)),
    "tp8-fsdp8": (64, ("parallel.tp=8", "parallel.dp_shard=8", "train.global_batch=8")),
    "tp8-fsdp8-full": (64, ("parallel.tp=8", "parallel.dp_shard=8", "train.global_batch=8", "recompute.policy=full")),
    "cp2-fsdp4": (8, ("parallel.cp=2", "parallel.dp_shard=4", "train.global_batch=4")),
    "pp4-fsdp4": (16, ("parallel.pp=4", "parallel.dp_shard=4", "train.global_batch=32")),
    "pp4": (4, ("parallel.pp=4", "train.global_batch=8")),
    "zero1": (8, ("parallel.dp_replicate=8", "train.global_batch=8", _OPTIM)),
    "zero1-accumulation": (8, ("parallel.dp_replicate=8", "train.global_batch=16", _OPTIM)),
    "zero2-accumulation": (8, ("parallel.dp_replicate=8", "train.global_batch=16", _OPTIM, _GRADS)),
    "hsdp-optimizer-split": (16, ("parallel.dp_replicate=2", "parallel.dp_shard=8", "train.global_batch=32", _OPTIM)),
    "hsdp-gradients-split": (
        16, ("parallel.dp_replicate=2", "parallel.dp_shard=8", "train.global_batch=32", _OPTIM, _GRADS),
    ),
    "ddp2": (2, ("parallel.dp_replicate=2", "train.global_batch=2")),
    **{
        f"{name}-{kind}": (world, (*model, *layout))
        for name, model in (("moe", _MOE), ("wide-moe", _WIDE_MOE))
        for kind, (world, layout) in {
            "one": (1, ()),
            "fsdp8": (8, ("parallel.dp_shard=8", "train.global_batch=8")),
            "fsdp8-ep8": (8, ("parallel.dp_shard=8", "parallel.ep=8", "train.global_batch=8")),
            "fsdp16-ep4": (16, ("parallel.dp_shard=16", "parallel.ep=4", "train.global_batch=16")),
            "fsdp16-ep4-accumulation": (16, ("parallel.dp_shard=16", "parallel.ep=4", "train.global_batch=32")),
            "fsdp16-ep4-each": (16, ("parallel.dp_shard=16", "parallel.ep=4", "train.global_batch=32", _EACH)),
            "fsdp8-ep8-each": (8, ("parallel.dp_shard=8", "parallel.ep=8", "train.global_batch=16", _EACH)),
            "fsdp16-ep4-full": (
                16, ("parallel.dp_shard=16", "parallel.ep=4", "train.global_batch=16", "recompute.policy=full"),
            ),
            "tp2-fsdp8-ep4": (
                16, ("parallel.tp=2", "parallel.dp_shard=8", "parallel.ep=4", "train.global_batch=8"),
            ),
            "pp2-fsdp4-ep4": (
                8, ("parallel.pp=2", "parallel.dp_shard=4", "parallel.ep=4", "train.global_batch=16"),
            ),
            "pp2-fsdp4": (8, ("parallel.pp=2", "parallel.dp_shard=4", "train.global_batch=16")),
        }.items()
    },
}  # fmt: skip


def main() -> None:
    torch.set_num_threads(1)
    asked = sys.argv[1:] or list(CASES)
    known = {row["name"]: row for row in json.loads(RESULT.read_text(encoding="utf-8"))["cases"]}
    for name in asked:
        world, overrides = CASES[name]
        cfg = load_run("train/llama3-8b", [*BASE, *overrides])
        layout = Layout.resolve(cfg.parallel, world)
        steps = [dry_step(cfg, layout, rank, as_cuda=True) for rank in distinct_ranks(cfg, layout)]
        peaks = {step.rank: step.peak_bytes for step in steps}
        known[name] = {"name": name, "world": world, "overrides": [*BASE, *overrides], "peak_bytes": peaks}
        print(name, peaks, flush=True)
    found = {"run": "train/llama3-8b", "cases": [known[name] for name in CASES if name in known]}
    RESULT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
