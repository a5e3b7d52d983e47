"""One stage of the model at work: forward, backward in one or two parts, gathering and reducing."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from trainsys.data.packing import Batch
from trainsys.ops.documents import Documents
from trainsys.ops.host_copy import to_device
from trainsys.parallel.parallelize import ParallelModel
from trainsys.parallel.pipeline import weights
from trainsys.parallel.pipeline.sharded import ShardedStage
from trainsys.schedules.partition import StagePart
from trainsys.telemetry.recorder import Recorder


class Inputs(NamedTuple):
    """One micro-batch on the device; every stage reads positions and documents, the ends read the rest."""

    tokens: Tensor
    labels: Tensor
    positions: Tensor
    docs: Documents | None
    """On the host, where their lengths decide what runs."""

    @classmethod
    def of(cls, batch: Batch, device: torch.device) -> Inputs:
        """A rank's part of a micro-batch, on its way to the device."""
        arrays = (batch.tokens, batch.labels, batch.positions)
        docs = None if batch.doc_ids is None else Documents.of(batch.doc_ids)
        return cls(*(to_device(torch.from_numpy(a), device) for a in arrays), docs)


Loss = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(logits, labels) -> (what is differentiated, its detached part that is reported)"""


class ModelStage:
    """``splits``: some backwards leave their weight gradients for later."""

    def __init__(
        self, model: ParallelModel, part: StagePart, loss: Loss, recorder: Recorder, *, splits: bool
    ) -> None:
        self.model, self.part = model, part
        self._loss, self._phase = loss, recorder.phase
        self._sharded = ShardedStage(model.units) if model.units else None
        if model.buckets is not None:
            model.buckets.sync = False  # reduced when the schedule says so
        self._gradients = weights.WeightGradients()
        if splits:
            self._gradients.apply(model.module)
        self._owed: dict[int, weights.Owed] = {}
        self._saved: dict[int, tuple[Tensor | None, Tensor]] = {}
        self.inputs: list[Inputs] = []
        self.reported: list[Tensor] = []

    def begin(self, inputs: list[Inputs]) -> None:
        """A step of these micro-batches starts."""
        self.inputs, self.reported = inputs, []

    def forward(self, micro: int, x: Tensor | None) -> Tensor:
        if self._sharded is not None:
            self._sharded.ready()
        with self._phase("forward"):
            batch = self.inputs[micro]
            if x is not None:
                x = x.detach().requires_grad_()
            hidden = batch.tokens if x is None else x
            out: Tensor = self.model.module(hidden, batch.positions, batch.docs)
            if self.part.head:
                out, reported = self._loss(out, batch.labels)
                self.reported.append(reported)
            self._saved[micro] = x, out
            return out.detach().contiguous()

    def backward(self, micro: int, grad: Tensor | None, *, weights: bool) -> Tensor | None:
        if self._sharded is not None:
            self._sharded.ready()
        with self._phase("backward"):
            x, out = self._saved.pop(micro)
            self._gradients.defer = None if weights else self._owed.setdefault(micro, [])
            torch.autograd.backward(out, grad)
            self._gradients.defer = None
            if self._sharded is not None:
                self._sharded.accumulated()
            if x is None:
                return None
            assert x.grad is not None
            return x.grad.contiguous()

    def backward_weight(self, micro: int) -> None:
        with self._phase("backward"):
            weights.run(self._owed.pop(micro))
            if self._sharded is not None:
                self._sharded.accumulated()

    def gather(self) -> None:
        if self._sharded is not None:
            self._sharded.gather()

    def release(self) -> None:
        if self._sharded is not None:
            self._sharded.release()

    def reduce(self) -> None:
        with self._phase("backward"):
            if self._sharded is not None:
                self._sharded.reduce()
            if self.model.buckets is not None:
                self.model.buckets.start()
