"""What will run, but hardly as meant."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

from trainsys.config.model import ModelConfig
from trainsys.config.run import (
    ContextConfig,
    ExpertConfig,
    FsdpConfig,
    ParallelConfig,
    PipelineConfig,
    ShardConfig,
    TrainConfig,
)
from trainsys.layout.words import divisors, listed
from trainsys.schedules.build import stages_per_rank
from trainsys.schedules.partition import imbalance

if TYPE_CHECKING:
    from trainsys.layout.axes import Layout

EVEN_ENOUGH = 0.02  # a slowest stage's work above the mean that is not worth a warning


class Cluster(Protocol):
    """What validation needs to know of a cluster."""

    @property
    def gpus_per_node(self) -> int: ...


def warnings(
    layout: Layout,
    model: ModelConfig,
    train: TrainConfig,
    parallel: ParallelConfig,
    cluster: Cluster | None = None,
) -> Iterator[str]:
    """One line each."""
    yield from _idle_sections(layout, model, parallel)
    yield from _placement(layout, cluster)
    yield from _pipeline(layout, model, train, parallel)


def _idle_sections(layout: Layout, model: ModelConfig, parallel: ParallelConfig) -> Iterator[str]:
    if layout.cp == 1 and parallel.context != ContextConfig():
        yield "parallel.context is set but parallel.cp=1: there is no context parallelism to configure"
    if layout.ep == 1 and parallel.expert != ExpertConfig():
        yield "parallel.expert is set but parallel.ep=1: every rank holds all experts and no row travels"
    if layout.dp_replicate == 1 and parallel.shard != ShardConfig():
        yield "parallel.shard is set but parallel.dp_replicate=1: there are no replicas to shard over"
    if layout.tp == 1 and parallel.overlap.tensor:
        yield "parallel.overlap.tensor is set but parallel.tp=1: there is no tensor parallelism to overlap"
    if model.moe is not None and model.moe.top_k == 1 and model.moe.norm_topk:
        yield (
            "model.moe.top_k=1 with norm_topk=true: the one gate is always 1, so the router learns from balancing "
            "alone; set norm_topk=false"
        )


def _placement(layout: Layout, cluster: Cluster | None) -> Iterator[str]:
    if cluster is not None and layout.tp > 1:
        node = cluster.gpus_per_node
        if layout.tp > node:
            yield (
                f"parallel.tp={layout.tp} is more than the {node} devices of a node: "
                f"tensor parallelism will cross the slower network; tp up to {node} stays inside"
            )
        elif node % layout.tp:
            yield (
                f"parallel.tp={layout.tp} does not divide the {node} devices of a node: some tensor-parallel "
                f"groups span two nodes; tp of {listed(divisors(node))} stays inside"
            )


def _pipeline(
    layout: Layout, model: ModelConfig, train: TrainConfig, parallel: ParallelConfig
) -> Iterator[str]:
    pipeline = parallel.pipeline
    if layout.pp == 1:
        if pipeline != PipelineConfig():
            yield "parallel.pipeline is set but parallel.pp=1: there is no pipeline to configure"
        return
    if layout.dp_shard * layout.cp > 1 and parallel.fsdp != FsdpConfig():
        yield (
            "parallel.fsdp is set but a pipeline gathers parameters by its schedule, and reduces gradients once: "
            "parallel.pipeline.gathered_stages says how many stages are whole at once"
        )
    virtual = stages_per_rank(pipeline.schedule, pipeline.virtual_stages)
    stages = layout.pp * virtual
    if model.n_layers % stages and (above := imbalance(model, stages, train.seq_len)) > EVEN_ENOUGH:
        each = f" × {virtual} virtual stages a rank" if virtual > 1 else ""
        yield (
            f"model.n_layers={model.n_layers} does not divide by parallel.pp={layout.pp}{each}: "
            f"some stages hold one layer more, {100 * above:.0f}% of work above the mean, and the others wait for them"
        )
    micros = train.global_batch // (layout.data_world * train.micro_batch)
    if micros < layout.pp:
        yield (
            f"{micros} micro-batches per step are fewer than parallel.pp={layout.pp} ranks: most of them wait most "
            f"of the time; raise train.global_batch or lower train.micro_batch"
        )
