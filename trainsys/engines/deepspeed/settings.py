"""A run's config as DeepSpeed's own: the JSON that it is given, that is printed, and that the run folder keeps.

Which rank does what:

==============================  ===============================================================================
``dp_replicate`` (dp_shard 1)   ZeRO 0, or what ``parallel.shard`` says: 1 (``optim``), 2 (``grads``) over_replicas
``dp_shard``                    ZeRO 1, 2 or 3 (``deepspeed.zero_stage``) over all data ranks
``cp``                          its Ulysses, whose ranks share the states of ZeRO as those of FSDP do here
``tp``                          our tensor slicing under its ``mpu``, as Megatron-DeepSpeed has it
``pp``                          its PipelineModule and 1F1B; ZeRO 0 or 1 over the data ranks of each stage
==============================  ===============================================================================
"""

from __future__ import annotations

from typing import Any

from trainsys.capabilities.deepspeed import zero_stage
from trainsys.config.run import RunConfig
from trainsys.flops import param_counts
from trainsys.layout import Layout

FP32_BYTES = 4


def mixed(cfg: RunConfig, layout: Layout) -> bool:
    """Whether DeepSpeed itself holds parameters in bf16 beside fp32 masters. With stages 0 and 1 parameters are
    fp32 and our layers cast them at use, as they do in the native engine: DeepSpeed's own wrappers for bf16 at
    these stages keep other states, or reduce in bf16."""
    return cfg.train.dtype == "bf16" and zero_stage(cfg, layout) >= 2


def settings(cfg: RunConfig, layout: Layout, cuda: bool) -> dict[str, Any]:
    """What ``deepspeed.initialize`` is given. ``cuda``: host memory that states are kept in is pinned."""
    stage = zero_stage(cfg, layout)
    micro = cfg.train.micro_batch
    out: dict[str, Any] = {
        "train_batch_size": cfg.train.global_batch,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": cfg.train.global_batch // (micro * layout.data_world),
        "gradient_clipping": cfg.optim.clip_norm,
        "steps_per_print": None,
        # Reductions are fp32 in every engine.
        "communication_data_type": "fp32",
        "seq_parallel_communication_data_type": "fp32",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": _zero(cfg, layout, stage, cuda),
    }
    if layout.pp > 1:
        # Whole activations: with sequence parallelism each rank of tp has its own.
        out["pipeline"] = {"pipe_partitioned": False, "grad_partitioned": False}
    if mixed(cfg, layout):
        out["bf16"] = {"enabled": True, "check_grad_overflow": True}
        out["data_types"] = {"grad_accum_dtype": "fp32"}
    return out


def _zero(cfg: RunConfig, layout: Layout, stage: int, cuda: bool) -> dict[str, Any]:
    if not stage:
        return {"stage": 0}
    bucket = max(1, int(cfg.parallel.bucket_mb * 1e6 / FP32_BYTES))
    bucket += bucket % 2  # of the all-gather's, it wants a multiple of two
    zero: dict[str, Any] = {
        "stage": stage,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        "overlap_comm": cfg.parallel.overlap.gradients and layout.pp == 1,
    }
    if cfg.deepspeed.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": cuda}
    if stage == 3:
        layers = max(1, param_counts(cfg.model).total // cfg.model.n_layers // layout.tp)
        zero["stage3_prefetch_bucket_size"] = cfg.parallel.fsdp.prefetch * layers
        # Its own linear would take the place of torch's in the whole process.
        zero["memory_efficient_linear"] = False
        if cfg.deepspeed.offload == "all":
            zero["offload_param"] = {"device": "cpu", "pin_memory": cuda}
    return zero
