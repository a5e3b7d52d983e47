"""Seconds of one layer's compute on one device: matmuls, attention, memory-bound work, launch overhead."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trainsys.planner.cases import ARCHS, ATTN_KERNELS, Array, Cases
from trainsys.planner.constants import Constants

TILE = 128.0


def matmul_s(
    m: Array,
    n: Array,
    k_dim: Array,
    rate: Array,
    c: Cases,
    k: Constants,
    *,
    count: Array | float = 1.0,
    out_bytes: float = 2.0,
) -> Array:
    """Seconds of ``count`` matmuls [m,k]x[k,n].

    ``rate`` (FLOP/s) is what a huge square one reaches; below it come the share of partial 128x128 tiles, the last
    wave of tiles over the device's cores (NVIDIA, "Matrix Multiplication Background", 2023) and a short inner
    dimension, whose start-up ``gemm_k_half`` stands for. Never faster than its operands cross memory.
    """
    tm, tn = np.ceil(m / TILE), np.ceil(n / TILE)
    waves = tm * tn * count / c.sms
    eff = (
        (m * n)
        / (tm * tn * TILE * TILE)
        * (waves / np.ceil(waves)) ** k.gemm_wave
        * k_dim
        / (k_dim + k.gemm_k_half)
    )
    compute = 2.0 * m * n * k_dim / (rate * eff)
    memory = (2.0 * (m * k_dim + k_dim * n) + out_bytes * m * n) / (k.hbm_eff * c.hbm_bw)
    out: Array = count * np.maximum(compute, memory)
    return out


@dataclass(frozen=True)
class Pass:
    """Forward and backward seconds of the same work."""

    fwd: Array
    bwd: Array

    def __add__(self, other: Pass) -> Pass:
        return Pass(self.fwd + other.fwd, self.bwd + other.bwd)

    def scaled(self, by: Array | float) -> Pass:
        return Pass(self.fwd * by, self.bwd * by)


def linear(
    tokens: Array, d_in: Array, d_out: Array, rate: Array, c: Cases, k: Constants, count: Array | float = 1.0
) -> Pass:
    """A linear layer and its two backward matmuls; the weight gradient adds into its buffer."""
    fwd = matmul_s(tokens, d_out, d_in, rate, c, k, count=count)
    grad_in = matmul_s(tokens, d_in, d_out, rate, c, k, count=count)
    grad_w = matmul_s(d_in, d_out, tokens, rate, c, k, count=count, out_bytes=6.0)
    return Pass(fwd, grad_in + grad_w)


def _moved(nbytes: Array, c: Cases, k: Constants) -> Array:
    out: Array = nbytes / (k.hbm_eff * c.hbm_bw)
    return out


def misaligned(c: Cases) -> Array:
    """1 where head_dim is no multiple of 8: tensor cores then load two bytes at a time."""
    out: Array = np.where(c.head_dim % 8 == 0, 0.0, 1.0)
    return out


def falls_back(c: Cases) -> Array:
    """True where Megatron's fused softmax refuses the shape and plain kernels run: it works on four attention
    matrices at once, so micro_batch * heads / tp must divide by 4."""
    out: Array = (c.attn_kernel == ATTN_KERNELS.index("fused_softmax")) & (
        (c.micro_batch * c.n_heads / c.tp) % 4 != 0
    )
    return out


def attention(c: Cases, k: Constants, rate16: Array, keys: Array) -> Pass:
    """The core of attention (no projections) over a micro-batch, heads split by tp and sequence by cp, in calls of
    ``keys`` keys each.

    Fused kernels compute the causal half at a rate by kernel and architecture; unfused ones compute the whole
    square as batched matmuls and move the score matrix through memory for mask, softmax and dropout.
    """
    heads = c.n_heads / c.tp
    full = 4.0 * c.micro_batch * heads * c.head_dim * c.seq * c.seq / c.cp  # FLOPs of the whole square
    kernel, arch = c.attn_kernel, c.arch
    hopper_up = arch >= ARCHS.index("hopper")
    flash2 = np.where(hopper_up, k.attn_flash2_hopper, k.attn_flash2)
    eff = np.where(
        kernel == ATTN_KERNELS.index("flash1"),
        np.where(hopper_up, k.attn_flash1 * 0.7, k.attn_flash1),
        flash2,
    )
    modern = (kernel >= ATTN_KERNELS.index("cudnn")) & hopper_up
    eff = np.where(modern, k.attn_fused, eff)
    ramp = keys / (keys + k.attn_seq_half) * np.where(c.head_dim < 128, 0.75 + 0.25 * c.head_dim / 128.0, 1.0)
    blocks = c.micro_batch * heads * np.ceil(np.minimum(c.seq / c.cp, 2.0 * keys) / 128.0) / c.sms
    fill = np.minimum(1.0, blocks)
    fused_f = 0.5 * c.attended * full / (c.peak_16 * eff * ramp * fill)
    fused_b = 2.5 * fused_f / k.attn_bwd

    batch = c.micro_batch * heads
    rows = c.seq / c.cp
    scores = 2.0 * batch * rows * c.seq  # bytes of one pass over the score matrix
    odd = np.where(misaligned(c) > 0, k.gemm_odd, 1.0)
    qk = matmul_s(rows, c.seq, c.head_dim, rate16 * odd, c, k, count=batch)
    pv = matmul_s(rows, c.head_dim, c.seq, rate16 * odd, c, k, count=batch)
    passes = np.where((kernel == ATTN_KERNELS.index("unfused")) | falls_back(c), 14.0, 5.0) * k.softmax_passes
    plain_f = qk + pv + _moved(scores * passes, c, k)
    plain_b = 2.0 * (qk + pv) + _moved(scores * passes * 1.4, c, k)
    plain = kernel <= ATTN_KERNELS.index("fused_softmax")
    return Pass(np.where(plain, plain_f, fused_f), np.where(plain, plain_b, fused_b))


def elementwise(c: Cases, k: Constants) -> Pass:
    """Norms, residuals, dropout, activation, rotary and casts of one layer, by bytes moved.

    Fused forward: two norms (read, write), two residual additions with dropout (3.5 each) on [tokens, D]; the
    activation reads and writes [tokens, F]; q and k are rotated. Backward moves about 1.6 times as much.
    With sequence parallelism the [tokens, D] part is split over tp (Korthikanti et al. 2022).
    """
    norm_extra = np.where(c.fused_norm > 0, 0.0, 2.0 * k.norm_unfused)
    # Rotary embeddings in fp32 and the gate's product are most of it: models without a gate have neither.
    eager = np.where((c.eager > 0) & (c.compiled == 0), k.eager_extra * (0.25 + 0.75 * c.glu), 0.0)
    per_d = (11.0 + norm_extra + eager) / np.where(c.sp > 0, c.tp, 1.0)
    width = np.where(c.n_experts > 0, c.d_expert * c.top_k + c.d_shared, c.d_ff)
    per_f = (2.0 + c.glu) * width / c.tp
    qk = (c.n_heads + 2.0 * c.n_kv_heads) * c.head_dim / c.tp * 3.0
    scale = np.where((c.modern > 0) | (c.compiled > 0), k.modern_save, 1.0) * k.elementwise
    fwd = _moved(2.0 * c.tokens * (per_d * c.d_model + per_f + qk) * scale, c, k)
    return Pass(fwd, 1.6 * fwd)


def fp8_casts(c: Cases, k: Constants) -> Pass:
    """Quantising inputs and gradients of the layer's matmuls: read 2 bytes, write 1, both ways round."""
    kind = c.fp8
    scale = np.where(kind == 1, k.fp8_cast, np.where(kind == 3, k.fp8_row, k.fp8_mx))
    width = (
        2.0 * c.d_model
        + (c.n_heads * c.head_dim + np.where(c.n_experts > 0, c.d_expert * c.top_k, c.d_ff)) / c.tp
    )
    fwd = np.where(kind > 0, _moved(4.0 * c.tokens * width * scale, c, k), 0.0)
    return Pass(fwd, 1.5 * fwd)


def floor_by_launch(gpu: Pass, host: Pass) -> Pass:
    """A layer is never faster than the host launches its kernels (soft maximum)."""
    return Pass(soft_max(gpu.fwd, host.fwd, 8), soft_max(gpu.bwd, host.bwd, 8))


def soft_max(a: Array, b: Array, power: int = 4) -> Array:
    """A smooth maximum, the norm of order ``power`` (4 or 8): exact where one is much larger, 19% or 9% above where
    both are equal."""
    big = np.maximum(a, b)
    ratio = np.minimum(a, b) / np.maximum(big, 1e-30)
    r4 = ratio * ratio
    r4 = r4 * r4
    if power == 4:
        return np.asarray(big * np.sqrt(np.sqrt(1.0 + r4)))
    assert power == 8, power
    return np.asarray(big * np.sqrt(np.sqrt(np.sqrt(1.0 + r4 * r4))))
