"""DeepSpeed's pipeline of our stages: its PipelineModule, its 1F1B, its sends.

A stage is one layer of its module: the decoder with the layers that `schedules.partition` gives the stage, so that
stages are the same in every engine. Positions and documents do not travel with activations: every stage reads its rows.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import deepspeed
import torch
from deepspeed.pipe import LayerSpec, PipelineModule
from deepspeed.runtime.pipe import p2p, schedule
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import Tensor, nn

from trainsys.config.run import RunConfig
from trainsys.data.packing import Batch
from trainsys.engines.deepspeed.build import Ask, Built
from trainsys.engines.deepspeed.model import build_model, materialise, tell_tensor_parallel
from trainsys.models.shards import ShardSpec
from trainsys.parallel.mesh import Mesh
from trainsys.parallel.pipeline.stage import Inputs
from trainsys.schedules.partition import StagePart, partition
from trainsys.telemetry.recorder import Recorder

PHASES = {
    schedule.LoadMicroBatch: "data",
    schedule.ForwardPass: "forward",
    schedule.BackwardPass: "backward",
    schedule.ReduceGrads: "backward",
    schedule.ReduceTiedGrads: "backward",
    schedule.OptimizerStep: "optimizer",
}


class Stage(nn.Module):
    """From tokens, or what the stage before made, to hidden states or logits."""

    def __init__(self, cfg: RunConfig, mesh: Mesh, part: StagePart, rows: deque[Inputs]) -> None:
        super().__init__()
        self.decoder, self.shards = build_model(cfg, mesh, float(mesh.layout.data_world), part)
        self.rows = rows
        materialise(self.decoder, mesh.device)
        tell_tensor_parallel(self.decoder, self.shards, mesh, cfg)
        for p in self.decoder.parameters():
            # To DeepSpeed all stages are model ranks; it counts in norms what is marked, or its first rank's.
            p.model_parallel = getattr(p, "model_parallel", False) or mesh["tp"].index == 0  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        # Forwards come in the order of micro-batches on every stage.
        inputs = self.rows.popleft()
        out: Tensor = self.decoder(x, inputs.positions, inputs.docs)
        return out


class BuiltPipeline(Built):
    """``rows``: where stages find the micro-batches of a step."""

    def __init__(
        self, cfg: RunConfig, mesh: Mesh, recorder: Recorder, module: PipelineModule, rows: deque[Inputs],
        ds_settings: dict[str, Any],
    ) -> None:  # fmt: skip
        stage: Stage = module.forward_funcs[0]
        shards: dict[str, ShardSpec] = stage.shards
        names = {p: name for name, p in stage.decoder.named_parameters()}
        super().__init__(cfg, mesh, recorder, module, stage.decoder, shards, names, ds_settings, None)
        module.loss_fn = self._micro_loss
        self._rows = rows
        self._nll = torch.zeros((), device=mesh.device)
        self._tokens = 1
        self._ask: Ask = lambda nll: None
        self.ds._INSTRUCTION_MAP = {
            kind: self._in_phase(PHASES.get(kind), call) for kind, call in self.ds._INSTRUCTION_MAP.items()
        }

    def _in_phase(self, name: str | None, call: Callable[..., None]) -> Callable[..., None]:
        if name is None:  # sends and receives, which are collectives
            return call

        def instruction(engine: Any, *args: Any, **kwargs: Any) -> None:
            with self.phase(name):
                if name == "optimizer":
                    self._ask(self._nll)
                call(engine, *args, **kwargs)

        return instruction

    def _micro_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        loss, nll = self.loss(logits, labels)
        self._nll += nll
        # It divides by the number of micro-batches.
        scale = self.grad_scale * self.ds.gradient_accumulation_steps() / self._tokens
        return loss * scale

    def run(self, batches: Sequence[Batch], tokens: int, ask: Ask) -> None:
        self._rows.clear()
        self._rows.extend(self.inputs(batch) for batch in batches)
        self._nll.zero_()
        self._tokens, self._ask = tokens, ask
        self.ds.train_batch(iter([(i.tokens, i.labels) for i in self._rows]))


class _InGroup:
    """``deepspeed.comm`` for its transfers between stages: within ``group``, where it would use the world's, so that
    they are told apart from those of other axes."""

    def __init__(self, group: Any) -> None:
        self._group = group

    def send(self, tensor: Tensor, rank: int) -> Any:
        return deepspeed.comm.send(tensor, rank, group=self._group)

    def recv(self, tensor: Tensor, rank: int) -> Any:
        return deepspeed.comm.recv(tensor, rank, group=self._group)


def build_pipeline(cfg: RunConfig, mesh: Mesh, recorder: Recorder, ds_settings: dict[str, Any]) -> Built:
    """Every rank must call it."""
    layout = mesh.layout
    rows: deque[Inputs] = deque()
    parts = partition(cfg.model, layout.pp, cfg.train.seq_len)
    # Its order of ranks is ours: pipeline outermost, tensor slices innermost.
    topology = PipeModelDataParallelTopology(num_pp=layout.pp, num_dp=layout.data_world, num_mp=layout.tp)
    p2p.dist = _InGroup(mesh["pp"].group)
    module = PipelineModule(
        [LayerSpec(Stage, cfg, mesh, part, rows) for part in parts],
        topology=topology,
        partition_method="uniform",
    )
    return BuiltPipeline(cfg, mesh, recorder, module, rows, ds_settings)
