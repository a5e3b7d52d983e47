"""What a RUN.yaml says: one model per section, every field with its unit and its default."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from trainsys.config.base import Strict
from trainsys.config.engines import DeepSpeedConfig, EngineName, MegatronConfig
from trainsys.config.launch import LaunchConfig
from trainsys.config.model import ModelConfig


class FsdpConfig(Strict):
    reshard_after_forward: bool = Field(
        default=True, description="free gathered parameters after forward (ZeRO-3); false is ZeRO-2"
    )
    prefetch: NonNegativeInt = Field(default=1, description="how many units are gathered ahead of use")
    reduce_each_micro_batch: bool = Field(
        default=False,
        description="reduce-scatter gradients after every micro-batch and add up shards; false: add up whole fp32 "
        "gradients and reduce them once a step",
    )


class ShardConfig(Strict):
    """Over which ranks gradients and optimizer states are sharded: as parameters are, over dp_shard × cp, or over the
    replicas of dp_replicate as well; see docs/layouts.md."""

    grads: Literal["as_params", "over_replicas"] = Field(
        default="as_params",
        description="over_replicas: reduced after each micro-batch, and each replica keeps its piece",
    )
    optim: Literal["as_params", "over_replicas"] = Field(
        default="as_params",
        description="over_replicas: each replica updates its piece of the weights, and sends it to the others",
    )


class OverlapConfig(Strict):
    """What communicates while something else is computed. Prefetching of FSDP is fsdp.prefetch, chunks of experts'
    rows expert.chunks; see docs/overlap.md."""

    gradients: bool = Field(
        default=True, description="sum gradients over dp_replicate bucket by bucket during backward"
    )
    context: bool = Field(default=True, description="cp: compute one block while the next one's data travels")
    pipeline: bool = Field(default=True, description="pp: go on computing while what was made is being sent")
    tensor: bool = Field(
        default=False,
        description="tp: products in parts, around a ring, each while the next part of the sequence travels",
    )


class ContextConfig(Strict):
    """How the ranks of cp share one sequence; see docs/context-parallel.md."""

    flavour: Literal["ring", "all_gather", "pass_q", "ulysses", "two_d", "dist_flash", "token_ring"] = Field(
        default="ring", description="what moves: keys (ring, all_gather), queries (pass_q, token_ring), heads"
    )
    balance: Literal["zigzag", "contiguous"] | None = Field(
        default=None, description="which tokens a rank holds; None: what the flavour is made for"
    )
    head_degree: PositiveInt | None = Field(
        default=None, description="two_d: ranks that share heads; the other cp / head_degree form the ring"
    )
    inner_ring: PositiveInt | None = Field(
        default=None, description="two_d: ranks of an inner ring of the double ring; None: one ring"
    )
    placement: Literal["head_first", "context_first"] | None = Field(
        default=None, description="two_d: which of the two gets neighbouring ranks; None: head_first"
    )


class PipelineConfig(Strict):
    """In which order the ranks of pp work; see docs/pipeline-parallel.md. Micro-batches follow from the batch."""

    schedule: Literal["gpipe", "1f1b", "interleaved_1f1b", "zero_bubble", "zbv", "dualpipev", "blockwise"] = (
        "1f1b"
    )
    virtual_stages: PositiveInt | None = Field(
        default=None, description="stages a rank holds; None: as many as the schedule is made for"
    )
    unit: PositiveInt | None = Field(
        default=None,
        description="blockwise: micro-batches that pass a stage before the next one; None: 2 pp - 1",
    )
    gathered_stages: int = Field(
        default=2, ge=2, description="stages of a rank whose FSDP parameters are whole at the same time"
    )


class ExpertConfig(Strict):
    """How rows travel to the ranks of ep; see docs/expert-parallel.md."""

    dispatch: Literal["flat", "hierarchical"] = Field(
        default="flat", description="hierarchical: all-to-all inside nodes, then between them"
    )
    node_ranks: PositiveInt | None = Field(
        default=None, description="hierarchical: neighbouring ranks of ep that are on one node"
    )
    chunks: PositiveInt = Field(
        default=1, description="parts of a micro-batch that travel while another one is computed"
    )


class ParallelConfig(Strict):
    """Degrees of each axis. One of them may be -1: whatever is left of the world size."""

    pp: int = 1
    dp_replicate: int = 1
    dp_shard: int = -1
    cp: int = 1
    tp: int = 1
    ep: int = 1
    sequence_parallel: bool = Field(
        default=True, description="with tp > 1: norms and residual sharded along the sequence"
    )
    loss_parallel: bool = Field(
        default=True, description="with tp > 1: logits stay sharded over the vocabulary"
    )
    fsdp: FsdpConfig = FsdpConfig()
    shard: ShardConfig = ShardConfig()
    overlap: OverlapConfig = OverlapConfig()
    context: ContextConfig = ContextConfig()
    pipeline: PipelineConfig = PipelineConfig()
    expert: ExpertConfig = ExpertConfig()
    bucket_mb: PositiveFloat = Field(
        default=25.0, description="MB of gradients in one all-reduce of replicated data parallelism"
    )


class DataConfig(Strict):
    """Where text comes from. Every source gives the same batch for the same (seed, step)."""

    source: Literal["stdlib", "text", "jsonl", "parquet", "shards", "megatron", "hf", "synthetic"] = "stdlib"
    path: str | None = Field(
        default=None, description="file, folder, glob or prefix; for hf the dataset's name"
    )
    split: str = "train"
    text_key: str = Field(default="text", description="field of a jsonl record or parquet/hf column")
    tokenizer: str = Field(
        default="bytes", description="'bytes', or a tokenizer.json path or name (hf extra)"
    )
    packing: Literal["concat", "pad"] = Field(
        default="concat", description="concat: documents end to end, cut at seq_len; pad: one document a row"
    )
    document_mask: bool = Field(default=False, description="tokens attend only within their own document")
    document_length: PositiveInt | None = Field(
        default=None,
        description="tokens of a document that plan and dryrun count on under document_mask; none: as long as a row",
    )
    shuffle: bool = True
    cache_dir: str | None = None
    prefetch: NonNegativeInt = Field(
        default=2, description="steps prepared ahead by a background thread; 0: none"
    )

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        if self.source in ("stdlib", "synthetic") and self.path is not None:
            raise ValueError(f"source={self.source} reads no path, but path={self.path!r} is given; drop one")
        if self.source not in ("stdlib", "synthetic") and self.path is None:
            raise ValueError(f"source={self.source} needs data.path: a file, folder, glob, prefix or name")
        if self.document_length is not None and not self.document_mask:
            raise ValueError("document_length changes nothing without document_mask=true; set it, or drop the length")
        return self


Momentum = Annotated[float, Field(ge=0, lt=1)]


class OptimConfig(Strict):
    """AdamW (Loshchilov & Hutter 2019) with linear warm-up and a decay."""

    name: Literal["adamw"] = "adamw"
    lr: PositiveFloat = 3e-4
    min_lr_ratio: float = Field(default=0.1, ge=0, le=1, description="final lr as a share of lr")
    betas: tuple[Momentum, Momentum] = (0.9, 0.95)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = Field(
        default=0.1, description="on matrices only: norms, biases have none"
    )
    schedule: Literal["cosine", "wsd", "linear", "constant"] = "cosine"
    warmup_steps: NonNegativeInt = 0
    decay_steps: NonNegativeInt | None = Field(
        default=None, description="wsd: length of the final decay; None: a tenth of the run; 0: no decay"
    )
    clip_norm: NonNegativeFloat = Field(default=1.0, description="global gradient norm; 0: no clipping")
    z_loss: NonNegativeFloat = Field(default=0.0, description="coefficient of log(Z)^2 (PaLM, section 5)")


class RecomputeConfig(Strict):
    """Activation recomputation in backward."""

    policy: Literal["none", "selective", "selective++", "full", "every_n"] = Field(
        default="none",
        description="selective: attention; selective++: a block but its attention; full: all of each block",
    )
    every_n: PositiveInt = Field(default=2, description="policy every_n: recompute each n-th layer")
    stream_ffn: NonNegativeInt = Field(
        default=0, description="positions of a row the feed-forward works on at a time; 0: all at once"
    )
    stream_attention: NonNegativeInt = Field(
        default=0, description="queries of a row that attention works on at a time; 0: all at once"
    )


class TrainConfig(Strict):
    steps: PositiveInt = 100
    seq_len: PositiveInt = 2048
    global_batch: PositiveInt = Field(default=8, description="sequences per optimizer step over all ranks")
    micro_batch: PositiveInt = Field(default=1, description="sequences per forward on one data rank")
    seed: NonNegativeInt = 0
    init_from: str | None = Field(
        default=None,
        description="weights a new run starts from: a checkpoint, or a Hugging Face folder; None: seed",
    )
    dtype: Literal["fp32", "bf16"] = Field(
        default="bf16", description="compute dtype; master weights and reductions are fp32"
    )
    device: Literal["auto", "cpu", "cuda"] = "auto"
    loss_chunk: NonNegativeInt = Field(
        default=0, description="positions of a row whose logits exist at a time; 0: all at once"
    )
    compile: bool = Field(default=False, description="torch.compile, one block at a time")
    attention: Literal["auto", "flex"] = Field(
        default="auto",
        description="kernel; auto: torch's fused ones for the device; flex: flex_attention, on CUDA",
    )
    threads: NonNegativeInt = Field(default=0, le=4096, description="CPU threads a process; 0: cores / local ranks")


class WandbConfig(Strict):
    mode: Literal["off", "online", "offline"] = "off"
    project: str = "trainsys"
    entity: str | None = None
    group: str | None = None
    timeout_s: PositiveFloat = Field(
        default=10.0, description="longest wait for the server at init and at finish"
    )


class TelemetryConfig(Strict):
    out: str = Field(default="runs", description="folder that holds one folder a run")
    log_every: PositiveInt = 1
    capture_every: NonNegativeInt = Field(
        default=0,
        description="steps between profiler captures of one step, which refine the waterfall; 0: none",
    )
    console: Literal["auto", "live", "plain", "off"] = "auto"
    wandb: WandbConfig = WandbConfig()
    tensorboard: bool = False
    prometheus_port: NonNegativeInt = Field(default=0, description="0: no endpoint")
    prometheus_address: str = Field(
        default="127.0.0.1", description="that it listens on; 0.0.0.0: every interface of rank 0's host"
    )


class CheckpointConfig(Strict):
    """When and where the run's state is saved, and from where it goes on; see docs/checkpoint.md."""

    every: NonNegativeInt = Field(
        default=1000, description="steps between saves, the last step always included; 0: every_minutes alone"
    )
    every_minutes: NonNegativeFloat = Field(
        default=30.0,
        description="longest time between saves; 0: every alone. Both 0: saves only when asked to stop",
    )
    folder: str | None = Field(
        default=None, description="holds this run's checkpoints; None: <telemetry.out>/checkpoints/<name>"
    )
    mode: Literal["async", "sync"] = Field(
        default="async", description="async: a step waits for a copy in memory, and the disk is behind"
    )
    keep_last: PositiveInt = Field(
        default=3,
        description="newest healthy ones that stay; the newest one stays beside them until it is proven",
    )
    keep_every: NonNegativeInt = Field(
        default=0, description="steps; healthy checkpoints at multiples of it stay; 0: none"
    )
    keep_best: NonNegativeInt = Field(default=0, description="how many healthy ones of the lowest loss stay")
    local_dir: str | None = Field(
        default=None, description="a node's own disk: written there first, then copied to folder"
    )
    memory_every: NonNegativeInt = Field(
        default=0, description="steps between copies in the memory of two nodes; 0: none"
    )
    memory_dir: str = Field(default="/dev/shm", description="memory file system for these copies")
    resume: str = Field(
        default="auto",
        description="auto: the newest good one in folder; never; or the path of one, where folder has none newer",
    )
    changed_data: bool = Field(
        default=False, description="go on although the data or its order is not the checkpoint's"
    )


class ResilienceConfig(Strict):
    """What happens when something goes wrong; see docs/faults.md."""

    grace_s: PositiveFloat = Field(
        default=60.0, description="seconds from SIGTERM or SIGUSR1 until the process must be gone"
    )
    hang_timeout_s: NonNegativeFloat = Field(
        default=300.0, description="longest step before the watchdog dumps and aborts; 0: no watchdog"
    )
    setup_timeout_s: PositiveFloat = Field(
        default=1800.0, description="the same for all before the first step's end (compilation)"
    )
    nonfinite: Literal["skip", "rollback", "stop"] = Field(
        default="skip", description="what a loss or gradient norm that is no number leads to"
    )
    spike: NonNegativeFloat = Field(
        default=0.0, description="a loss this many robust deviations above the recent median spikes; 0: off"
    )
    on_spike: Literal["skip", "rollback", "stop"] = "skip"
    max_anomalies: PositiveInt = Field(
        default=10, description="this many within window steps end the run: it diverges"
    )
    window: PositiveInt = Field(default=64, description="losses that a spike is measured against")
    max_restarts: NonNegativeInt = Field(
        default=0,
        description="failures in a row, with no newer step saved in between, after which launch --on local starts all "
        "ranks again",
    )
    elastic: bool = Field(
        default=False, description="where the layout does not fit the world, take the nearest that does"
    )


class RunConfig(Strict):
    """One training run, whole."""

    name: str = Field(default="run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    engine: EngineName = "native"
    hardware: str | None = Field(default=None, description="catalogue name; None: detected")
    model: ModelConfig
    parallel: ParallelConfig = ParallelConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    recompute: RecomputeConfig = RecomputeConfig()
    train: TrainConfig = TrainConfig()
    telemetry: TelemetryConfig = TelemetryConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    resilience: ResilienceConfig = ResilienceConfig()
    launch: LaunchConfig = LaunchConfig()
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()
    megatron: MegatronConfig = MegatronConfig()

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        if self.train.seq_len > self.model.max_seq_len:
            raise ValueError(
                f"train.seq_len={self.train.seq_len} is longer than "
                f"model.max_seq_len={self.model.max_seq_len}"
            )
        if self.train.init_from is not None and self.checkpoint.resume not in ("auto", "never"):
            raise ValueError(
                f"train.init_from={self.train.init_from} starts a new run and checkpoint.resume={self.checkpoint.resume} "
                "goes on with one; drop one of the two"
            )
        return self

    @property
    def saves(self) -> bool:
        """Whether the run saves without being asked to stop."""
        return bool(self.checkpoint.every or self.checkpoint.every_minutes)

    @property
    def checkpoint_folder(self) -> str:
        return self.checkpoint.folder or f"{self.telemetry.out}/checkpoints/{self.name}"
