"""What each pipeline stage has to compute by the run's own config: what is uneven by design is no device's fault."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trainsys.config.run import RunConfig
from trainsys.flops.counts import layer_is_recomputed
from trainsys.profiler.steps import Floats
from trainsys.schedules.build import stages_per_rank
from trainsys.schedules.partition import layer_flops, partition


@dataclass(frozen=True)
class StageWork:
    """FLOPs of a token on each stage [pp], forward, backward and repeated layers, over their mean; and its layers."""

    share: Floats
    layers: tuple[int, ...]


def stage_work(cfg: RunConfig | None, stages: int) -> StageWork | None:
    """None where there is no config or no pipeline, and where a rank holds several stages."""
    if cfg is None or stages < 2 or stages > cfg.model.n_layers:
        return None
    if stages_per_rank(cfg.parallel.pipeline.schedule, cfg.parallel.pipeline.virtual_stages) != 1:
        return None
    layers, head = layer_flops(cfg.model, cfg.train.seq_len)
    parts = partition(cfg.model, stages, cfg.train.seq_len)
    repeated = [layer_is_recomputed(cfg.recompute, i) for i in range(cfg.model.n_layers)]
    flops = np.array(
        [sum((3.0 + repeated[i]) * layers[i] for i in p.layers) + 3.0 * head * p.head for p in parts]
    )
    return StageWork(flops / flops.mean(), tuple(len(p.layers) for p in parts))
