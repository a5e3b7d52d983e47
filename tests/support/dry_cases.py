"""Small runs over every axis, on which dry runs, real ranks and the planner must agree."""

from __future__ import annotations

from typing import Any

from trainsys.config.model import ModelConfig, MoEConfig
from trainsys.config.run import (
    ContextConfig,
    DataConfig,
    FsdpConfig,
    OptimConfig,
    ParallelConfig,
    PipelineConfig,
    RecomputeConfig,
    RunConfig,
    TrainConfig,
)

MODEL: dict[str, Any] = {
    "n_layers": 2, "d_model": 32, "n_heads": 4, "n_kv_heads": 2, "d_ff": 96, "vocab": 80, "max_seq_len": 64,
}  # fmt: skip
MOE = {"n_experts": 4, "top_k": 2, "d_ff": 48}


def run(
    *,
    model: dict[str, Any] | None = None,
    train: dict[str, Any] | None = None,
    data: dict[str, Any] | None = None,
    recompute: str = "none",
    flavour: str = "ring",
    context: dict[str, Any] | None = None,
    schedule: str = "1f1b",
    pipeline: dict[str, Any] | None = None,
    moe: bool = False,
    reshard: bool = True,
    each: bool = False,
    **parallel: Any,
) -> RunConfig:
    """A run of a tiny model; other keywords are fields of ``parallel``."""
    extra: dict[str, Any] = {"moe": MoEConfig(**MOE)} if moe else {}  # type: ignore[arg-type]
    return RunConfig(
        model=ModelConfig(**{**MODEL, **extra, **(model or {})}),
        parallel=ParallelConfig(
            **{"dp_shard": 1, **parallel},
            fsdp=FsdpConfig(reshard_after_forward=reshard, reduce_each_micro_batch=each),
            context=ContextConfig(flavour=flavour, **(context or {})),  # type: ignore[arg-type]
            pipeline=PipelineConfig(schedule=schedule, **(pipeline or {})),  # type: ignore[arg-type]
        ),
        data=DataConfig(source="synthetic", prefetch=0, **(data or {})),
        optim=OptimConfig(lr=1e-3),
        recompute=RecomputeConfig(policy=recompute),  # type: ignore[arg-type]
        train=TrainConfig(
            **{
                "seq_len": 32,
                "global_batch": 4,
                "dtype": "fp32",
                "device": "cpu",
                "steps": 2,
                **(train or {}),
            }
        ),
    )


def world(cfg: RunConfig) -> int:
    p = cfg.parallel
    return p.pp * p.dp_replicate * p.dp_shard * p.cp * p.tp


FOUR = {"n_layers": 4}
DOCS = {"document_mask": True, "document_length": 9}

CASES: dict[str, RunConfig] = {
    "one": run(train={"micro_batch": 2}),
    "one-bf16": run(train={"dtype": "bf16"}),
    "one-tied-gelu": run(
        model={"tied_embeddings": True, "ffn_kind": "gelu", "norm": "layernorm", "parallel_block": True}
    ),
    "one-norms-bias": run(model={"qk_norm": True, "qkv_bias": True, "head_dim": 16}),
    "one-docs": run(data=DOCS, train={"micro_batch": 2}, recompute="selective++"),
    **{f"cp-{f}-docs": run(cp=2, flavour=f, data=DOCS) for f in ("ring", "ulysses")},
    "chunked-loss": run(train={"loss_chunk": 8, "micro_batch": 4}),
    **{f"one-{p}": run(recompute=p, train={"micro_batch": 4}) for p in ("selective", "selective++", "full", "every_n")},
    "fsdp-bf16": run(dp_shard=2, train={"dtype": "bf16"}),
    "fsdp-kept": run(dp_shard=2, reshard=False),
    "fsdp-each": run(dp_shard=2, each=True, train={"dtype": "bf16", "global_batch": 6}),
    "hsdp-each": run(dp_replicate=2, dp_shard=2, each=True, reshard=False, train={"global_batch": 12}),
    "fsdp3-ragged": run(dp_shard=3, recompute="full", train={"global_batch": 3}),
    "ddp": run(dp_replicate=2),
    "hsdp": run(dp_replicate=2, dp_shard=2),
    "tp": run(tp=2, sequence_parallel=False, loss_parallel=False),
    "sp": run(tp=2, model={"qk_norm": True}),
    "sp-full-fsdp": run(tp=2, dp_shard=2, recompute="full"),
    "sp-chunked": run(tp=2, train={"loss_chunk": 8, "micro_batch": 4}),
    **{f"cp-{f}": run(cp=2, flavour=f) for f in ("ring", "all_gather", "pass_q", "ulysses", "token_ring", "dist_flash")},
    "cp4-two_d": run(cp=4, flavour="two_d", context={"head_degree": 2}),
    "cp4-inner": run(cp=4, flavour="two_d", context={"head_degree": 1, "inner_ring": 2}),
    "cp4-window": run(cp=4, context={"balance": "contiguous"}, model={"sliding_window": 8}),
    "cp-tp-full": run(cp=2, tp=2, recompute="full"),
    "cp-selective": run(cp=2, flavour="all_gather", recompute="selective"),
    **{f"pp-{s}": run(pp=2, schedule=s) for s in ("gpipe", "1f1b", "zero_bubble")},
    **{
        f"pp-{s}-fsdp": run(pp=2, dp_shard=2, schedule=s, model=FOUR, train={"global_batch": 8})
        for s in ("interleaved_1f1b", "zbv", "dualpipev", "blockwise")
    },
    "pp-tied-sp": run(pp=2, tp=2, model={"tied_embeddings": True}),
    "pp-cp": run(pp=2, cp=2),
    "moe": run(moe=True),
    "moe-tp": run(moe=True, tp=2),
}  # fmt: skip
