"""Every data-, tensor- and sequence-parallel layout trains as one process does."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from support.parity import check
from trainsys.config.model import ModelConfig
from trainsys.config.run import (
    DataConfig,
    OptimConfig,
    ParallelConfig,
    RecomputeConfig,
    RunConfig,
    TrainConfig,
)

# Small, but with every trait that sharding could get wrong: grouped heads, qk-norm, odd vocabulary per rank.
MODEL: dict[str, Any] = {
    "n_layers": 2, "d_model": 32, "n_heads": 4, "n_kv_heads": 2, "d_ff": 64, "vocab": 72, "max_seq_len": 64,
    "qk_norm": True, "init_std": 0.1,
}  # fmt: skip


def config(
    parallel: dict[str, Any],
    *,
    model: dict[str, Any] | None = None,
    recompute: str | dict[str, Any] = "none",
    **train: Any,
) -> RunConfig:
    defaults = {
        "seq_len": 16,
        "global_batch": 8,
        "micro_batch": 1,
        "dtype": "fp32",
        "device": "cpu",
        "steps": 10,
    }
    return RunConfig(
        model=ModelConfig(**{**MODEL, **(model or {})}),
        parallel=ParallelConfig(**{"dp_shard": 1, **parallel}),
        data=DataConfig(source="synthetic", prefetch=0),
        optim=OptimConfig(lr=2e-3, warmup_steps=2, z_loss=1e-3),
        recompute=RecomputeConfig.model_validate(
            {"policy": recompute} if isinstance(recompute, str) else recompute
        ),
        train=TrainConfig(**{**defaults, **train}),
    )


@dataclass(frozen=True)
class Case:
    name: str
    world: int
    parallel: dict[str, Any]
    axes: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)


NO_SP = {"sequence_parallel": False}
LAYOUTS = [
    Case("single", 1, {}, ()),
    Case("ddp2", 2, {"dp_replicate": 2}, ("dp_replicate",)),
    Case("fsdp2", 2, {"dp_shard": 2}, ("fsdp",)),
    Case("tp2", 2, {"tp": 2, **NO_SP}, ("tp",)),
    Case("tp2_sp", 2, {"tp": 2}, ("tp",)),
    Case("ddp4", 4, {"dp_replicate": 4}, ("dp_replicate",)),
    Case("fsdp4", 4, {"dp_shard": 4}, ("fsdp",)),
    Case("hsdp2x2", 4, {"dp_replicate": 2, "dp_shard": 2}, ("dp_replicate", "fsdp")),
    Case("ddp2_tp2", 4, {"dp_replicate": 2, "tp": 2, **NO_SP}, ("dp_replicate", "tp")),
    Case("ddp2_tp2_sp", 4, {"dp_replicate": 2, "tp": 2}, ("dp_replicate", "tp")),
    Case("fsdp2_tp2", 4, {"dp_shard": 2, "tp": 2, **NO_SP}, ("fsdp", "tp")),
    Case("fsdp2_tp2_sp", 4, {"dp_shard": 2, "tp": 2}, ("fsdp", "tp")),
    Case("hsdp2x2_tp2_sp", 8, {"dp_replicate": 2, "dp_shard": 2, "tp": 2}, ("dp_replicate", "fsdp", "tp")),
    Case(
        "hsdp2x2_tp2", 8, {"dp_replicate": 2, "dp_shard": 2, "tp": 2, **NO_SP}, ("dp_replicate", "fsdp", "tp")
    ),
]
BASE = {c.name: c for c in LAYOUTS}
EACH = {"fsdp": {"reduce_each_micro_batch": True}}
ASYNC = {"overlap": {"tensor": True}}
ZERO1 = {"shard": {"optim": "over_replicas"}}
ZERO2 = {"shard": {"optim": "over_replicas", "grads": "over_replicas"}}
VARIANTS = [
    Case(f"{name}-{label}", BASE[name].world, {**BASE[name].parallel, **parallel}, BASE[name].axes, options)
    for label, parallel, options, names in (
        ("micro4", {}, {"micro_batch": 4, "global_batch": 8}, ("single", "fsdp2_tp2_sp")),
        ("accumulate1", {}, {"micro_batch": 2, "global_batch": 8}, ("ddp4", "fsdp4")),
        ("zero2", {"fsdp": {"reshard_after_forward": False}}, {}, ("fsdp2", "hsdp2x2")),
        ("gathered_logits", {"loss_parallel": False}, {}, ("tp2", "tp2_sp")),
        ("reduce_each", EACH, {"micro_batch": 1, "global_batch": 8},
         ("fsdp2", "fsdp4", "hsdp2x2", "fsdp2_tp2_sp", "hsdp2x2_tp2_sp")),
        ("reduce_each_kept", {"fsdp": {**EACH["fsdp"], "reshard_after_forward": False}}, {"micro_batch": 1},
         ("fsdp2", "hsdp2x2")),
        ("reduce_each_waits", {**EACH, "overlap": {"gradients": False}}, {}, ("hsdp2x2",)),
        ("reduce_each_zero1", {**EACH, **ZERO1}, {}, ("hsdp2x2",)),
        ("reduce_each_tied_chunked", EACH, {"loss_chunk": 5, "model": {"tied_embeddings": True}}, ("hsdp2x2",)),
        ("reduce_each_full", EACH, {"recompute": "full"}, ("fsdp2_tp2",)),
        ("zero1", ZERO1, {}, ("ddp2", "ddp4", "hsdp2x2", "ddp2_tp2_sp", "hsdp2x2_tp2_sp")),
        ("zero1_small_buckets", {**ZERO1, "bucket_mb": 0.01}, {}, ("ddp2",)),
        ("zero1_odd", ZERO1, {"model": {"d_model": 36, "head_dim": 10, "n_heads": 6, "d_ff": 60}}, ("ddp4",)),
        ("zero1_tied", ZERO1, {"model": {"tied_embeddings": True}}, ("hsdp2x2",)),
        ("zero2_replicas", ZERO2, {}, ("ddp2", "hsdp2x2", "hsdp2x2_tp2_sp")),
        ("zero2_accumulate1", ZERO2, {"micro_batch": 2, "global_batch": 8}, ("ddp4",)),
        ("stream_layers", {}, {"recompute": {"stream_ffn": 5, "stream_attention": 6}},
         ("single", "ddp2", "fsdp2", "fsdp2_tp2", "fsdp2_tp2_sp", "hsdp2x2")),
        ("stream_layers_full", {}, {"recompute": {"stream_ffn": 5, "stream_attention": 6, "policy": "full"}},
         ("fsdp2", "tp2_sp")),
        ("stream_layers_window", {}, {"recompute": {"stream_attention": 6}, "model": {"sliding_window": 5}},
         ("fsdp2_tp2_sp",)),
        ("async_tp", ASYNC, {}, ("tp2_sp", "fsdp2_tp2_sp", "ddp2_tp2_sp", "hsdp2x2_tp2_sp")),
        ("async_tp_full", ASYNC, {"recompute": "full"}, ("fsdp2_tp2_sp",)),
        ("async_tp_selective", ASYNC, {"recompute": "selective"}, ("tp2_sp",)),
        ("async_tp_selective++", ASYNC, {"recompute": "selective++"}, ("tp2_sp",)),
        ("async_tp_bias_gelu", ASYNC, {"model": {"qkv_bias": True, "ffn_kind": "gelu", "parallel_block": True}},
         ("tp2_sp",)),
        ("async_tp_loss_chunk", ASYNC, {"loss_chunk": 5, "micro_batch": 2, "model": {"tied_embeddings": True}},
         ("tp2_sp",)),
        ("waits", {"overlap": {"gradients": False}}, {}, ("ddp2", "hsdp2x2")),
        ("zero2_waits", {**ZERO2, "overlap": {"gradients": False}}, {}, ("ddp2",)),
        ("small_buckets", {"bucket_mb": 0.01}, {}, ("ddp2",)),
        ("tied", {}, {"model": {"tied_embeddings": True}}, ("tp2_sp", "fsdp2", "hsdp2x2_tp2_sp")),
        ("parallel_block", {}, {"model": {"parallel_block": True}}, ("tp2_sp", "fsdp2_tp2_sp")),
        ("bias_gelu_layernorm", {}, {"model": {"qkv_bias": True, "ffn_kind": "gelu", "norm": "layernorm"}},
         ("tp2_sp", "fsdp2_tp2")),
        ("odd_width", {}, {"model": {"d_model": 36, "head_dim": 10, "n_heads": 6, "d_ff": 60}}, ("fsdp4",)),
        ("window", {}, {"model": {"sliding_window": 5}}, ("fsdp2_tp2_sp",)),
        ("loss_chunk", {}, {"loss_chunk": 5}, ("single", "fsdp2", "tp2_sp", "fsdp2_tp2_sp")),
        ("loss_chunk_tied", {}, {"loss_chunk": 5, "model": {"tied_embeddings": True}}, ("fsdp2_tp2_sp",)),
        ("stream", {}, {"recompute": {"stream_ffn": 5}}, ("single", "fsdp2_tp2_sp")),
        ("stream_full", {}, {"recompute": {"stream_ffn": 5, "policy": "full"}}, ("fsdp2",)),
        *((policy, {}, {"recompute": policy}, ("single", "ddp2", "fsdp2", "tp2_sp", "fsdp2_tp2_sp", "hsdp2x2"))
          for policy in ("selective", "selective++", "full", "every_n")),
    )
    for name in names
]  # fmt: skip
VARIANTS += [
    Case("tp4_sp-async_tp", 4, {"tp": 4, **ASYNC}, ("tp",), {"model": {"n_kv_heads": 4}}),
    Case("cp2_tp2_sp-async_tp", 4, {"cp": 2, "tp": 2, **ASYNC}, ("cp", "tp")),
]


@pytest.mark.parametrize("case", [*LAYOUTS, *VARIANTS], ids=lambda c: c.name)
def test_same_answer_as_one_process(case: Case) -> None:
    check(config(case.parallel, **case.options), case.world, axes=case.axes)


@pytest.mark.parametrize("name", ["ddp2", "fsdp2", "tp2_sp", "fsdp2_tp2_sp", "hsdp2x2"])
def test_bf16_is_off_by_no_more_than_one_bf16_process(name: str) -> None:
    case = BASE[name]
    cfg = config(case.parallel, dtype="bf16")
    check(cfg, case.world, axes=case.axes, steps=2)


@pytest.mark.parametrize("name", ["fsdp2", "hsdp2x2"])
def test_bf16_gradients_reduced_each_micro_batch(name: str) -> None:
    """They are added up in fp32 as whole ones are."""
    case = BASE[name]
    cfg = config({**case.parallel, **EACH}, dtype="bf16", micro_batch=1, global_batch=8)
    check(cfg, case.world, axes=case.axes, steps=2)


@pytest.mark.timeout(400)
def test_compiled_blocks_give_the_same_answer() -> None:
    case = BASE["tp2_sp"]
    check(config(case.parallel, compile=True), 2, axes=case.axes, steps=2, timeout_s=300)
