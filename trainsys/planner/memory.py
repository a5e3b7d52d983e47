"""Peak device memory of a layout by part: parameters, gradients, optimizer, activations, logits, buffers.

Activations follow Korthikanti et al. 2022 ("Reducing Activation Recomputation in Large Transformer Models"),
table 2, generalised to grouped queries, gated and mixture-of-experts feed-forwards, fused attention, sequence and
context parallelism. The peak is the largest over the first, a middle and the last pipeline stage.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trainsys.planner.cases import ATTN_KERNELS, RECOMPUTES, SCHEDULES, Array, Cases
from trainsys.planner.kernels import falls_back
from trainsys.planner.memory_constants import MemoryConstants
from trainsys.planner.native_memory import layer_bytes, summits
from trainsys.planner.partition import leading_dense, parts, stages

GIB = 2.0**30


@dataclass(frozen=True)
class Memory:
    """Bytes on the device with the highest memory use; the parts sum to ``total``."""

    total: Array
    parameters: Array
    gradients: Array
    optimizer: Array
    activations: Array
    logits: Array
    buffers: Array

    def fits(self, c: Cases, m: MemoryConstants) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
        return np.asarray(self.total <= m.usable * c.mem_bytes)


def layer_activation_bytes(c: Cases, m: MemoryConstants) -> tuple[Array, Array]:
    """(bytes one layer keeps for backward without recomputation, bytes of its input alone) for one micro-batch.

    Per token, 16-bit: D-sized inputs of both norms and their outputs, kept whole on every tp rank unless sequence
    parallel; q, k, v, attention output; the feed-forward's intermediates, split by tp. Dropout masks (models of
    the time before fused attention) cost a byte. An unfused attention also keeps scores, softmax and dropout mask:
    5 bytes x heads x S.
    """
    kept_whole = 8.0 * c.d_model
    ungated = c.glu == 0
    plain = c.attn_kernel <= ATTN_KERNELS.index("fused_softmax")
    kept_whole = kept_whole + np.where(ungated & plain, 2.0 * c.d_model, 0.0)
    norm = np.where(c.fused_norm > 0, 0.0, 2.0 * m.norm_unfused * c.d_model)
    kept_whole = kept_whole + norm
    split_by = np.where(c.sp > 0, c.tp, 1.0)
    attn = 2.0 * (2.0 * c.n_heads + 2.0 * c.n_kv_heads) * c.head_dim
    rotated = np.where(ungated, 0.0, 2.0 * (c.n_heads + c.n_kv_heads) * c.head_dim * m.rotary)
    square = np.where((c.attn_kernel == 0) | falls_back(c), 2.0 * m.square, m.square)
    scores = np.where(plain, square * c.n_heads * c.seq, 4.0 * c.n_heads)
    scores = np.where(plain & (c.recompute == RECOMPUTES.index("selective")), 0.0, scores)
    width = np.where(c.n_experts > 0, c.d_expert * c.top_k + c.d_shared, c.d_ff)
    fused = (c.modern > 0) | (c.compiled > 0)
    ffn = 2.0 * width * (2.0 + np.where(ungated, 0.0, 1.0 + np.where(fused, 0.0, m.gate)))
    # What goes into the experts and what comes out, for each of the copies of a token.
    ffn = ffn + np.where(c.n_experts > 0, 4.0 * c.top_k * c.d_model * c.etp, 0.0)
    whole = c.tokens * (kept_whole / split_by + (attn + rotated + scores + ffn) / c.tp)
    entry = 2.0 * c.tokens * c.d_model / split_by
    return whole, entry


def in_flight(c: Cases, stage_from_front: Array) -> Array:
    """Micro-batches (of a whole stage's layers) that a stage holds when fullest.

    1F1B: p - i. Interleaved: (2(p-i-1) + (v-1)p + 1)/v chunks (Narayanan et al. 2021). ZB-H1 as 1F1B; ZB-2p twice
    (Qi et al. 2023); ZBV and DualPipeV hold p on every stage.
    """
    p, v, i, m = c.pp, c.vpp, stage_from_front, c.micro_batches
    s = c.schedule
    base = p - i
    inter = (2.0 * (p - i - 1.0) + (v - 1.0) * p + 1.0) / v
    out = np.select(
        [
            s == SCHEDULES.index("gpipe"),
            s == SCHEDULES.index("interleaved"),
            s == SCHEDULES.index("zb2"),
            s == SCHEDULES.index("zbv"),
            s == SCHEDULES.index("dualpipev"),
        ],
        [m, inter, np.minimum(2.0 * base, 2.0 * p - 1.0), p, p + 0.5],
        base,
    )
    # DeepSpeed's pipeline engine keeps at least two micro-batches on every stage.
    out = np.where(c.ds_pipeline > 0, np.maximum(out, 2.0), out)
    result: Array = np.where(p > 1, np.minimum(out, m), 1.0)
    return result


def peak_memory(c: Cases, m: MemoryConstants) -> Memory:
    """Predict every case; bytes."""
    p = parts(c)
    st = stages(c)
    moe_share = np.where(c.n_experts > 0, 1.0 - c.dense_layers / c.n_layers, 0.0)
    dense_layer = ((1.0 - moe_share) * p.dense_layer + moe_share * p.moe_dense) / c.tp
    expert_layer = moe_share * p.experts / (c.ep * c.etp)
    embed = p.embedding / c.tp
    data = c.dp * c.cp
    expert_data = np.maximum(data * c.tp / (c.ep * c.etp), 1.0)

    full, entry = layer_activation_bytes(c, m)
    kind = c.recompute
    kept = np.select(
        [
            kind == RECOMPUTES.index("full"),
            kind == RECOMPUTES.index("half"),
            kind == RECOMPUTES.index("selective++"),
        ],
        # selective++ keeps attention's output and one fp32 number a head beside the layer's input.
        [
            entry,
            entry + m.half_kept * (full - entry),
            entry + c.tokens * c.n_heads * (2.0 * c.head_dim + 4.0) / c.tp,
        ],
        full,
    )
    again = (kind == RECOMPUTES.index("full")) | (kind == RECOMPUTES.index("selective++"))
    transient = np.where(again, full, 0.0)

    def estimated(
        layers: Array, embeddings: Array, head: Array, live: Array, leading: Array
    ) -> tuple[Array, Array, Array, Array, Array, Array]:
        sparse = np.where(c.n_experts > 0, layers - leading, 0.0)
        dense = ((layers - sparse) * p.dense_layer + sparse * p.moe_dense) / c.tp + embeddings * embed
        experts = sparse * p.experts / (c.ep * c.etp)
        count = dense + experts
        zero3 = c.zero >= 3
        # Fully sharded: fp32 shards of parameter, gradient and two moments; two layers are gathered at a time.
        # In a pipeline the whole stage stays gathered, with whole gradients, until its last micro-batch.
        units = np.where(c.pp > 1, count, 2.0 * (dense_layer + expert_layer) + (2.0 - c.tied) * embed)
        gathered = 2.0 * units
        params = np.where(
            zero3, 4.0 * dense / c.fsdp_shard + 4.0 * experts / expert_data + gathered, 2.0 * count
        )
        shard_grads = c.zero == 2
        grads_plain = c.grad_bytes * np.where(shard_grads, dense / c.opt_shard + experts / expert_data, count)
        loose = np.where(c.pp > 1, count, m.grad_units * (dense_layer + expert_layer))
        grads3 = 4.0 * dense / c.fsdp_shard + 4.0 * experts / expert_data + c.grad_bytes * loose
        grads = np.where(zero3, grads3, grads_plain)
        opt_dense = np.where(c.zero >= 1, np.where(zero3, c.fsdp_shard, c.opt_shard), 1.0)
        opt_exp = np.where(c.zero >= 1, expert_data, 1.0)
        # fp32 master and two moments; DeepSpeed's also copies its shard of the 16-bit gradients to fp32.
        per = np.where(zero3, 8.0, np.where(c.plain_accumulation > 0, 16.0, 12.0))
        opt = np.where(c.offload > 0, 0.0, per * (dense / opt_dense + experts / opt_exp))
        acts = layers * kept * live + transient + 4.0 * c.tokens * c.d_model
        split = np.where(c.gathered_logits > 0, 1.0, c.tp)
        # DeepSpeed's pipeline engine keeps the outputs of two micro-batches.
        many = (c.gathered_logits > 0) & ((c.tp > 1) | (c.ds_pipeline > 0) & (c.pp > 1))
        a_logit = np.where(many, m.logit_gathered, m.logit_bytes)
        logits = head * c.tokens * c.vocab * a_logit / split
        bucket = np.where((c.zero > 0) & (c.zero < 3) & (data > 1), m.bucket_bytes, 0.0)
        buffers = m.overhead_bytes + bucket + 0.0 * count
        return params, grads, opt, m.activation * acts, m.activation * logits, buffers

    own = c.native > 0
    kept_bytes = layer_bytes(c) if np.any(own) else None

    def stage(
        layers: Array, embeddings: Array, front: Array, head: Array, leading: Array
    ) -> tuple[Array, ...]:
        """``leading``: how many of its layers are a mixture's dense ones."""
        live = in_flight(c, front)
        if kept_bytes is None:
            return estimated(layers, embeddings, head, live, leading)
        own_head = np.where(c.pp > 1, head, head * (1.0 - c.tied)) * embed
        table = embeddings * embed - own_head
        block = dense_layer + expert_layer
        *most, buffers = summits(
            c, kept_bytes, layers, block, expert_layer, table, own_head, head, live
        )
        exact = (*most, buffers + m.overhead_bytes)
        if np.all(own):
            return exact
        estimate = estimated(layers, embeddings, head, live, leading)
        return tuple(np.where(own, x, y) for x, y in zip(exact, estimate, strict=True))

    one = c.pp == 1
    zero_, one_ = np.zeros(()), np.ones(())
    ends = [
        stage(
            st.first, np.where(one, 2.0 - c.tied, 1.0), zero_, np.where(one, 1.0, 0.0), leading_dense(c, st)
        ),
        stage(st.middle, zero_, np.minimum(one_, c.pp - 1.0), zero_, zero_),
        stage(st.last, np.where(one, 0.0, 1.0), c.pp - 1.0, one_, zero_),
    ]
    totals = [np.broadcast_to(sum(e), np.broadcast_shapes(*[np.shape(x) for x in e])) for e in ends]
    totals[1] = np.where(c.pp > 2, totals[1], 0.0)
    totals[2] = np.where(one, 0.0, totals[2])
    which = np.argmax(np.stack(np.broadcast_arrays(*totals)), axis=0)
    chosen = [np.choose(which, np.broadcast_arrays(*[e[i] for e in ends])) for i in range(6)]
    return Memory(np.maximum(np.maximum(totals[0], totals[1]), totals[2]), *chosen)
