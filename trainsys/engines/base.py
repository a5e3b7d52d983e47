"""What the training loop asks of any engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from trainsys.data.loader import StepData
from trainsys.models.shards import ShardSpec

STOP, SAVE = 1.0, 0.5
"""What a rank may ask of all: any number of them to stop, rank 0 alone to save. A sum of both is exact in fp32."""


@dataclass(frozen=True)
class StepResult:
    """Global scalars of one optimizer step, equal on all ranks.

    ``scalars`` is fp32 [loss, grad_norm] on the run's device: mean negative log-likelihood over every
    valid token of the global batch, and the norm before clipping. Reading it waits for the device.
    """

    scalars: Tensor
    lr: float
    asked: Tensor
    """The sum over ranks of what each asked of all (:data:`STOP`, :data:`SAVE`), to be done after this step."""
    applied: bool = True
    """False: ``judge`` turned the update down, weights and moments are those of before."""


@dataclass(frozen=True)
class LocalTensor:
    """This rank's piece of one named tensor, and its place in the full one."""

    name: str
    data: Tensor
    place: ShardSpec


Judge = Callable[[float, float], bool]
"""(loss, gradient norm), equal on all ranks -> whether to apply the update."""


class Engine(Protocol):
    """One model under one layout on one rank. Parameter names are canonical in every engine."""

    device: torch.device

    def train_step(
        self, step: int, data: StepData, judge: Judge | None = None, ask: float = 0.0
    ) -> StepResult:
        """Forward, backward and, if ``judge`` agrees, update on this rank's part of the global batch of the
        0-based ``step``. ``ask``: what this rank asks of all, which travels with the loss."""
        ...

    def parameters(self) -> Iterator[LocalTensor]:
        """Master weights."""
        ...

    def gradients(self) -> Iterator[LocalTensor]:
        """Gradients of the last step, after clipping."""
        ...

    def state(self) -> Iterator[LocalTensor]:
        """All that a checkpoint holds, to be read or filled in place: master weights under their names, optimizer
        moments as ``name@exp_avg``. The same names and places at every call."""
        ...

    @property
    def updates(self) -> int:
        """Updates that the optimizer has made."""
        ...

    def resumed(self, updates: int) -> None:
        """``state`` was filled from a checkpoint taken after ``updates`` updates."""
        ...
