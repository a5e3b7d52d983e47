"""What Megatron-Core can't run, and what of it we do not drive."""

from __future__ import annotations

from collections.abc import Callable

from trainsys.capabilities.base import Limit
from trainsys.config.model import MoEConfig
from trainsys.config.run import FsdpConfig, RunConfig, ShardConfig
from trainsys.layout import Layout
from trainsys.schedules.build import stages_per_rank

SCHEDULES = ("1f1b", "interleaved_1f1b")
_MOE = {"model.moe.n_experts": 4, "model.moe.top_k": 2, "model.moe.d_ff": 64}


def stages(cfg: RunConfig, layout: Layout) -> int:
    """Pipeline stages over all ranks; 1 without a pipeline."""
    pipeline = cfg.parallel.pipeline
    if layout.pp == 1:
        return 1
    return layout.pp * stages_per_rank(pipeline.schedule, pipeline.virtual_stages)


def _moe(hit: Callable[[MoEConfig], bool]) -> Callable[[RunConfig, Layout], bool]:
    return lambda cfg, layout: cfg.model.moe is not None and hit(cfg.model.moe)


def _groups_differ(moe: MoEConfig) -> bool:
    """It ranks groups of experts by their best ``top_k / top_groups`` logits, we by their best two scores."""
    if moe.n_groups == 1:
        return False
    best = min(2, moe.n_experts // moe.n_groups)
    return moe.score != "sigmoid" or moe.top_k // moe.top_groups != best


MEGATRON: tuple[Limit, ...] = (
    Limit(
        "parallel blocks",
        lambda cfg, layout: cfg.model.parallel_block,
        "its layers are serial; model.parallel_block=false, or engine=native",
        {"model.parallel_block": True},
    ),
    Limit(
        "other pipeline schedules",
        lambda cfg, layout: layout.pp > 1 and cfg.parallel.pipeline.schedule not in SCHEDULES,
        "it has 1f1b and interleaved_1f1b; set parallel.pipeline.schedule to one of them",
        {"parallel.pp": 2, "parallel.pipeline.schedule": "zero_bubble"},
    ),
    Limit(
        "stages of unequal length",
        lambda cfg, layout: (
            cfg.parallel.pipeline.schedule in SCHEDULES and cfg.model.n_layers % stages(cfg, layout) != 0
        ),
        "each stage has equally many layers; take a parallel.pp (times virtual stages) that divides model.n_layers",
        {"parallel.pp": 5},
    ),
    Limit(
        "two ranks that interleave without overlap",
        lambda cfg, layout: (
            layout.pp == 2
            and cfg.parallel.pipeline.schedule == "interleaved_1f1b"
            and not cfg.parallel.overlap.pipeline
        ),
        "both neighbours are the same rank, and messages of one batch would be taken for each other; "
        "set parallel.overlap.pipeline=true, or parallel.pp to more than 2",
        {
            "parallel.pp": 2,
            "parallel.pipeline.schedule": "interleaved_1f1b",
            "parallel.overlap.pipeline": False,
        },
    ),
    Limit(
        "a tied embedding in a pipeline with a sharded optimizer",
        lambda cfg, layout: (
            layout.pp > 1
            and cfg.model.tied_embeddings
            and cfg.megatron.distributed_optimizer
            and layout.dp_shard * layout.cp > 1
        ),
        "the two copies' optimizer states are cut at different places, which no checkpoint of ours can say; "
        "set megatron.distributed_optimizer=false or parallel.pp=1",
        {"parallel.pp": 2, "parallel.dp_shard": 2, "model.tied_embeddings": True},
    ),
    Limit(
        "whole logits",
        lambda cfg, layout: layout.tp > 1 and not cfg.parallel.loss_parallel,
        "its loss is always split over the vocabulary; leave out parallel.loss_parallel=false, the loss is the same",
        {"parallel.tp": 2, "parallel.loss_parallel": False},
    ),
    Limit(
        "FSDP's settings",
        lambda cfg, layout: cfg.parallel.fsdp != FsdpConfig(),
        "it shards optimizer states (megatron.distributed_optimizer) and no parameters; leave out parallel.fsdp",
        {"parallel.fsdp.reshard_after_forward": False},
    ),
    Limit(
        "sharding over replicas",
        lambda cfg, layout: cfg.parallel.shard != ShardConfig(),
        "it shards optimizer states over dp_shard × cp; move ranks from parallel.dp_replicate to parallel.dp_shard",
        {"parallel.dp_replicate": 2, "parallel.shard.optim": "over_replicas"},
    ),
    Limit(
        "rings of tensor parallelism",
        lambda cfg, layout: cfg.parallel.overlap.tensor,
        "its overlap of tensor parallelism is Transformer Engine's, which is not driven here; "
        "parallel.overlap.tensor=false",
        {"parallel.tp": 2, "parallel.overlap.tensor": True},
    ),
    Limit(
        "compilation",
        lambda cfg, layout: cfg.train.compile,
        "it brings its own fused kernels; train.compile=false",
        {"train.compile": True},
    ),
    Limit(
        "other recomputation",
        lambda cfg, layout: cfg.recompute.policy not in ("none", "selective", "full"),
        "it recomputes attention or whole layers; recompute.policy=selective or full",
        {"recompute.policy": "every_n"},
    ),
    Limit(
        "other kernels of attention",
        lambda cfg, layout: cfg.train.attention != "auto",
        "they were not tried under its layers; train.attention=auto, or engine=native",
        {"train.attention": "flex"},
    ),
    Limit(
        "streamed layers",
        lambda cfg, layout: bool(cfg.recompute.stream_ffn or cfg.recompute.stream_attention),
        "it computes whole rows; leave out recompute.stream_ffn and recompute.stream_attention, or engine=native",
        {"recompute.stream_ffn": 16},
    ),
    Limit(
        "logits in chunks",
        lambda cfg, layout: cfg.train.loss_chunk > 0,
        "its output layer makes all logits of a micro-batch; train.loss_chunk=0, and a smaller train.micro_batch",
        {"train.loss_chunk": 16},
    ),
    Limit(
        "experts under tensor parallelism without sequence parallelism",
        lambda cfg, layout: (
            cfg.model.moe is not None and layout.tp > 1 and not cfg.parallel.sequence_parallel
        ),
        "its router would count every token once a rank; set parallel.sequence_parallel=true",
        {**_MOE, "parallel.tp": 2, "parallel.sequence_parallel": False},
    ),
    Limit(
        "experts under tensor and expert parallelism on CPU",
        lambda cfg, layout: (
            cfg.model.moe is not None and layout.tp > 1 and layout.ep > 1 and cfg.train.device == "cpu"
        ),
        "ranks of tp gather each other's rows, as many as each has, and gloo gathers equally many alone; "
        "parallel.tp=1 or parallel.ep=1",
        {**_MOE, "parallel.dp_shard": 2, "parallel.tp": 2, "parallel.ep": 2, "train.device": "cpu"},
    ),
    Limit(
        "other ways to experts",
        lambda cfg, layout: cfg.parallel.expert.dispatch != "flat" or cfg.parallel.expert.chunks != 1,
        "rows travel by one all-to-all; parallel.expert.dispatch=flat and chunks=1",
        {**_MOE, "parallel.dp_shard": 2, "parallel.ep": 2, "parallel.expert.chunks": 2},
    ),
    Limit(
        "capacity of a row",
        _moe(lambda moe: moe.capacity_factor is not None),
        "its capacity is of a whole micro-batch and keeps the likeliest, so the layout would change the answer; "
        "leave out model.moe.capacity_factor",
        {**_MOE, "model.moe.capacity_factor": 1.5},
    ),
    Limit(
        "sigmoid scores as they are",
        _moe(lambda moe: moe.score == "sigmoid" and not moe.norm_topk and moe.top_k > 1),
        "it always normalises them over the chosen experts; model.moe.norm_topk=true",
        {**_MOE, "model.moe.score": "sigmoid", "model.moe.norm_topk": False},
    ),
    Limit(
        "one expert of normalised softmax",
        _moe(lambda moe: moe.score == "softmax" and moe.norm_topk and moe.top_k == 1),
        "the only gate would be 1 and the router learn nothing, which it refuses; model.moe.norm_topk=false",
        {**_MOE, "model.moe.top_k": 1},
    ),
    Limit(
        "balance by bias of softmax scores",
        _moe(lambda moe: moe.balance == "bias" and moe.score != "sigmoid"),
        "it has expert biases for sigmoid scores; model.moe.score=sigmoid, or balance=aux_loss",
        {**_MOE, "model.moe.balance": "bias"},
    ),
    Limit(
        "other groups of experts",
        _moe(_groups_differ),
        "it ranks groups by their top_k / top_groups best, which is our two only for sigmoid scores and two experts a "
        "group; model.moe.n_groups=1",
        {**_MOE, "model.moe.n_groups": 2, "model.moe.top_groups": 1},
    ),
)
