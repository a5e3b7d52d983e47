"""One planner case to vary: Llama-3 8B on DGX H100, sharded data parallelism over 64."""

from __future__ import annotations

import numpy as np

from trainsys.planner.cases import Cases, from_columns

BASE: dict[str, float] = {
    "n_layers": 32, "d_model": 4096, "n_heads": 32, "n_kv_heads": 8, "head_dim": 128, "d_ff": 14336, "glu": 1,
    "vocab": 128256, "tied": 0, "seq": 8192, "attn_params": 4096 * 128 * (64 + 16), "attended": 1, "n_experts": 0,
    "top_k": 1, "groups": 1, "top_groups": 1, "d_expert": 14336, "d_shared": 0, "dropped": 0,
    "dense_layers": 0, "gemm_rate": 794.5e12,
    "gemm_rate_16": 794.5e12, "peak_16": 989.4e12, "sms": 132, "hbm_bw": 3.35e12, "mem_bytes": 79.1 * 2**30,
    "link_bw": 450e9, "pair_bw": 450e9, "domain": 8, "nic_bw": 400e9, "arch": 2, "watts": 0.7075,
    "world": 64, "dp": 64, "tp": 1,
    "pp": 1, "vpp": 1, "cp": 1, "ep": 1, "etp": 1, "sp": 0, "zero": 3, "opt_shard": 64, "fsdp_shard": 64,
    "micro_batch": 1, "global_batch": 128, "recompute": 0, "schedule": 0, "ends_fewer": 0, "attn_kernel": 4,
    "fp8": 0, "grad_bytes": 4, "fused_norm": 1, "compiled": 1, "modern": 0, "eager": 1, "tp_overlap": 0,
    "fp32_reduce": 0, "gathered_logits": 0, "plain_accumulation": 0, "ds_pipeline": 0, "single_rail": 0,
    "ep_overlap": 0, "ulysses": 0, "offload": 0, "native": 0, "split_optim": 0, "split_grads": 0, "reduce_each": 1,
    "loss_chunk": 0, "cut_first": 0, "cut_middle": 0, "cut_last": 0,
}  # fmt: skip


def case(**changes: float | list[float]) -> Cases:
    """The base with changes; a list makes that many cases."""
    return from_columns({k: np.asarray(changes.get(k, v), float) for k, v in BASE.items()})
