"""This rank's stages as one model: what `parallelize` gives without a pipeline."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

import torch
from torch import Tensor, nn

from trainsys.config.run import RunConfig
from trainsys.models.shards import ShardSpec
from trainsys.optim.local import Owned
from trainsys.parallel.mesh import Mesh
from trainsys.parallel.parallelize import DTYPES, parallelize
from trainsys.parallel.pipeline.runtime import Runtime
from trainsys.parallel.pipeline.stage import Inputs, Loss, ModelStage
from trainsys.parallel.pipeline.tied import NAME, TiedAcross, TiedWithin
from trainsys.parallel.pipeline.transport import Transport
from trainsys.schedules.actions import Schedule
from trainsys.schedules.build import build
from trainsys.schedules.partition import partition
from trainsys.schedules.program import programs
from trainsys.telemetry.recorder import Recorder


class PipelineModel:
    """``loss`` is applied to the logits of each micro-batch where the last stage is."""

    def __init__(self, cfg: RunConfig, mesh: Mesh, loss: Loss, recorder: Recorder) -> None:
        self.mesh = mesh
        self.schedule = schedule_of(cfg, mesh)
        parts = partition(cfg.model, self.schedule.stages, cfg.train.seq_len)
        me = mesh["pp"].index
        splits = self.schedule.splits_backward
        self.parts = {s: parallelize(cfg, mesh, parts[s]) for s in self.schedule.stages_of(me)}
        self.stages = {
            s: ModelStage(model, parts[s], loss, recorder, splits=splits) for s, model in self.parts.items()
        }
        # A middle rank may have neither end of the tie, and takes part in making the group all the same.
        self._tie = self._tied() if cfg.model.tied_embeddings else None
        self.shards: dict[str, ShardSpec] = {}
        self.owned: dict[str, Owned] = {}
        for model in self.parts.values():
            self.shards.update(model.shards)
            # The first copy of a tied embedding is the one that is updated.
            self.owned = {**model.owned, **self.owned}
        if isinstance(self._tie, TiedAcross):
            self._tie.weight.copies *= 2
        program = programs(self.schedule, cfg.parallel.pipeline.gathered_stages)[me]
        shape = _hidden_shape(cfg, mesh)
        dtype = DTYPES[cfg.train.dtype]
        transport = Transport(
            mesh["pp"],
            lambda: torch.empty(shape, dtype=dtype, device=mesh.device),
            overlap=cfg.parallel.overlap.pipeline,
        )
        self._runtime = Runtime(program, self.stages, self.schedule.stages, transport)

    def run(self, inputs: list[Inputs]) -> Tensor:
        """All micro-batches of a step forward and backward. The sum of what ``loss`` reported, 0 on other ranks."""
        for stage in self.stages.values():
            stage.begin(inputs)
        self._runtime.run()
        reported = [r for stage in self.stages.values() for r in stage.reported]
        return torch.stack(reported).sum() if reported else torch.zeros((), device=self.mesh.device)

    @property
    def cut(self):  # type: ignore[no-untyped-def]  # of its parts
        return next(iter(self.parts.values())).cut

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """By canonical name; a tied embedding that this rank holds twice comes once."""
        second = self._tie.second.param if isinstance(self._tie, TiedWithin) else None
        for name, p in chain.from_iterable(m.named_parameters() for m in self.parts.values()):
            if p is not second:
                yield name, p

    def zero_gradients(self) -> None:
        if self._tie is not None:
            self._tie.begin_step()
        for model in self.parts.values():
            model.zero_gradients()

    def finish_gradients(self) -> None:
        """After the last backward: all reductions are done."""
        for model in self.parts.values():
            model.finish_gradients()
        if self._tie is not None:
            self._tie.finish_gradients()

    def share_weights(self) -> None:
        for model in self.parts.values():
            model.share_weights()

    def _tied(self) -> TiedAcross | TiedWithin | None:
        last = self.schedule.rank_of(self.schedule.stages - 1)
        held = [model.owned[NAME] for model in self.parts.values() if NAME in model.owned]
        if last == 0:
            return TiedWithin(*held) if held else None
        others = [[i] for i in range(self.schedule.ranks) if i not in (0, last)]
        pair = self.mesh.subgroup("pp", [[0, last], *others])
        return TiedAcross(held[0], pair) if held else None


def schedule_of(cfg: RunConfig, mesh: Mesh) -> Schedule:
    """The schedule of a run: each data rank's micro-batches are the pipeline's."""
    layout, pipeline = mesh.layout, cfg.parallel.pipeline
    micros = cfg.train.global_batch // (layout.data_world * cfg.train.micro_batch)
    return build(pipeline.schedule, layout.pp, micros, pipeline.virtual_stages, pipeline.unit)


def _hidden_shape(cfg: RunConfig, mesh: Mesh) -> tuple[int, int, int]:
    """Shape of the activations that stages pass on: this rank's part of the sequence, ``[B, S, D]``."""
    parts = mesh["cp"].size * (mesh["tp"].size if cfg.parallel.sequence_parallel else 1)
    return cfg.train.micro_batch, cfg.train.seq_len // parts, cfg.model.d_model
