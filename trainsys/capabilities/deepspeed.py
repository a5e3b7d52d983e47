"""What DeepSpeed can't run, and which ZeRO stage a run is. Seen with DeepSpeed 0.19."""

from __future__ import annotations

from trainsys.capabilities.base import Limit
from trainsys.config.run import RunConfig
from trainsys.layout import Layout


def zero_stage(cfg: RunConfig, layout: Layout) -> int:
    """The stage of ZeRO: as asked, or else what the layout's own data parallelism amounts to."""
    if cfg.deepspeed.zero_stage is not None:
        return cfg.deepspeed.zero_stage
    if layout.dp_replicate > 1 or (layout.dp_shard * layout.cp == 1 and cfg.deepspeed.offload == "none"):
        return over_replicas(cfg)
    if layout.pp > 1:
        return 1
    return 3 if cfg.parallel.fsdp.reshard_after_forward else 2


def over_replicas(cfg: RunConfig) -> int:
    """The stage that ``parallel.shard`` asks of the ranks of dp_replicate."""
    shard = cfg.parallel.shard
    return 2 if shard.grads == "over_replicas" else 1 if shard.optim == "over_replicas" else 0


_PP = {"parallel.pp": 2}
_CP = {"parallel.cp": 2, "parallel.context.flavour": "ulysses"}

DEEPSPEED: tuple[Limit, ...] = (
    Limit(
        "dp_replicate with dp_shard",
        lambda cfg, layout: layout.dp_replicate > 1 and layout.dp_shard > 1,
        "ZeRO shards over all data ranks; one of the two must be 1, or engine=native",
        {"parallel.dp_replicate": 2, "parallel.dp_shard": 2},
    ),
    Limit(
        "deepspeed.zero_stage with dp_replicate",
        lambda cfg, layout: (
            layout.dp_replicate > 1
            and layout.dp_shard == 1
            and cfg.deepspeed.zero_stage not in (None, over_replicas(cfg))
        ),
        "what replicas share out is what parallel.shard says; write the ranks as parallel.dp_shard, or leave zero_stage",
        {"parallel.dp_replicate": 2, "deepspeed.zero_stage": 3},
    ),
    Limit(
        "deepspeed.zero_stage=0 with dp_shard",
        lambda cfg, layout: layout.dp_shard > 1 and cfg.deepspeed.zero_stage == 0,
        "stage 0 shards nothing; write the ranks as parallel.dp_replicate, or take stage 1, 2 or 3",
        {"parallel.dp_shard": 2, "deepspeed.zero_stage": 0},
    ),
    Limit(
        "deepspeed.offload without ZeRO",
        lambda cfg, layout: cfg.deepspeed.offload != "none" and zero_stage(cfg, layout) == 0,
        "what is offloaded is ZeRO's; write the ranks as parallel.dp_shard, or deepspeed.offload=none",
        {"parallel.dp_replicate": 2, "deepspeed.offload": "optimizer"},
    ),
    Limit(
        "deepspeed.offload=all without ZeRO 3",
        lambda cfg, layout: cfg.deepspeed.offload == "all" and zero_stage(cfg, layout) in (1, 2),
        "parameters are offloaded where they are sharded; set deepspeed.zero_stage=3, or deepspeed.offload=optimizer",
        {"parallel.dp_shard": 2, "deepspeed.zero_stage": 2, "deepspeed.offload": "all"},
    ),
    Limit(
        "pp with ZeRO 2 or 3",
        lambda cfg, layout: layout.pp > 1 and zero_stage(cfg, layout) > 1,
        "its pipeline takes stages 0 and 1; set deepspeed.zero_stage=1, or parallel.pp=1",
        {**_PP, "parallel.dp_shard": 2, "deepspeed.zero_stage": 2},
    ),
    Limit(
        "pp with deepspeed.offload",
        lambda cfg, layout: layout.pp > 1 and cfg.deepspeed.offload == "optimizer",
        "its pipeline does not bring gradients to where offload looks for them; deepspeed.offload=none, or parallel.pp=1",
        {**_PP, "parallel.dp_shard": 2, "deepspeed.offload": "optimizer"},
    ),
    Limit(
        "pp with cp",
        lambda cfg, layout: layout.pp > 1 and layout.cp > 1,
        "its pipeline knows no ranks that share a sequence; one of the two must be 1, or engine=native",
        {**_PP, **_CP},
    ),
    Limit(
        "other pipeline schedules",
        lambda cfg, layout: (
            layout.pp > 1
            and (cfg.parallel.pipeline.schedule != "1f1b" or (cfg.parallel.pipeline.virtual_stages or 1) > 1)
        ),
        "its pipeline runs 1f1b with one stage a rank; parallel.pipeline.schedule=1f1b, or engine=native",
        {**_PP, "parallel.pipeline.schedule": "zero_bubble"},
    ),
    Limit(
        "pp with tied embeddings",
        lambda cfg, layout: layout.pp > 1 and cfg.model.tied_embeddings,
        "it ties whole layers of its pipeline, and a stage is one layer here; parallel.pp=1, or engine=native",
        {**_PP, "model.tied_embeddings": True},
    ),
    Limit(
        "other flavours of cp",
        lambda cfg, layout: layout.cp > 1 and cfg.parallel.context.flavour != "ulysses",
        "its sequence parallelism is Ulysses; parallel.context.flavour=ulysses, or engine=native",
        {"parallel.cp": 2},
    ),
    Limit(
        "expert parallelism",
        lambda cfg, layout: layout.ep > 1,
        "its expert layer drops tokens over a capacity, which is another answer; parallel.ep=1, where ZeRO shards the "
        "experts, or engine=native",
        {
            "parallel.dp_shard": 2, "parallel.ep": 2,
            "model.moe.n_experts": 4, "model.moe.top_k": 2, "model.moe.d_ff": 64,
        },
    ),
    Limit(
        "train.compile",
        lambda cfg, layout: cfg.train.compile,
        "blocks compiled by themselves were not tried under its hooks; train.compile=false, or engine=native",
        {"train.compile": True},
    ),
    Limit(
        "train.loss_chunk with ZeRO 3",
        lambda cfg, layout: cfg.train.loss_chunk > 0 and zero_stage(cfg, layout) == 3,
        "the loss multiplies by the head's weight, which stage 3 gathers for the head alone; train.loss_chunk=0, or "
        "deepspeed.zero_stage=2",
        {"parallel.dp_shard": 2, "train.loss_chunk": 16},
    ),
    Limit(
        "other kernels of attention",
        lambda cfg, layout: cfg.train.attention != "auto",
        "they were not tried under its hooks; train.attention=auto, or engine=native",
        {"train.attention": "flex"},
    ),
    Limit(
        "recompute.policy=selective++ with cp",
        lambda cfg, layout: layout.cp > 1 and cfg.recompute.policy == "selective++",
        "it keeps results of our attention, and here attention is its own; recompute.policy=selective, or engine=native",
        {**_CP, "recompute.policy": "selective++"},
    ),
    Limit(
        "streamed layers",
        lambda cfg, layout: bool(cfg.recompute.stream_ffn or cfg.recompute.stream_attention),
        "layers that run again piece by piece inside backward were not tried under its hooks; recompute.stream_ffn=0 and "
        "recompute.stream_attention=0, or engine=native",
        {"recompute.stream_ffn": 8},
    ),
    Limit(
        "parallel.overlap.tensor",
        lambda cfg, layout: layout.tp > 1 and cfg.parallel.overlap.tensor,
        "products around a ring were not tried under its hooks; parallel.overlap.tensor=false, or engine=native",
        {"parallel.tp": 2, "parallel.overlap.tensor": True},
    ),
)  # fmt: skip
