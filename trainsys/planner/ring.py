"""What a context-parallel ring costs beside the attention it splits: short blocks, merging them, launching them.

A ring of n on zigzag shards cuts a row of S into 2n chunks. A rank computes 2n + 1 pairs of chunks in forward (three
at home, two a hop) where one process calls one kernel: each call has 1/(2n) of the row's keys, so it runs at the
rate of a short sequence, and is followed by the merge of its result in fp32. Megatron's and cuDNN's rings call one
kernel a hop and merge it in one more (Ring Attention, Liu et al. 2023; Llama 3, section 3.3.2, for why short
sequences want none of it).
"""

from __future__ import annotations

import numpy as np

from trainsys.planner.cases import Array, Cases
from trainsys.planner.constants import Constants
from trainsys.planner.kernels import Pass

LAYER_LAUNCHES = 45.0
"""Kernels of an eager layer's forward, which ``layer_host_s`` is the launch time of."""
_FORWARD = 12.0  # kernels of one block in plain operations: attention, and the merge's logaddexp, exp, products, copies
_BACKWARD = 9.0  # attention's three, and the sums of dq, dk and dv
_FUSED = 3.0
# Bytes an element: reads and writes of the fp32 accumulator, of the block's own result and of their product.
_MERGE, _MERGE_FUSED, _SUM = 26.0, 12.0, 10.0


def ring(c: Cases) -> Array:
    """Ranks of the ring; 1 under Ulysses, which moves heads."""
    return np.where(c.ulysses > 0, 1.0, c.cp)


def call_length(c: Cases) -> Array:
    """Keys of one attention call: a chunk in the native ring, both chunks of a rank in a fused one."""
    n = ring(c)
    out: Array = np.where(n > 1, c.seq / np.where(c.eager > 0, 2.0 * n, n), c.seq)
    return out


def calls(c: Cases) -> Array:
    """Attention calls of one layer's forward."""
    n = ring(c)
    out: Array = np.where(n > 1, np.where(c.eager > 0, 2.0 * n + 1.0, n), 1.0)
    return out


def merging(c: Cases, k: Constants) -> Pass:
    """Seconds of adding blocks up: outputs in forward, gradients of queries, keys and values in backward."""
    n = ring(c)
    rows = calls(c) * call_length(c) * c.micro_batch
    per = np.where(c.eager > 0, _MERGE, _MERGE_FUSED)
    heads, kv = c.n_heads / c.tp, c.n_kv_heads / c.tp
    rate = k.hbm_eff * c.hbm_bw
    fwd = np.where(n > 1, per * rows * heads * c.head_dim / rate, 0.0)
    bwd = np.where(n > 1, _SUM * rows * (heads + 2.0 * kv) * c.head_dim / rate, 0.0)
    return Pass(fwd, bwd)


def launching(c: Cases, k: Constants) -> Pass:
    """Host seconds of a layer's ring beyond those of one attention call."""
    n, each = ring(c), k.layer_host_s / LAYER_LAUNCHES
    eager = c.eager > 0
    more = calls(c) - 1.0
    hops = 2.0 * k.collective_host_s * (n - 1.0)
    fwd = more * each * np.where(eager, _FORWARD, _FUSED) + hops
    bwd = more * each * np.where(eager, _BACKWARD, _FUSED) + 2.0 * hops
    return Pass(np.where(n > 1, fwd, 0.0), np.where(n > 1, bwd, 0.0))
