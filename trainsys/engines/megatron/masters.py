"""Master weights, gradients and moments in the memory in which Megatron-Core's optimizer keeps them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from trainsys.optim.adamw import moments_of


@dataclass(frozen=True)
class Master:
    """What the optimizer updates for one parameter of the model: its elements from ``start`` on, in fp32."""

    parameter: torch.nn.Parameter
    main: Tensor
    start: int
    optimizer: torch.optim.Optimizer

    @property
    def data(self) -> Tensor:
        """``[n]``, sharing memory."""
        return self.main.detach().view(-1)

    @property
    def gradient(self) -> Tensor:
        grad = self.main.grad
        return torch.zeros_like(self.data) if grad is None else grad.detach().view(-1)

    def moments(self, updates: int) -> dict[str, Tensor]:
        """``[n]`` each, made where there was no update yet."""
        held = moments_of(self.optimizer, self.main, updates)
        return {moment: data.view(-1) for moment, data in held.items()}

    def resume(self, updates: int) -> None:
        if held := self.optimizer.state.get(self.main):
            held["step"].fill_(float(updates))


def masters(optimizer: Any) -> Iterator[Master]:
    """The masters in a chain of Megatron optimizers that hold something on this rank."""
    for one in optimizer.chained_optimizers:
        if one.is_stub_optimizer:
            continue
        inner = one.optimizer
        if isinstance(one, DistributedOptimizer):
            for parameter, (group, order) in one.model_param_group_index_map.items():
                held = one._get_model_param_range_map(parameter)["param"]
                yield Master(parameter, inner.param_groups[group]["params"][order], held.start, inner)
        else:
            sources = [p for chunk in parameters_of(one) for p in chunk]
            for parameter, main in sources:
                yield Master(parameter, main, 0, inner)


def parameters_of(optimizer: Any) -> Iterator[list[tuple[torch.nn.Parameter, Tensor]]]:
    """(parameter, what is updated for it) by group: 16-bit parameters have a copy, fp32 ones are their own."""
    if hasattr(optimizer, "float16_groups"):
        for low, high in zip(optimizer.float16_groups, optimizer.fp32_from_float16_groups, strict=True):
            yield list(zip(low, high, strict=True))
        for same in optimizer.fp32_from_fp32_groups:
            yield [(p, p) for p in same]
    else:
        for group in optimizer.optimizer.param_groups:
            yield [(p, p) for p in group["params"]]


def publish(optimizer: Any, chunks: list[Any]) -> None:
    """The masters were written to: bring the model's parameters after them, on every rank."""
    with torch.no_grad():
        for one in optimizer.chained_optimizers:
            if not one.is_stub_optimizer and hasattr(one, "_copy_main_params_to_model_params"):
                one._copy_main_params_to_model_params()
        if any(isinstance(one, DistributedOptimizer) for one in optimizer.chained_optimizers):
            for chunk in chunks:
                chunk.start_param_sync(force_sync=True)
