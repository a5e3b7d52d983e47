"""Seconds of one optimizer step and where they go: stages, pipeline, data-parallel traffic, optimizer."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from trainsys.planner.cases import SCHEDULES, Array, Cases
from trainsys.planner.collectives import group, send_recv
from trainsys.planner.constants import Constants
from trainsys.planner.kernels import Pass, soft_max
from trainsys.planner.layer import LayerTime, embedding_time, head_time, layer_time
from trainsys.planner.partition import Parts, Stages, leading_dense, parts, stages


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step; the parts sum to ``total``."""

    total: Array
    matmul: Array
    attention: Array
    memory_bound: Array
    recompute: Array
    tp_comm: Array
    cp_comm: Array
    ep_comm: Array
    fsdp_comm: Array
    head: Array
    bubble: Array
    pp_comm: Array
    dp_comm: Array
    optimizer: Array
    other: Array


def _mix(dense: LayerTime, moe: LayerTime | None, w: Array) -> LayerTime:
    """The mean layer of a stage of whose layers a share ``w`` has experts."""
    if moe is None:
        return dense

    def mix(a: Array, b: Array) -> Array:
        out: Array = (1.0 - w) * a + w * b
        return out

    d, m = dense, moe
    return LayerTime(
        Pass(mix(d.total.fwd, m.total.fwd), mix(d.total.bwd, m.total.bwd)),
        mix(d.matmul, m.matmul),
        mix(d.attention, m.attention),
        mix(d.memory_bound, m.memory_bound),
        mix(d.tp_comm, m.tp_comm),
        mix(d.cp_comm, m.cp_comm),
        mix(d.ep_comm, m.ep_comm),
        mix(d.recompute, m.recompute),
    )


def _layer_params(c: Cases, p: Parts, w: Array) -> tuple[Array, Array]:
    """The layer's parameters on one rank before data-parallel sharding: (dense part, experts)."""
    dense = ((1.0 - w) * p.dense_layer + w * p.moe_dense) / c.tp
    return dense, w * p.experts / (c.ep * c.etp)


def _fsdp(c: Cases, k: Constants, layer: Pass, dense: Array, experts: Array) -> Pass:
    """Gathers (forward and backward) and reduction of one layer, hidden behind its compute by prefetch as far as
    they are shorter, slowing it a little."""
    g = group(c, k, c.fsdp_shard, c.tp)
    rail = np.where(c.single_rail > 0, k.nic_eff * c.nic_bw / c.domain, np.inf)
    g = replace(g, rate=np.where(g.n > g.local, np.minimum(g.rate, rail), g.rate))
    ge = group(c, k, np.maximum(c.fsdp_shard * c.tp / (c.ep * c.etp), 1.0), c.ep * c.etp)
    # Weights quantised with one scale a tensor are gathered as FP8 bytes.
    size = np.where(c.fp8 == 1, 1.0, 2.0)
    gather = g.ring(size * dense) + ge.ring(size * experts)
    reduce = g.ring(c.grad_bytes * dense) + ge.ring(c.grad_bytes * experts)
    moved_g = g.wire(size * dense) + ge.wire(size * experts)
    moved_r = g.wire(c.grad_bytes * dense) + ge.wire(c.grad_bytes * experts)
    # In a pipeline parameters stay gathered and gradients unreduced from the first micro-batch to the last.
    share = np.where(c.zero >= 3, np.where(c.pp > 1, 1.0 / c.micro_batches, 1.0), 0.0)
    again = np.where(c.pp > 1, 0.0, 1.0)
    # Without a pipeline the last micro-batch alone may have the reduction beside it.
    reducing = np.where((c.reduce_each > 0) | (c.pp > 1), 1.0, 1.0 / c.micro_batches)

    def hide(compute: Array, comm: Array, wire: Array) -> Array:
        out: Array = soft_max(compute, share * comm) + k.fsdp_contention * np.minimum(compute, share * wire)
        return out

    gathering = hide(layer.bwd, again * gather, again * moved_g)
    both = hide(layer.bwd, again * gather + reduce, again * moved_g + moved_r)
    return Pass(hide(layer.fwd, gather, moved_g), reducing * both + (1.0 - reducing) * gathering)


def _data_parallel(c: Cases, k: Constants, dense: Array, experts: Array, window: Array) -> Array:
    """Exposed gradient reduction and parameter gathering of ZeRO 0-2 over dp x cp; ``window`` seconds of compute
    stand beside it. Hybrid sharding (opt_shard < dp) reduces everywhere and gathers within the shard group."""
    n = c.dp * c.cp
    g = group(c, k, n, c.tp)
    ge = group(c, k, np.maximum(n * c.tp / (c.ep * c.etp), 1.0), c.ep * c.etp)
    small = group(c, k, np.minimum(c.opt_shard, n), c.tp)
    grads = c.grad_bytes * dense
    replicated = g.all_reduce(grads) + ge.all_reduce(c.grad_bytes * experts)
    hybrid = c.opt_shard < n
    sharded = (
        np.where(hybrid, g.all_reduce(grads), g.ring(grads))
        + ge.ring(c.grad_bytes * experts)
        + small.ring(2.0 * dense)
        + ge.ring(2.0 * experts)
    )
    comm = np.where(c.zero == 0, replicated, np.where(c.zero < 3, sharded, 0.0))
    comm = np.where((c.zero >= 3) & (c.fsdp_shard < n), g.all_reduce(grads / c.fsdp_shard), comm)
    usable = np.where(c.modern > 0, k.dp_window_modern, k.dp_window) * window

    def exposed(comm: Array) -> Array:
        out: Array = np.where(n > 1, np.maximum(comm - usable, 0.05 * comm), 0.0)
        return out

    # Kept parameters, and gradients reduced after each of the other micro-batches too.
    again = (c.native > 0) & (c.reduce_each > 0) & (c.zero == 2) & (c.pp == 1)
    reduced = small.ring(grads) + ge.ring(c.grad_bytes * experts)
    return exposed(comm) + np.where(again, (c.micro_batches - 1.0) * exposed(reduced), 0.0)


def bubble_and_steady(c: Cases, first: Pass, middle: Pass, last: Pass) -> tuple[Array, Array]:
    """(seconds of useful steady work on the slowest stage, seconds of bubble) of a pipelined step.

    The slowest stage works m micro-batches without a pause; filling and draining pass once through the other
    stages. Interleaving divides that by vpp (Narayanan et al. 2021); zero-bubble schedules fill it with weight
    gradients, half of backward (Qi et al. 2023): ZB-H1 leaves F+B-W of each other stage, ZB-2p and ZBV next to
    nothing, DualPipeV half a stage's.
    """
    m = c.micro_batches
    t_first, t_mid, t_last = first.fwd + first.bwd, middle.fwd + middle.bwd, last.fwd + last.bwd
    inner = np.maximum(c.pp - 2.0, 0.0)
    has_mid = c.pp > 2
    slowest = np.maximum(np.maximum(t_first, t_last), np.where(has_mid, t_mid, 0.0))
    total = np.where(c.pp > 1, t_first + t_last, t_first) + inner * t_mid
    others = total - slowest
    weight_grad = 0.5 * (middle.bwd / (middle.fwd + middle.bwd)) * others
    s = c.schedule
    bubble = np.select(
        [
            s == SCHEDULES.index("interleaved"),
            s == SCHEDULES.index("zb1"),
            s == SCHEDULES.index("zb2"),
            s == SCHEDULES.index("zbv"),
            s == SCHEDULES.index("dualpipev"),
        ],
        [
            others / c.vpp,
            np.maximum(others - 2.0 * weight_grad, 0.0),
            0.1 * others,
            0.15 * others,
            0.2 * others,
        ],
        others,
    )
    return m * slowest, np.where(c.pp > 1, bubble, 0.0)


@dataclass(frozen=True)
class _Work:
    """One micro-batch of each kind of stage, and what made it."""

    layer: LayerTime
    with_fsdp: Pass
    first: Pass
    middle: Pass
    last: Pass
    head: Pass
    embed: Pass
    dense_params: Array
    expert_params: Array
    stages: Stages
    parts: Parts
    hop: Array


def _work(c: Cases, k: Constants) -> _Work:
    dense_layer = layer_time(c, k, moe=False)
    moe_layer = layer_time(c, k, moe=True) if np.any(c.n_experts > 0) else None
    p, st = parts(c), stages(c)
    # The first stage has a mixture's dense layers; the pace is set by those that have none.
    in_front = np.where(c.n_experts > 0, 1.0 - leading_dense(c, st) / np.maximum(st.first, 1.0), 0.0)
    share = np.where((c.pp > 1) & (c.n_experts > 0), 1.0, in_front)
    layer, front = (_mix(dense_layer, moe_layer, w) for w in (share, in_front))
    dense_p, expert_p = _layer_params(c, p, share)
    with_fsdp = _fsdp(c, k, layer.total, dense_p, expert_p)
    fsdp_front = _fsdp(c, k, front.total, *_layer_params(c, p, in_front)) if moe_layer else with_fsdp
    embed, head = embedding_time(c, k), head_time(c, k)
    slow = np.where((c.ds_pipeline > 0) & (c.pp > 1), k.pipe_engine, 1.0)
    alone = np.where(c.pp == 1, 1.0, 0.0)
    first = (fsdp_front.scaled(st.first) + embed + head.scaled(alone)).scaled(slow)
    middle = with_fsdp.scaled(st.middle * slow)
    last = (with_fsdp.scaled(st.last) + head).scaled(slow)
    hop = send_recv(c, k, 2.0 * c.tokens * c.d_model / c.tp, c.tp * c.cp * c.dp)
    return _Work(layer, with_fsdp, first, middle, last, head, embed, dense_p, expert_p, st, p, hop)


def stage_times(c: Cases, k: Constants) -> tuple[Pass, Pass, Pass, Array]:
    """(first, middle and last stage's forward and backward seconds of one micro-batch, seconds of one transfer)."""
    w = _work(c, k)
    return w.first, w.middle, w.last, w.hop


def step_time(c: Cases, k: Constants) -> StepTime:
    """Predict every case. All arrays broadcast to one shape."""
    w = _work(c, k)
    layer, with_fsdp, middle, st, p = w.layer, w.with_fsdp, w.middle, w.stages, w.parts
    head, embed, dense_p, expert_p = w.head, w.embed, w.dense_params, w.expert_params
    steady, bubble = bubble_and_steady(c, w.first, middle, w.last)

    m = c.micro_batches
    piped = c.pp > 1
    pp_comm = np.where(piped, 2.0 * w.hop * ((c.pp - 1.0) + m * c.vpp * k.pp_exposed), 0.0)

    per_stage_dense = dense_p * st.middle + np.where(piped, 0.5, 2.0 - c.tied) * p.embedding / c.tp
    per_stage_exp = expert_p * st.middle
    window = middle.fwd + middle.bwd
    dp_comm = _data_parallel(c, k, per_stage_dense, per_stage_exp, window)
    shards = np.where(c.zero >= 3, c.fsdp_shard, np.where(c.zero > 0, c.opt_shard, 1.0))
    owned = (per_stage_dense + per_stage_exp) / shards
    optimizer = k.opt_bytes * owned / (k.hbm_eff * c.hbm_bw)

    nodes = np.maximum(c.world / np.minimum(c.domain, 8.0), 1.0)
    subtotal = steady + bubble + pp_comm + dp_comm + optimizer + k.step_s
    jitter = subtotal * k.jitter * np.log2(nodes)
    total = subtotal + jitter

    n_slow = np.where(piped, st.middle, st.first) * m
    head_s = np.where(piped, 0.0, (head.fwd + head.bwd + embed.fwd + embed.bwd) * m)
    mm, at, mb = layer.matmul * n_slow, layer.attention * n_slow, layer.memory_bound * n_slow
    tp, cp, ep, rc = (
        layer.tp_comm * n_slow,
        layer.cp_comm * n_slow,
        layer.ep_comm * n_slow,
        layer.recompute * n_slow,
    )
    fsdp = (with_fsdp.fwd + with_fsdp.bwd - layer.total.fwd - layer.total.bwd) * n_slow
    named = mm + at + mb + tp + cp + ep + rc + fsdp + head_s
    other = total - named - bubble - pp_comm - dp_comm - optimizer
    return StepTime(
        total, mm, at, mb, rc, tp, cp, ep, fsdp, head_s, bubble, pp_comm, dp_comm, optimizer, other
    )
