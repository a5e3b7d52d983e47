"""The DeepSpeed engine: one step of our model under ``deepspeed.initialize``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainsys.comm import ops
from trainsys.config.run import RunConfig
from trainsys.data.loader import StepData
from trainsys.engines.base import Judge, LocalTensor, StepResult
from trainsys.engines.deepspeed.environment import prepare, quiet
from trainsys.engines.observed import observe
from trainsys.models.shards import ShardSpec
from trainsys.optim.adamw import MOMENTS
from trainsys.optim.schedule import learning_rate
from trainsys.parallel.context.core import SequenceCut
from trainsys.parallel.expert.balance import ExpertBalance
from trainsys.parallel.mesh import Mesh
from trainsys.telemetry.recorder import Recorder


class DeepSpeedEngine:
    """Trains ``cfg.model`` under the layout of ``mesh``; see :class:`trainsys.engines.base.Engine`.

    Gradients: DeepSpeed averages over ranks, so each loss is multiplied by their number, and what is left is the
    sum that every engine takes.
    """

    def __init__(self, cfg: RunConfig, mesh: Mesh, recorder: Recorder) -> None:
        self.cfg, self.mesh, self.recorder = cfg, mesh, recorder
        self.device = mesh.device
        prepare(mesh)
        # Before the import, and again for an engine built later in the same process.
        self.observer = observe(mesh)
        with quiet():
            import deepspeed  # noqa: F401  # first, so that its absence is told by its own name

            from trainsys.engines.deepspeed import build

            self.built = build.build(cfg, mesh, recorder)
        self.optimizer = self.built.optimizer
        self.optimizer.allowed = self._allowed
        self._cut = SequenceCut(cfg.parallel.context, mesh["cp"], cfg.train.seq_len)
        self.experts = ExpertBalance([self.built.decoder], mesh)
        self._pending: tuple[Tensor, Judge | None, float] | None = None
        self._totals = torch.zeros(3)
        self._applied = True
        self._say(recorder)

    def train_step(
        self, step: int, data: StepData, judge: Judge | None = None, ask: float = 0.0
    ) -> StepResult:
        self.experts.begin_step()
        self.optimizer.gradients.clear()
        lr = learning_rate(self.cfg.optim, step, self.cfg.train.steps)
        self.optimizer.set_lr(lr)
        batches = [self._cut(batch) for batch in data.micro_batches]
        tokens = data.valid_tokens_global

        def begin(nll: Tensor) -> None:
            self._pending = nll / tokens, judge, ask

        self.built.run(batches, tokens, begin)
        if self._pending is not None:
            # DeepSpeed itself has turned down a step whose gradients are no numbers.
            self._applied = False
            self._decide()
        if self._applied:
            self.optimizer.updates += 1
            self.experts.update()
        return StepResult(self._totals[:2], lr, self._totals[2], self._applied)

    def _allowed(self) -> bool:
        """Asked for each part of an update; decided once a step, when the gradient norm is known."""
        if self._pending is not None:
            self._applied = True
            self._decide()
        return self._applied

    def _decide(self) -> None:
        assert self._pending is not None
        nll, judge, ask = self._pending
        self._pending = None
        # Every rank of a tp group has the same loss.
        mine = torch.stack([nll / self.mesh.layout.tp, torch.full_like(nll, ask)])
        loss, asked = ops.all_reduce_(mine, self.mesh["world"])
        totals = torch.stack([loss, self.built.norm(), asked])
        if judge is not None:
            totals = totals.cpu()
            # Whatever it was asked: what DeepSpeed turned down stays so.
            self._applied = judge(float(totals[0]), float(totals[1])) and self._applied
        self._totals = totals

    def parameters(self) -> Iterator[LocalTensor]:
        for fragment in self.built.fragments:
            for place, data in fragment.pieces(fragment.owner):
                yield LocalTensor(fragment.name, data, place)

    def gradients(self) -> Iterator[LocalTensor]:
        """Only of a step for which ``optimizer.keep_gradients`` was set: ZeRO frees them in the update."""
        for fragment in self.built.fragments:
            for place, data in fragment.pieces(self.optimizer.gradients[fragment.owner]):
                yield LocalTensor(fragment.name, data, place)

    def state(self) -> Iterator[LocalTensor]:
        yield from self.parameters()
        for fragment in self.built.fragments:
            moments = self.optimizer.moments(fragment.owner)
            for moment in MOMENTS:
                for place, data in fragment.pieces(moments[moment]):
                    yield LocalTensor(f"{fragment.name}@{moment}", data, place)
        for name, bias in self.experts.state():
            yield LocalTensor(name, bias, ShardSpec.whole(bias.shape))

    @property
    def updates(self) -> int:
        return self.optimizer.updates

    def resumed(self, updates: int) -> None:
        self.optimizer.resume(updates)
        self.built.masters_to_model()

    def close(self) -> None:
        """Collectives of this process are no longer counted."""
        self.observer.stop()

    @property
    def settings(self) -> dict[str, Any]:
        """What DeepSpeed was given."""
        return self.built.settings

    def _say(self, recorder: Recorder) -> None:
        """The settings: one line, and a file of the run's folder."""
        if self.mesh.rank != 0:
            return
        line = f"deepspeed: {json.dumps(self.settings)}"
        recorder.message("info", line)
        run_dir = Path(self.cfg.telemetry.out) / recorder.info.run_id
        if run_dir.is_dir():
            file = run_dir / "deepspeed.json"
            file.write_text(json.dumps(self.settings, indent=2) + "\n", encoding="utf-8")
            if self.cfg.telemetry.console != "off":
                print(line)
