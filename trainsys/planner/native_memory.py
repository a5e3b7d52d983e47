"""Peak memory of the native engine, moment by moment, as its step goes; held to dry runs of that step.

A step's memory has a few summits, of which the highest counts:

- **loss**: everything that forward keeps, logits, their gradient, and two fp32 pieces of them;
- **first layers of backward**: the same without logits, with what a feed-forward's backward makes, and with a layer
  computed again where it was not kept;
- **end of backward**: gradients. Where parameters are sharded the root unit (embedding, final norm and head together)
  is reduced last, from a flat fp32 copy; in a pipeline, and between micro-batches, gradients stay whole, unless each
  micro-batch's are reduced, which leaves a shard.

Weights are fp32 and cast where they are used: without FSDP, which casts once, every cast is kept for backward.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from trainsys.planner.cases import RECOMPUTES, Array, Cases

_ELEMENT = 2.0
_LOSS_PIECE = 2.0**26
"""Logits that the loss works on at once (`trainsys.ops.loss`)."""


class Layer(NamedTuple):
    """Bytes of one layer and one micro-batch; the same on every stage."""

    whole: Array  # what backward reads
    entry: Array  # its input alone
    kept: Array  # what of the whole forward keeps
    again: NDArray[np.bool_]  # forward is computed once more


def layer_bytes(c: Cases) -> Layer:
    """What a layer keeps for backward.

    Elements a token, D width, q and kv those of all heads, F hidden: inputs of two norms and one fp32 number each,
    their outputs (whole under sequence parallelism), q, k, v, out, one fp32 number a head, gate, up, activation, product.
    """
    d, e = c.d_model, _ELEMENT
    split = np.where(c.sp > 0, c.tp, 1.0)
    stream = (2.0 * d * e + 8.0) / split + 2.0 * d * e
    attention = 2.0 * (c.n_heads + c.n_kv_heads) * c.head_dim * e + 4.0 * c.n_heads
    kept = np.where(c.glu > 0, 4.0, 2.0)
    dense = kept * c.d_ff * e
    # Of a mixture: rows sent and returned, hidden states of k experts and of the shared one, fp32 scores.
    mixed = (
        e * (2.0 * c.top_k * d * c.tp + kept * (c.top_k * c.d_expert + c.d_shared)) + 8.0 * c.n_experts * c.tp
    )
    moe = np.where(c.n_experts > 0, 1.0 - c.dense_layers / c.n_layers, 0.0)
    hidden = (1.0 - moe) * dense + moe * mixed
    whole = c.tokens * (stream + (attention + hidden) / c.tp)
    entry = c.tokens * d * e / split
    results = c.tokens * c.n_heads * (c.head_dim * e + 4.0) / c.tp
    kind = c.recompute
    full, most = kind == RECOMPUTES.index("full"), kind == RECOMPUTES.index("selective++")
    half = np.where(kind == RECOMPUTES.index("half"), 0.5 * (whole + entry), whole)
    kept = np.where(full, entry, np.where(most, entry + results, half))
    return Layer(whole, entry, kept, full | most)


def summits(
    c: Cases,
    a_layer: Layer,
    layers: Array,
    block: Array,
    experts: Array,
    first: Array,
    head: Array,
    loss_here: Array,
    flight: Array,
) -> tuple[Array, Array, Array, Array, Array, Array]:
    """(parameters, gradients, optimizer, activations, logits, buffers) of one stage at its highest summit, bytes.

    Args:
        a_layer: `layer_bytes` of the cases.
        layers: of the stage.
        block: parameters of a mean layer on one rank, before FSDP.
        experts: those of them that are routed experts, of which a rank of ep has its own already.
        first, head: parameters of the embedding and of a head of its own, 0 where the stage has none.
        loss_here: 1 where the stage ends in the loss.
        flight: micro-batches in flight when fullest.
    """
    sharded, piped = c.opt_shard > 1, c.pp > 1
    n = c.opt_shard
    ends = first + head
    count = layers * block + ends
    # FSDP shards experts over the n/ep ranks that hold the same ones, all else over n.
    layers_owned = layers * (block + (c.ep - 1.0) * experts) / n
    owned = layers_owned + ends / n
    keeps_blocks = piped | (c.zero < 3)
    # Experts that no other rank of FSDP holds are no unit of it: nothing gathers them, and their casts are kept.
    loose = np.where(sharded & (c.ep == n), experts, 0.0)
    unit = block - loose
    whole, entry, kept, again = a_layer
    tail = np.where(loss_here > 0, entry + c.tokens * c.d_model * _ELEMENT, 0.0)
    acts = flight * (layers * kept + tail) + 2.0 * 4.0 * c.tokens * c.head_dim
    many = c.micro_batches > 1.0
    replicas = c.dp * c.cp / n
    split, pieced = c.split_optim > 0, c.split_grads > 0
    each = many & sharded & ~piped & ~pieced & (c.reduce_each > 0)
    many = many & ~each
    # Whole fp32 gradients: added up between micro-batches, or in buckets that are there from the start.
    whole_grads = np.where(many | (~sharded & (replicas > 1) & ~split), 4.0 * count, 0.0)
    # Shards of them, to which each micro-batch adds its own.
    whole_grads = np.where(each, 4.0 * owned, whole_grads)
    # A replica's piece of them. The last buckets of a backward, the embedding's among them, are on their way until the
    # next one needs the room.
    piece = 4.0 * owned / replicas
    flying = 4.0 * (1.0 + 1.0 / replicas) * (first + 0.5 * block) / n
    held = np.where(pieced, np.where(many, piece + flying, 0.0), whole_grads)
    state, moments = 4.0 * owned, np.where(split, 2.0 * piece, 8.0 * owned)
    zero = np.zeros(())

    logits_n = np.where(loss_here > 0, c.tokens * c.vocab / c.tp, 0.0)
    # A weight's cast is kept once for each micro-batch in flight.
    casts = _ELEMENT * flight * np.where(
        sharded, np.where(again, 0.0, layers * loose), np.where(again, head, count - first)
    )
    gathered = np.where(sharded, _ELEMENT * (ends + np.where(keeps_blocks, layers * unit, 0.0)), 0.0)
    # The gradient, and the fp32 piece that is worked on; of several, the one before goes only when the next is there.
    pieces = np.where(logits_n > _LOSS_PIECE, 8.0 * _LOSS_PIECE, 4.0 * logits_n)
    # In chunks: their logits and gradients, and the head's gradient in fp32, ready before backward, with a product that
    # is added to it (forward) or scaled and cast (backward). The head's cast is not kept.
    table, some = (
        np.where(loss_here > 0, np.maximum(head, first), 0.0),
        logits_n * c.loss_chunk * c.cp / c.seq,
    )
    plain = np.where(sharded, 0.0, _ELEMENT * table)
    chunked = np.maximum(
        4.0 * table
        + np.maximum(2.0 * _ELEMENT * some + _ELEMENT * table, (2.0 * _ELEMENT + 4.0) * some)
        + plain,
        (8.0 + np.where(sharded, _ELEMENT, 0.0)) * table,
    ) + np.where(loss_here > 0, c.tokens * c.d_model * _ELEMENT, 0.0)
    in_chunks = c.loss_chunk > 0
    casts = casts - np.where(in_chunks & (loss_here > 0), plain, 0.0)
    loss = (
        state + gathered, held, moments, acts + casts,
        np.where(in_chunks, chunked, 2.0 * _ELEMENT * logits_n + pieces), zero,
    )  # fmt: skip

    # The last layer's backward: two blocks gathered, one layer again, four hidden states and three of the stream.
    gathered = np.where(
        sharded, _ELEMENT * (ends + np.where(keeps_blocks, layers, np.minimum(layers, 2.0)) * unit), 0.0
    )
    width = np.where(c.n_experts > 0, c.top_k * c.d_expert + c.d_shared, c.d_ff)
    made = c.tokens * _ELEMENT * (4.0 * width / c.tp + 3.0 * c.d_model)
    casts = _ELEMENT * np.where(
        sharded,
        np.where(again, 1.0, flight * layers) * loose,
        np.where(again, block, flight * (count - ends)),
    )
    new = np.where(
        sharded,
        _ELEMENT * (head + 0.6 * block),
        np.where(many, _ELEMENT, 4.0) * head + _ELEMENT * 0.5 * block,
    )
    layer = (
        state + gathered, held + new, moments,
        acts - tail + np.where(again, whole - kept, 0.0) + casts + made, zero, zero,
    )  # fmt: skip

    # Gradients of stacked experts, as the next layer down makes them, beside those that are being reduced.
    expert_grads = np.where(sharded & (c.ep == 1), 0.85 * _ELEMENT * experts, 0.0)
    # The block after that reduces its gradients, from a flat fp32 copy, while the next one is gathered, flat and whole.
    alone = sharded & ~piped
    reduced = (
        state + _ELEMENT * (ends + np.where(keeps_blocks, layers, np.minimum(layers, 2.0) - 1.0) * unit),
        held + np.where(many, 0.0, _ELEMENT * (head + unit) + 4.0 * loose), moments,
        np.where(
            alone, np.maximum(layers - 2.0, 0.0) * kept + np.where(again, whole, 0.0) + expert_grads, -np.inf
        ), zero,
        (4.0 + np.where(keeps_blocks, 0.0, _ELEMENT)) * unit,
    )  # fmt: skip

    # All gradients are there. Without a pipeline blocks are reduced one by one and only the root is left.
    root = np.where(many, 4.0, _ELEMENT) * ends + 4.0 * layers_owned + np.where(each, 4.0 * ends / n, 0.0)
    rest = (flight - 1.0) * (layers * kept + np.where(sharded | again, 0.0, _ELEMENT * layers * block))
    plain_grads = 4.0 * count + np.where(many, 4.0, 0.0) * first
    last = (
        state + np.where(sharded & piped, _ELEMENT * count, 0.0),
        np.where(sharded, np.where(piped, (4.0 + _ELEMENT) * count, root), plain_grads),
        moments,
        np.where(piped, rest + expert_grads, zero) + entry,
        zero,
        np.where(sharded & ~piped, 4.0 * ends, 0.0),
    )  # fmt: skip

    moments_of = (loss, layer, reduced, last)
    shape = np.broadcast_shapes(*[np.shape(x) for moment in moments_of for x in moment])
    totals = [np.broadcast_to(sum(moment), shape) for moment in moments_of]
    highest = np.argmax(np.stack(totals), axis=0)
    parts = [
        np.choose(highest, [np.broadcast_to(moment[i], shape) for moment in moments_of]) for i in range(6)
    ]
    return parts[0], parts[1], parts[2], parts[3], parts[4], parts[5]
