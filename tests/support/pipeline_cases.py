"""The cases of the pipeline tests: a schedule, a layout, a small model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from trainsys.config.model import ModelConfig
from trainsys.config.run import (
    DataConfig,
    OptimConfig,
    ParallelConfig,
    PipelineConfig,
    RecomputeConfig,
    RunConfig,
    TrainConfig,
)

# Every trait that cutting could get wrong: grouped heads, norms of queries and keys, an odd vocabulary.
MODEL: dict[str, Any] = {
    "n_layers": 4, "d_model": 32, "n_heads": 4, "n_kv_heads": 2, "d_ff": 64, "vocab": 72, "max_seq_len": 64,
    "qk_norm": True, "init_std": 0.1,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    schedule: str
    pp: int
    other: dict[str, Any] = field(default_factory=dict)
    pipeline: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    recompute: str = "none"
    train: dict[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> str:
        said = {**self.other, **self.pipeline, **self.model, **self.train}
        parts = [f"{self.schedule}-pp{self.pp}", *(f"{k}{v}" for k, v in said.items())]
        return "-".join(parts + [self.recompute] * (self.recompute != "none"))

    @property
    def config(self) -> RunConfig:
        train = {
            "seq_len": 16,
            "global_batch": 8,
            "dtype": "fp32",
            "device": "cpu",
            "steps": 10,
            **self.train,
        }
        return RunConfig(
            model=ModelConfig(**{**MODEL, **self.model}),
            parallel=ParallelConfig(
                pp=self.pp,
                **{"dp_shard": 1, **self.other},
                pipeline=PipelineConfig(schedule=self.schedule, **self.pipeline),  # type: ignore[arg-type]
            ),
            data=DataConfig(source="synthetic", prefetch=0),
            optim=OptimConfig(lr=2e-3, warmup_steps=2, z_loss=1e-3),
            recompute=RecomputeConfig(policy=self.recompute),  # type: ignore[arg-type]
            train=TrainConfig(**train),
        )

    @property
    def world(self) -> int:
        sizes = [
            size for axis, size in self.other.items() if axis in ("dp_replicate", "dp_shard", "cp", "tp")
        ]
        world = self.pp
        for size in sizes:
            world *= size
        return world

    @property
    def axes(self) -> tuple[str, ...]:
        names = {"dp_replicate": "dp_replicate", "dp_shard": "fsdp", "cp": "cp", "tp": "tp"}
        return ("pp", *(names[axis] for axis in self.other if axis in names))


FSDP, DDP, TP, PLAIN_TP = (
    {"dp_shard": 2}, {"dp_replicate": 2}, {"tp": 2}, {"tp": 2, "sequence_parallel": False},
)  # fmt: skip
TIED = {"tied_embeddings": True}
EIGHT = {"n_layers": 8}
