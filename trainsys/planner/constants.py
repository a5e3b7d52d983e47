"""The few numbers that datasheets do not give: efficiencies, latencies and overheads, each with its prior.

Every constant has a meaning outside this model (a fraction of a measured rate, microseconds, bytes a token).
``PRIORS`` holds what a careful reader of the literature would assume and how sure of it they would be; the
shipped ``constants.yaml`` holds the values fitted to published runs by ``trainsys.planner.calibrate``, and says
to which.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cache

from trainsys.shipped_yaml import shipped_yaml

# Kinds of runs whose errors differ.
DENSE, LOW, MOE = "dense, 16 bits, A100/H100", "FP8/FP4 or Blackwell, dense", "mixture of experts"


@dataclass(frozen=True)
class Prior:
    """Value and standard deviation of its logarithm."""

    value: float
    log_sd: float
    why: str


PRIORS: dict[str, Prior] = {
    # matmul
    "gemm_eff": Prior(0.93, 0.06, "of the best measured matmul, in a training loop, up to Ampere"),
    "gemm_classic": Prior(0.93, 0.05, "matmul rate of libraries of before 2022 over today's"),
    "power_full": Prior(
        0.84, 0.12, "watts a dense 16-bit TFLOP/s from which power does not hold back a long row of matmuls"
    ),
    "power_blackwell": Prior(1.0, 0.05, "what Blackwell sustains beyond what Hopper does at the same watts a FLOP"),
    "gemm_k_half": Prior(160.0, 0.5, "inner dimension at which a matmul reaches half rate"),
    "gemm_wave": Prior(0.5, 0.4, "exponent of wave quantisation; split-k hides part of it"),
    "gemm_fp8": Prior(1.2, 0.10, "share of the best measured FP8 matmul, relative to the same at 16 bits"),
    "gemm_fp4": Prior(0.9, 0.15, "the same of FP4"),
    "fp8_cast": Prior(1.0, 0.5, "activations cast to FP8: scale on counted bytes, one scale a tensor"),
    "fp8_mx": Prior(1.6, 0.4, "the same with block scales (MX)"),
    "fp8_row": Prior(4.0, 0.5, "the same with one scale a row, unfused"),
    "gemm_odd": Prior(0.25, 0.4, "rate of attention matmuls whose head dimension is no multiple of 8"),
    "accumulate": Prior(
        8.0, 0.3, "bytes a parameter to add a micro-batch's gradient where the matmul does not"
    ),
    # attention, forward, fraction of the 16-bit peak on long sequences
    "attn_flash1": Prior(0.38, 0.15, "Dao et al. 2022 on A100"),
    "attn_flash2": Prior(0.60, 0.05, "Dao 2023 on A100, many heads and long sequences"),
    "attn_flash2_hopper": Prior(
        0.36, 0.20, "Shah et al. 2024, FlashAttention-2 on H100; less under the power limit"
    ),
    "attn_fused": Prior(0.60, 0.15, "cuDNN / FlashAttention-3 on H100, B200"),
    "attn_bwd": Prior(0.85, 0.05, "backward's rate over forward's: Dao 2023, Shah et al. 2024"),
    "attn_seq_half": Prior(400.0, 0.6, "sequence at which the kernel reaches half rate"),
    # memory-bound work
    "hbm_eff": Prior(0.75, 0.12, "of catalogue bandwidth, element-wise kernels"),
    "elementwise": Prior(1.0, 0.3, "scale on the counted bytes of norms, residuals, activation, rotary"),
    "softmax_passes": Prior(1.0, 0.3, "scale on the counted bytes of an unfused softmax"),
    "norm_unfused": Prior(16, 0.3, "extra D-sized 16-bit reads/writes of one unfused RMSNorm, forward"),
    "eager_extra": Prior(16.0, 0.5, "extra D-sized reads/writes of a layer in eager PyTorch, forward"),
    "modern_save": Prior(1.0, 0.25, "element-wise bytes of fused modern stacks over classic ones"),
    "loss_bytes": Prior(16.0, 0.4, "bytes per logit moved by loss and its backward"),
    "loss_gathered": Prior(
        16.0, 0.4, "the same where every tensor-parallel rank computes the whole vocabulary's"
    ),
    # host
    "layer_host_s": Prior(
        8e-4, 0.4, "host time to launch one layer's forward, classic stack: profiling/host_launch.py"
    ),
    "layer_host_modern_s": Prior(5e-4, 0.4, "the same in modern stacks: fewer kernels"),
    "collective_host_s": Prior(4e-5, 0.5, "host time of one collective"),
    "step_s": Prior(
        0.012, 0.1, "host work, loss synchronisation and logging of a step: some 10 ms in any stack"
    ),
    # communication
    "link_eff": Prior(0.78, 0.08, "of the scale-up link's one-way rate, large messages"),
    "nic_eff": Prior(0.80, 0.15, "of the NIC's rate"),
    "hop_intra_s": Prior(4e-6, 0.5, "one ring step inside a domain"),
    "hop_inter_s": Prior(14e-6, 0.5, "one ring step between nodes"),
    "collective_gap_s": Prior(2e-5, 0.7, "device idle around one tensor-parallel collective, classic stacks"),
    "tp_exposed": Prior(1.0, 0.1, "of tensor-parallel communication, no overlap"),
    "tp_exposed_modern": Prior(0.6, 0.4, "the same with overlap (user buffers, async TP)"),
    "cp_exposed": Prior(0.3, 0.5, "of ring attention's transfers"),
    "dp_window": Prior(0.3, 0.7, "of one micro-batch usable to hide data-parallel traffic, classic stacks"),
    "dp_window_modern": Prior(0.8, 0.4, "the same in stacks that overlap by bucket"),
    "fsdp_contention": Prior(0.15, 0.4, "compute slowed while gathering: fraction of the hidden time"),
    "pp_exposed": Prior(0.5, 0.5, "of stage-to-stage transfers, in steady state"),
    "pipe_engine": Prior(
        1.06, 0.04, "work of a stage under DeepSpeed's pipeline engine, which sends synchronously"
    ),
    "jitter": Prior(0.004, 0.35, "slowdown per doubling of nodes"),
    "opt_bytes": Prior(30, 0.2, "bytes moved per parameter by the optimizer step"),
    "moe_bytes": Prior(1.0, 0.4, "scale on bytes of permuting tokens to experts and back"),
    "moe_imbalance": Prior(1.10, 0.08, "busiest expert rank over the mean"),
    "a2a_exposed": Prior(0.9, 0.2, "of the token exchange"),
    "moe_host": Prior(2.0, 0.4, "further host time of a MoE layer's forward, in dense layers"),
    "expert_launch_s": Prior(8e-6, 0.5, "host time of one kernel of one expert, launched from a loop in C++"),
    "recompute_extra": Prior(1.0, 0.05, "cost of a recomputed forward over a forward"),
}


@dataclass(frozen=True)
class Constants:
    """One value for each entry of ``PRIORS``; see there for meaning and unit."""

    gemm_eff: float
    gemm_classic: float
    power_full: float
    power_blackwell: float
    gemm_k_half: float
    gemm_wave: float
    gemm_fp8: float
    gemm_fp4: float
    fp8_cast: float
    fp8_mx: float
    fp8_row: float
    gemm_odd: float
    accumulate: float
    attn_flash1: float
    attn_flash2: float
    attn_flash2_hopper: float
    attn_fused: float
    attn_bwd: float
    attn_seq_half: float
    hbm_eff: float
    elementwise: float
    softmax_passes: float
    norm_unfused: float
    eager_extra: float
    modern_save: float
    loss_bytes: float
    loss_gathered: float
    layer_host_s: float
    layer_host_modern_s: float
    collective_host_s: float
    step_s: float
    link_eff: float
    nic_eff: float
    hop_intra_s: float
    hop_inter_s: float
    collective_gap_s: float
    tp_exposed: float
    tp_exposed_modern: float
    cp_exposed: float
    dp_window: float
    dp_window_modern: float
    fsdp_contention: float
    pp_exposed: float
    pipe_engine: float
    jitter: float
    opt_bytes: float
    moe_bytes: float
    moe_imbalance: float
    a2a_exposed: float
    moe_host: float
    expert_launch_s: float
    recompute_extra: float


assert {f.name for f in fields(Constants)} == set(PRIORS)


def from_priors() -> Constants:
    """What the literature alone says."""
    return Constants(**{name: p.value for name, p in PRIORS.items()})


@cache
def constants_file() -> dict[str, dict[str, float]]:
    """``constants.yaml`` as it is."""
    data: dict[str, dict[str, float]] = shipped_yaml("trainsys.planner", "constants.yaml")
    return data


@cache
def shipped() -> Constants:
    """The fitted values that ship with trainsys (``constants.yaml`` beside this file)."""
    return Constants(**{name: float(v) for name, v in constants_file()["time"].items()})


def expected_error_pct(kind: str) -> float | None:
    """Mean error of step time on a source that the shipped values have not seen; None: not known of that kind."""
    return constants_file().get("error_pct", {}).get(kind)


def shipped_sources() -> list[str]:
    """Names of the published sources that the shipped values were fitted to."""
    return sorted(constants_file()["fitted_on"])
