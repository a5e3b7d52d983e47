"""One transformer layer, the embedding and the head on one device: forward and backward seconds with their parts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trainsys.planner import kernels, ring
from trainsys.planner.cases import ARCHS, ATTN_KERNELS, RECOMPUTES, Array, Cases
from trainsys.planner.collectives import Group, all_to_all, group
from trainsys.planner.constants import Constants
from trainsys.planner.kernels import Pass


@dataclass(frozen=True)
class LayerTime:
    """Seconds of one layer and one micro-batch. ``total`` is exposed time; the parts sum to it before the soft
    maximum with launch overhead, whose excess is ``launch``."""

    total: Pass
    matmul: Array
    attention: Array
    memory_bound: Array
    tp_comm: Array
    cp_comm: Array
    ep_comm: Array
    recompute: Array


def matmul_rate(c: Cases, k: Constants) -> tuple[Array, Array]:
    """FLOP/s of large matmuls at the run's matmul dtype and at 16 bits."""
    # Dynamic power goes with clock x voltage^2, and voltage rises with the clock: half the power, 0.7 of the clock.
    throttled = (c.arch == ARCHS.index("hopper")) | (c.arch == ARCHS.index("blackwell"))
    power = np.where(throttled, np.minimum(1.0, np.sqrt(c.watts / k.power_full)), 1.0)
    power = power * np.where(c.arch == ARCHS.index("blackwell"), k.power_blackwell, 1.0)
    power = power * np.where(c.attn_kernel == ATTN_KERNELS.index("fused_softmax"), k.gemm_classic, 1.0)
    r16 = c.gemm_rate_16 * k.gemm_eff * power
    low = k.gemm_eff * power * np.where(c.fp8 == 4, k.gemm_fp4, k.gemm_fp8) * c.gemm_rate
    return np.where(c.fp8 > 0, low, r16), r16


def dense_ffn(c: Cases, k: Constants, rate: Array, width: Array) -> Pass:
    """Up (and gate) and down projections of hidden size ``width`` over all tokens, split by tp."""
    up = kernels.linear(c.tokens, c.d_model, (1.0 + c.glu) * width / c.tp, rate, c, k)
    down = kernels.linear(c.tokens, width / c.tp, c.d_model, rate, c, k)
    return up + down


def expert_ffn(c: Cases, k: Constants, rate: Array) -> tuple[Pass, Pass]:
    """(matmuls, permutation) of routed experts: grouped matmuls over the tokens that reach this rank's experts."""
    local = np.maximum(c.n_experts / c.ep, 1.0)
    # all tokens of the ep group, top_k copies, over its experts; with etp the tp group's tokens meet again
    busiest = np.where(c.dropped > 0, 1.0, k.moe_imbalance)
    per_rank = c.tokens / c.tp * c.etp * c.top_k * busiest
    each = np.maximum(per_rank / local, 1.0)
    up = kernels.linear(each, c.d_model, (1.0 + c.glu) * c.d_expert / c.etp, rate, c, k, count=local)
    down = kernels.linear(each, c.d_expert / c.etp, c.d_model, rate, c, k, count=local)
    moved = 2.0 * per_rank * c.d_model * 6.0 * k.moe_bytes + 4.0 * c.tokens / c.tp * c.n_experts * 4.0
    perm = moved / (k.hbm_eff * c.hbm_bw)
    return up + down, Pass(perm, 1.5 * perm)


def expert_host(c: Cases, k: Constants) -> Array:
    """Host seconds to launch the matmuls of this rank's experts, one after the other, and to quantise what goes in:
    one kernel each with a scale a tensor, two with block scales."""
    kernels_each = 2.0 * (1.0 + np.select([c.fp8 == 0, c.fp8 == 1], [0.0, 1.0], 2.0))
    out: Array = np.maximum(c.n_experts / c.ep, 1.0) * kernels_each * k.expert_launch_s
    return out


def tensor_comm(c: Cases, k: Constants) -> Pass:
    """Two all-reduces forward and two backward of [tokens, D], or as many gather/scatter pairs under sequence
    parallelism, which gathers once more in backward behind the weight gradient."""
    g: Group = group(c, k, c.tp, np.asarray(1.0))
    wide = c.fp32_reduce > 0
    nbytes = np.where(wide, 4.0, 2.0) * c.tokens * c.d_model
    one = np.where(c.sp > 0, 2.0 * g.ring(nbytes), g.all_reduce(nbytes))
    casts = np.where(wide, 12.0 * c.tokens * c.d_model / (k.hbm_eff * c.hbm_bw), 0.0)
    one = one + casts + np.where((c.modern > 0) | (c.tp_overlap > 0), 0.0, k.collective_gap_s)
    exposed = np.where(c.tp_overlap > 0, k.tp_exposed_modern, k.tp_exposed)
    fwd = np.where(c.tp > 1, 2.0 * one * exposed, 0.0)
    return Pass(fwd, fwd)


def context_comm(c: Cases, k: Constants, core: Pass) -> Pass:
    """Ring attention: cp-1 transfers of keys and values, in backward also of their gradients (fp32 in the native
    ring, as `trainsys.context.traffic` counts), each hidden behind a block of attention as far as it is shorter.
    Ulysses: four all-to-alls of q, k, v and output, not hidden (Jacobs et al. 2023)."""
    g = group(c, k, c.cp, c.tp)
    kv = 2.0 * 2.0 * c.tokens * c.n_kv_heads * c.head_dim / c.tp
    step = kv / g.rate + g.hop_s
    back = np.where(c.eager > 0, 3.0, 2.0) * kv / g.rate + 2.0 * g.hop_s
    fwd = (c.cp - 1.0) * (k.cp_exposed * step + np.maximum(step - core.fwd / c.cp, 0.0))
    bwd = (c.cp - 1.0) * (k.cp_exposed * back + np.maximum(back - core.bwd / c.cp, 0.0))
    swap = all_to_all(g, c, k, 2.0 * c.tokens * (2.0 * c.n_heads + 2.0 * c.n_kv_heads) * c.head_dim / c.tp)
    on = c.cp > 1
    uly = c.ulysses > 0
    return Pass(np.where(on, np.where(uly, swap, fwd), 0.0), np.where(on, np.where(uly, swap, bwd), 0.0))


def _reached(n: Array, draws: Array) -> Array:
    """How many of ``n`` places so many random draws are expected to reach."""
    out: Array = n * (1.0 - (1.0 - 1.0 / np.maximum(n, 1.0)) ** draws)
    return out


def expert_comm(c: Cases, k: Constants) -> Pass:
    """Dispatch and combine all-to-alls, and with etp the gathers that make tensor-parallel experts whole.

    Modern dispatchers send a token once to each domain that holds any of its experts and copy it there (DeepSeek-V3,
    section 3.2.2). Where its experts are all in some of the groups (section 2.1.2), so are these domains."""
    g = group(c, k, c.ep, np.where(c.etp > 1, c.tp, 1.0))
    nbytes = 2.0 * c.tokens / c.tp * c.top_k * c.d_model
    domains = g.n / g.local
    share = c.top_groups / c.groups
    within = np.where(domains >= c.groups, domains * share, _reached(domains, c.top_groups))
    once = np.where(c.modern > 0, _reached(within, c.top_k) / c.top_k, 1.0)
    swap = 2.0 * all_to_all(g, c, k, nbytes, np.minimum(once, 1.0)) * k.a2a_exposed
    t = group(c, k, c.etp, np.asarray(1.0))
    gather = np.where(c.etp > 1, 2.0 * t.ring(nbytes * c.etp), 0.0)
    return Pass(swap + gather, swap + gather)


def layer_time(c: Cases, k: Constants, moe: bool) -> LayerTime:
    """A dense or (``moe``) an expert layer over one micro-batch."""
    rate, r16 = matmul_rate(c, k)
    h = c.n_heads * c.head_dim
    low_rank = c.attn_params / (c.d_model * (2.0 * h + 2.0 * c.n_kv_heads * c.head_dim))
    mm = kernels.linear(c.tokens, c.d_model, (h + 2.0 * c.n_kv_heads * c.head_dim) / c.tp, rate, c, k).scaled(
        low_rank
    )
    mm = mm + kernels.linear(c.tokens, h / c.tp, c.d_model, rate, c, k).scaled(low_rank)
    core = kernels.attention(c, k, r16, ring.call_length(c))
    moved = kernels.elementwise(c, k) + ring.merging(c, k)
    host = np.where((c.modern > 0) | (c.compiled > 0), k.layer_host_modern_s, k.layer_host_s)
    host = host * np.where(kernels.falls_back(c), 1.3, 1.0) + np.where(
        c.tp > 1, 2.0 * k.collective_host_s, 0.0
    )
    ep = Pass(np.asarray(0.0), np.asarray(0.0))
    if moe:
        experts, permute = expert_ffn(c, k, rate)
        mm = (
            mm
            + experts
            + dense_ffn(c, k, rate, np.maximum(c.d_shared, 1.0)).scaled(np.where(c.d_shared > 0, 1.0, 0.0))
        )
        moved = moved + permute
        ep = expert_comm(c, k)
        host = host * (1.0 + k.moe_host) + expert_host(c, k)
    else:
        mm = mm + dense_ffn(c, k, rate, c.d_ff)
    moved = moved + kernels.fp8_casts(c, k)
    moved = moved + Pass(
        np.asarray(0.0), accumulation(c, k, c.attn_params + (2.0 + c.glu) * c.d_model * c.d_ff)
    )
    tp = tensor_comm(c, k)
    cp = context_comm(c, k, core)
    busy = kernels.floor_by_launch(mm + core + moved, Pass(host, 1.8 * host) + ring.launching(c, k))
    # Forward of one micro-batch beside backward of another (DualPipe; DeepSeek-V3, section 3.2.1).
    hidden = c.ep_overlap * np.minimum(1.0, (busy.fwd + busy.bwd) / np.maximum(ep.fwd + ep.bwd, 1e-12))
    ep = ep.scaled(1.0 - hidden)
    forward = busy + tp + cp + ep
    kind = c.recompute
    unfused = c.attn_kernel <= 1
    again = (
        np.select(
            [
                kind == RECOMPUTES.index("full"),
                kind == RECOMPUTES.index("half"),
                kind == RECOMPUTES.index("selective"),
                kind == RECOMPUTES.index("selective++"),
            ],
            [
                forward.fwd,
                0.45 * busy.fwd,
                np.where(unfused | (c.eager > 0), core.fwd + cp.fwd, 0.0),
                np.maximum(forward.fwd - core.fwd - cp.fwd, 0.0),
            ],
            0.0,
        )
        * k.recompute_extra
    )
    total = Pass(forward.fwd, forward.bwd + again)
    return LayerTime(
        total,
        mm.fwd + mm.bwd,
        core.fwd + core.bwd,
        moved.fwd + moved.bwd,
        tp.fwd + tp.bwd,
        cp.fwd + cp.bwd,
        ep.fwd + ep.bwd,
        again,
    )


def accumulation(c: Cases, k: Constants, params: Array) -> Array:
    """Adding a micro-batch's weight gradients to the others', where that is a kernel of its own."""
    alone = (c.plain_accumulation > 0) & (c.micro_batches > 1.0)
    out: Array = np.where(alone, k.accumulate * params / c.tp / (k.hbm_eff * c.hbm_bw), 0.0)
    return out


def head_time(c: Cases, k: Constants) -> Pass:
    """Final norm, output projection and loss; logits split by tp over the vocabulary."""
    _, r16 = matmul_rate(c, k)
    mm = kernels.linear(c.tokens, c.d_model, c.vocab / c.tp, r16, c, k)
    bandwidth = k.hbm_eff * c.hbm_bw
    split = k.loss_bytes * c.tokens * c.vocab / c.tp / bandwidth
    whole = k.loss_gathered * c.tokens * c.vocab / bandwidth
    gather = group(c, k, c.tp, np.asarray(1.0)).ring(2.0 * c.tokens * c.vocab)
    loss = np.where((c.gathered_logits > 0) & (c.tp > 1), whole + gather, split)
    return mm + Pass(0.4 * loss, 0.6 * loss)


def embedding_time(c: Cases, k: Constants) -> Pass:
    """Lookup, and the scatter-add of its gradient in fp32; one reduction over tp."""
    moved = c.tokens * c.d_model / (k.hbm_eff * c.hbm_bw)
    comm = np.where(c.tp > 1, group(c, k, c.tp, np.asarray(1.0)).all_reduce(2.0 * c.tokens * c.d_model), 0.0)
    return Pass(4.0 * moved + comm, 10.0 * moved)
