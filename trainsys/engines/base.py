"""What the training loop asks of any engine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from trainsys.data.loader import StepData
from trainsys.models.shards import ShardSpec


@dataclass(frozen=True)
class StepResult:
    """Global scalars of one optimizer step, equal on all ranks.

    ``scalars`` is fp32 [loss, grad_norm] on the run's device: mean negative log-likelihood over every
    valid token of the global batch, and the norm before clipping. Reading it waits for the device.
    """

    scalars: Tensor
    lr: float


@dataclass(frozen=True)
class LocalTensor:
    """This rank's piece of one named tensor, and its place in the full one."""

    name: str
    data: Tensor
    place: ShardSpec


class Engine(Protocol):
    """One model under one layout on one rank. Parameter names are canonical in every engine."""

    device: torch.device

    def train_step(self, step: int, data: StepData) -> StepResult:
        """Forward, backward and update on this rank's part of the global batch of 0-based ``step``."""
        ...

    def parameters(self) -> Iterator[LocalTensor]:
        """Master weights."""
        ...

    def gradients(self) -> Iterator[LocalTensor]:
        """Gradients of the last step, after clipping."""
        ...
