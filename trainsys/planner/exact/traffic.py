"""Bytes that one rank sends in one step, by axis and operation, as the ledger counts them."""

from __future__ import annotations

from collections import Counter

from trainsys.context.traffic import AttentionSize, sent_bytes
from trainsys.flops import layer_is_recomputed
from trainsys.flops.gemms import is_moe_layer
from trainsys.planner.exact.place import Held, Place
from trainsys.schedules.program import Gather, programs

Traffic = Counter[tuple[str, str]]


def step_traffic(place: Place) -> Traffic:
    """(axis, operation) -> bytes; without those of mixtures' rows and counts, which hang on the routing."""
    sent: Traffic = Counter()
    layout = place.layout
    if layout.tp > 1:
        _tensor(place, sent)
    if layout.cp > 1:
        _context(place, sent)
    if layout.pp > 1:
        _pipeline(place, sent)
    _sharded(place, sent)
    _replicated(place, sent)
    if layout.world > 1:
        sent["world", "all_reduce"] += 2 * 12 * (layout.world - 1) // layout.world  # loss, norm, stop
    return +sent


def _tensor(place: Place, sent: Traffic) -> None:
    """Two collectives around attention and two around the feed-forward, as many in backward; one of each kind after
    the embedding and before the head; three numbers a token in the loss; gradients of what is replicated."""
    cfg, tp = place.cfg, place.layout.tp
    wide = 4
    stream = place.tokens * cfg.model.d_model * place.element
    shard = stream // tp * (tp - 1)
    enters = leaves = enters_back = leaves_back = 0
    for part in place.parts.values():
        if part.embed:
            leaves, leaves_back = leaves + 1, leaves_back + 1
        if part.head:
            enters, enters_back = enters + 1, enters_back + 1
        for layer in part.layers:
            again = layer_is_recomputed(cfg.recompute, layer) or cfg.recompute.policy == "selective++"
            enters, enters_back = enters + (4 if again else 2), enters_back + 2
            # What leaves the feed-forward is not needed a second time, nor what leaves either of a parallel block.
            last = 0 if cfg.model.parallel_block else 1
            leaves, leaves_back = leaves + 2 + (last if again else 0), leaves_back + 2
    m = place.micros
    if place.sequence_parallel:
        sent["tp", "all_gather"] += m * shard * (enters + leaves_back)
        sent["tp", "reduce_scatter"] += m * shard * (leaves + enters_back)
    else:
        sent["tp", "all_reduce"] += m * (2 * stream * (tp - 1) // tp) * (leaves + enters_back)
    if any(part.head for part in place.parts.values()):
        if cfg.parallel.loss_parallel:
            pieces = [place.tokens]
            if cfg.train.loss_chunk:
                rows, seq = cfg.train.micro_batch, cfg.train.seq_len // place.layout.cp
                chunk = cfg.train.loss_chunk
                pieces = [rows * min(chunk, seq - at) for at in range(0, seq, chunk)]
            for n in pieces:
                sent["tp", "all_reduce"] += m * sum(2 * wide * k * n * (tp - 1) // tp for k in (1, 2))
        else:
            logits = place.tokens * cfg.model.vocab // tp * place.element
            sent["tp", "all_gather"] += m * logits * (tp - 1)
    for part in place.parts.values():
        flat = sum(owned(place, p) for p in place.parameters(part) if _partial(place, p))
        sent["tp", "all_reduce"] += 2 * wide * flat * (tp - 1) // tp


def _partial(place: Place, p: Held) -> bool:
    """Whether tp ranks compute parts of its gradient."""
    return p.norm in ("head", "router") or (place.sequence_parallel and p.norm == "stream")


def owned(place: Place, p: Held, *, padded: bool = False) -> int:
    """Elements of ``p`` that this rank holds, with ``padded`` those that make shards equal."""
    axis = "expert_fsdp" if p.expert and place.layout.ep > 1 else "fsdp"
    return p.numel if place.layout.size(axis) == 1 else place.shard(axis, p, padded=padded)  # type: ignore[arg-type]


def _context(place: Place, sent: Traffic) -> None:
    cfg, layout = place.cfg, place.layout
    size = AttentionSize(
        cfg.train.micro_batch,
        cfg.train.seq_len,
        cfg.model.n_heads // layout.tp,
        cfg.model.kv_heads // layout.tp,
        cfg.model.dim_per_head,
        place.element,
        4,
        cfg.model.sliding_window,
    )
    of = sent_bytes(place.context, size, layout.index("cp", place.rank))
    for part in place.parts.values():
        for layer in part.layers:
            again = layer_is_recomputed(cfg.recompute, layer) or cfg.recompute.policy == "selective"
            for op, n in of.forward.items():
                sent["cp", op] += place.micros * n * (2 if again else 1)
            for op, n in of.backward.items():
                sent["cp", op] += place.micros * n


def _pipeline(place: Place, sent: Traffic) -> None:
    """Hidden states to the next stage and their gradients to the one before, where another rank holds it."""
    schedule = place.schedule
    assert schedule is not None
    me = place.layout.index("pp", place.rank)
    for stage in place.parts:
        for other in (stage - 1, stage + 1):
            if 0 <= other < schedule.stages and schedule.rank_of(other) != me:
                sent["pp", "send"] += place.micros * place.stream_bytes
    if place.cfg.model.tied_embeddings:
        last = schedule.rank_of(schedule.stages - 1)
        if last != 0 and me in (0, last):
            (table,) = (
                p for part in place.parts.values() for p in place.parameters(part) if p.name == "embed"
            )
            sent["pp", "all_reduce"] += 4 * owned(place, table)  # 2 (n-1)/n of two ranks: all of it


def _sharded(place: Place, sent: Traffic) -> None:
    """Gathers for forward and, unless kept, for backward; one reduction, or one a micro-batch, and over the replicas one.
    With a pipeline as its program says."""
    cfg, layout = place.cfg, place.layout
    gathers = dict.fromkeys(place.parts, 0)
    reductions = place.micros if layout.reduces_each_micro_batch(cfg.parallel) else 1
    if layout.pp > 1 and place.layout.size("fsdp") > 1:
        assert place.schedule is not None
        program = programs(place.schedule, cfg.parallel.pipeline.gathered_stages)[
            layout.index("pp", place.rank)
        ]
        for instruction in program:
            if isinstance(instruction, Gather):
                gathers[instruction.stage] += 1
    for stage, part in place.parts.items():
        for kind, axis, params in place.units(part):
            n = layout.size(axis)  # type: ignore[arg-type]
            shard = sum(place.shard(axis, p, padded=True) for p in params)
            twice = kind != "root" and cfg.parallel.fsdp.reshard_after_forward
            times = gathers[stage] if layout.pp > 1 else place.micros * (2 if twice else 1)
            sent[axis, "all_gather"] += times * shard * place.element * (n - 1)
            sent[axis, "reduce_scatter"] += reductions * 4 * shard * (n - 1)
            r = layout.dp_replicate
            if r > 1:
                sent["dp_replicate", "all_reduce"] += 2 * 4 * shard * (r - 1) // r


def _replicated(place: Place, sent: Traffic) -> None:
    """Buckets of whole gradients, filled in reverse order."""
    r = place.layout.dp_replicate
    if r == 1:
        return
    for part in place.parts.values():
        size, sizes = 0, []
        for p in reversed(place.unsharded(part)):
            if size and size + 4 * p.numel > place.cfg.parallel.bucket_mb * 1e6:
                sizes.append(size)
                size = 0
            size += 4 * p.numel
        for whole in [*sizes, *([size] if size else [])]:
            sent["dp_replicate", "all_reduce"] += 2 * whole * (r - 1) // r


def is_routed(place: Place) -> bool:
    """Whether rows travel to experts: bytes that are left out."""
    return place.layout.ep > 1 and any(
        is_moe_layer(place.cfg.model, layer) for part in place.parts.values() for layer in part.layers
    )
