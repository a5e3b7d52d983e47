"""A batch of (model, machine, layout, software) combinations as arrays: what every planner formula reads.

One field is one quantity; each is a float64 array of the same length N, or a 0-d array that holds for all N
(numpy broadcasts). The search fills it from a grid of layouts, the back-test from rows of a table, so both
run exactly the same model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Cases:
    """Counts are counts, sizes bytes, rates per second; flags are 0.0 or 1.0."""

    # model
    n_layers: Array
    d_model: Array
    n_heads: Array
    n_kv_heads: Array
    head_dim: Array
    d_ff: Array
    glu: Array  # 1: gated feed-forward (three matrices), 0: two
    vocab: Array
    tied: Array
    seq: Array
    attn_params: Array  # parameters of the attention projections of one layer
    attended: Array  # keys a query sees on average / (seq/2): 1 causal, less with a sliding window
    n_experts: Array  # 0: dense
    top_k: Array
    groups: Array  # of experts; a token's experts are all in top_groups of them
    top_groups: Array
    d_expert: Array
    d_shared: Array
    dropped: Array  # 1: tokens beyond an expert's even share are dropped
    dense_layers: Array  # leading layers that stay dense in a MoE model
    # machine
    gemm_rate: Array  # FLOP/s of the best measured large matmul at the run's matmul dtype
    gemm_rate_16: Array  # the same at bf16/fp16: head and what FP8 leaves alone
    peak_16: Array  # dense catalogue peak at 16 bits, FLOP/s
    sms: Array
    hbm_bw: Array  # bytes/s
    mem_bytes: Array  # device memory the framework can use
    link_bw: Array  # scale-up bytes/s, one direction, one device
    pair_bw: Array  # scale-up bytes/s between one pair (mesh: less than link_bw)
    domain: Array  # devices joined by the scale-up link
    nic_bw: Array  # bytes/s out of one domain, shared by its devices
    arch: Array  # index in ARCHS
    watts: Array  # board power for each dense 16-bit TFLOP/s
    # layout
    world: Array
    dp: Array
    tp: Array
    pp: Array
    vpp: Array
    cp: Array
    ep: Array
    etp: Array  # tensor-parallel degree of the experts
    sp: Array
    zero: Array  # 0 replicated, 1 optimizer sharded, 2 gradients too, 3 parameters too (FSDP)
    opt_shard: Array  # ways the optimizer state is sharded
    fsdp_shard: Array  # ways parameters are sharded when zero is 3
    micro_batch: Array
    global_batch: Array
    recompute: Array  # index in RECOMPUTES
    schedule: Array  # index in SCHEDULES
    ends_fewer: Array  # layers that the first and the last stage hold less than the others
    # software
    attn_kernel: Array  # index in ATTN_KERNELS
    fp8: Array  # 0: 16 bits; 1: FP8 one scale a tensor; 2: MX block scales; 3: one scale a row; 4: FP4
    grad_bytes: Array  # bytes of a gradient element as stored and reduced
    fused_norm: Array
    compiled: Array
    modern: Array  # fused, CUDA-graph-era kernels and overlapped communication (Transformer Engine, XLA)
    eager: Array  # stock eager PyTorch modules
    tp_overlap: Array  # tensor-parallel communication overlaps matmuls (user buffers, async TP)
    fp32_reduce: Array  # 1: activations are reduced over tp in fp32 (GPT-NeoX does so for bf16)
    gathered_logits: Array  # 1: logits are gathered over tp before the loss
    plain_accumulation: Array  # 1: a micro-batch's gradient is written, then added
    ep_overlap: Array  # 1: the token exchange runs beside the compute of another micro-batch
    ulysses: Array
    ds_pipeline: Array  # 1: DeepSpeed's pipeline engine
    single_rail: Array  # 1: fully sharded parameters move over one ring, so one NIC a node
    offload: Array
    native: Array  # 1: this project's own engine, whose memory is counted and not estimated
    split_optim: Array  # 1: optimizer states are sharded over replicas as well
    split_grads: Array  # 1: gradients too
    reduce_each: Array  # 1: fully sharded gradients are reduced after every micro-batch; 0: once, whole until then
    loss_chunk: Array  # positions of a row whose logits exist at a time; 0: all
    cut_first: Array  # layers of the first rank of pp, the fullest between and the last; 0: an even split
    cut_middle: Array
    cut_last: Array

    @property
    def size(self) -> int:
        return max((int(np.size(getattr(self, f.name))) for f in fields(self)), default=0)

    @property
    def micro_batches(self) -> Array:
        """Forward passes of one data rank in a step."""
        return self.global_batch / (self.dp * self.micro_batch)

    @property
    def tokens(self) -> Array:
        """Tokens of one micro-batch that one tensor-parallel group computes."""
        return self.micro_batch * self.seq / self.cp

    def take(self, index: NDArray[np.int64] | NDArray[np.bool_] | slice) -> Cases:
        """The chosen rows; 0-d fields stay 0-d."""
        return Cases(**{f.name: v[index] if np.ndim(v := getattr(self, f.name)) else v for f in fields(self)})

    def replace(self, **changes: Array | float) -> Cases:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values.update({k: np.asarray(v, float) for k, v in changes.items()})
        return Cases(**values)


ARCHS = ("volta", "ampere", "hopper", "blackwell", "cdna", "other")
ATTN_KERNELS = ("unfused", "fused_softmax", "flash1", "flash2", "cudnn", "flash3")
RECOMPUTES = ("none", "selective", "full", "half", "selective++")
# selective: attention alone; half: about half of the matmuls, as op-level policies; selective++: all but attention
SCHEDULES = ("1f1b", "gpipe", "interleaved", "zb1", "zb2", "zbv", "dualpipev")


def from_columns(columns: Mapping[str, object]) -> Cases:
    """Build from a mapping of every field name to numbers; a missing or unknown name is an error of ours."""
    names = {f.name for f in fields(Cases)}
    assert set(columns) == names, (names - set(columns), set(columns) - names)
    return Cases(**{k: np.asarray(v, float) for k, v in columns.items()})
