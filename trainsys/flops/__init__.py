"""FLOPs of a decoder: one set of formulas for metrics, planner, profiler and tests. No torch here.

Only matrix multiplications are counted, a multiply-add as 2, as in Chowdhery et al. 2022 (PaLM), appendix B:
norms, rotary embedding, softmax, activations, biases and the embedding lookup count 0.
"""

from trainsys.flops.counts import (
    Convention,
    ModelFlops,
    batch_flops,
    layer_is_recomputed,
    token_flops,
    train_flops_per_token,
)
from trainsys.flops.gemms import (
    Gemm,
    causal_pairs,
    full_pairs,
    head_gemm,
    layer_gemms,
    packed_pairs,
    row_pairs,
)
from trainsys.flops.params import ParamCounts, layer_params, param_counts
from trainsys.flops.step import CONVENTIONS, StepFlops, StepWork, mfu, step_flops

__all__ = [
    "CONVENTIONS",
    "Convention",
    "Gemm",
    "ModelFlops",
    "ParamCounts",
    "StepFlops",
    "StepWork",
    "batch_flops",
    "causal_pairs",
    "full_pairs",
    "head_gemm",
    "layer_gemms",
    "layer_is_recomputed",
    "layer_params",
    "mfu",
    "packed_pairs",
    "param_counts",
    "row_pairs",
    "step_flops",
    "token_flops",
    "train_flops_per_token",
]
