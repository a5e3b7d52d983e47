"""The native engine: plain torch.distributed, composed by ``parallelize``."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from trainsys.comm import ops
from trainsys.config.run import RunConfig
from trainsys.data.loader import StepData
from trainsys.data.packing import Batch
from trainsys.engines.base import Judge, LocalTensor, StepResult
from trainsys.engines.host_memory import keep_freed
from trainsys.engines.loss import loss_sums
from trainsys.models.shards import ShardSpec
from trainsys.optim.adamw import LocalAdamW
from trainsys.optim.local import local
from trainsys.optim.norm import clip_, square_sum
from trainsys.optim.schedule import learning_rate
from trainsys.parallel.expert.balance import ExpertBalance
from trainsys.parallel.mesh import Mesh
from trainsys.parallel.parallelize import ParallelModel, parallelize
from trainsys.parallel.pipeline.model import PipelineModel
from trainsys.parallel.pipeline.stage import Inputs
from trainsys.telemetry.recorder import Recorder


class NativeEngine:
    """Trains ``cfg.model`` under the layout of ``mesh``; see :class:`trainsys.engines.base.Engine`."""

    def __init__(self, cfg: RunConfig, mesh: Mesh, recorder: Recorder) -> None:
        self.cfg, self.mesh, self.recorder = cfg, mesh, recorder
        self.device = mesh.device
        if self.device.type == "cpu":
            keep_freed()
        self.model: ParallelModel | PipelineModel
        if mesh.layout.pp > 1:
            self.model = PipelineModel(cfg, mesh, self._loss, recorder)
        else:
            self.model = parallelize(cfg, mesh)
        parts = list(self.model.parts.values()) if isinstance(self.model, PipelineModel) else [self.model]
        self._headed = next((part.module for part in parts if part.module.head is not None), None)
        self.experts = ExpertBalance((part.module for part in parts), mesh)
        self.optimizer = LocalAdamW(self.model.owned, cfg.optim)
        self._tokens_global = 0

    def train_step(
        self, step: int, data: StepData, judge: Judge | None = None, ask: float = 0.0
    ) -> StepResult:
        phase = self.recorder.phase
        self.model.zero_gradients()
        self.experts.begin_step()
        self._tokens_global = data.valid_tokens_global
        if isinstance(self.model, PipelineModel):
            nll_sum = self.model.run([self._inputs(self.model, batch) for batch in data.micro_batches])
        else:
            nll_sum = self._accumulate(self.model, data)
        with phase("backward"):
            self.model.finish_gradients()
        with phase("optimizer"):
            lr = learning_rate(self.cfg.optim, step, self.cfg.train.steps)
            totals = self._clip(nll_sum / data.valid_tokens_global, ask)
            applied = True
            if judge is not None:
                # Read back before the update rather than after the step: a wait either way.
                totals = totals.cpu()
                applied = judge(float(totals[0]), float(totals[1]))
            if applied:
                self.optimizer.step(lr)
                self.model.share_weights()
                self.experts.update()
        return StepResult(totals[:2], lr, totals[2], applied)

    def _accumulate(self, model: ParallelModel, data: StepData) -> Tensor:
        """Forward and backward of each micro-batch in turn; the sum of nll."""
        phase = self.recorder.phase
        nll_sum = torch.zeros((), device=self.device)
        for i, batch in enumerate(data.micro_batches):
            model.set_sync(last=i == len(data.micro_batches) - 1)
            inputs = self._inputs(model, batch)
            with phase("forward"):
                logits = model.module(inputs.tokens, inputs.positions, inputs.docs)
                loss, nll = self._loss(logits, inputs.labels)
                nll_sum += nll
                del logits
            with phase("backward"):
                loss.backward()
        return nll_sum

    def _inputs(self, model: ParallelModel | PipelineModel, batch: Batch) -> Inputs:
        """This rank's part of a micro-batch, on the device."""
        with self.recorder.phase("data"):
            return Inputs.of(model.cut(batch), self.device)

    def _loss(self, out: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """(what is differentiated, the sum of nll) of what the model gives."""
        loss, nll = loss_sums(self.cfg, self.mesh, out, labels, self._headed)
        # Divided by the tokens of the whole global batch, so that sums over ranks and micro-batches are the
        # gradient of the global mean whatever the layout.
        return loss / self._tokens_global, nll

    def _clip(self, nll: Tensor, ask: float) -> Tensor:
        """Clip by the global norm; returns [loss, norm, what ranks ask], over all in one all-reduce."""
        held = [(g, o.copies) for o in self.model.owned.values() if (g := o.grad) is not None]
        squares = square_sum(held, self.device)
        # Every rank of a tp group has the same loss.
        mine = torch.stack([nll / self.mesh.layout.tp, squares, torch.full_like(squares, ask)])
        totals = ops.all_reduce_(mine, self.mesh["world"])
        totals[1].sqrt_()
        if self.cfg.optim.clip_norm:
            clip_([g for g, _ in held], totals[1], self.cfg.optim.clip_norm)
        return totals

    def parameters(self) -> Iterator[LocalTensor]:
        for name, p in self.model.named_parameters():
            yield LocalTensor(name, local(p), self.model.shards[name])

    def gradients(self) -> Iterator[LocalTensor]:
        for name, o in self.model.owned.items():
            yield LocalTensor(name, torch.zeros_like(o.weight) if o.grad is None else o.grad, o.place)

    def state(self) -> Iterator[LocalTensor]:
        for weight in self.parameters():
            yield weight
            for moment, data in self.optimizer.state(weight.name).items():
                yield LocalTensor(f"{weight.name}@{moment}", data, self.model.owned[weight.name].place)
        for name, bias in self.experts.state():
            yield LocalTensor(name, bias, ShardSpec.whole(bias.shape))

    @property
    def updates(self) -> int:
        return self.optimizer.updates

    def resumed(self, updates: int) -> None:
        self.optimizer.resume(updates)
