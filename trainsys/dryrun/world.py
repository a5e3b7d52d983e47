"""One rank of a world that is not there: process groups without peers, tensors without memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._tools.fake_collectives  # tells fake tensors what collectives return
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from trainsys.comm import flat
from trainsys.dryrun.swap import swapped
from trainsys.models import layers
from trainsys.models.decoder import Decoder
from trainsys.ops import loss
from trainsys.optim import norm
from trainsys.parallel import parallelize


@contextmanager
def rank_of(world: int, rank: int) -> Iterator[None]:
    """Be rank ``rank`` of ``world``: every collective returns at once and moves nothing."""
    assert not dist.is_initialized(), "a dry run needs a process of its own"
    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def as_on_cuda() -> Iterator[None]:
    """Hold what CUDA holds where the code takes another way on a CPU: RMSNorm keeps its input and one number a row
    in any dtype, the loss works on larger pieces, a reduce-scatter needs no place for the others' parts, and the norm
    of the gradients is not read back."""
    with (
        swapped(layers, "rms_norm", _CudaRmsNorm.apply),
        swapped(loss, "_CPU_PIECE", loss._DEVICE_PIECE),
        swapped(flat, "exchanges", lambda _: False),
        swapped(norm, "reads_back", lambda _: False),
    ):
        yield


@contextmanager
def without_memory(fake: FakeTensorMode) -> Iterator[None]:
    """Meanwhile `parallelize` makes weights that have shapes and no numbers."""

    def to_empty(model: Decoder, *, device: torch.device) -> Decoder:
        with fake:
            return nn.Module.to_empty(model, device=device)

    with (
        swapped(parallelize, "init_weights", lambda *_, **__: None),
        swapped(Decoder, "to_empty", to_empty),
    ):
        yield


class _CudaRmsNorm(torch.autograd.Function):
    """The shapes of CUDA's fused RMSNorm; torch has it for no other device."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: nn.Parameter, eps: float) -> Tensor:
        weight = weight.to(x.dtype)
        rstd = x.new_empty((*x.shape[:-1], 1), dtype=torch.promote_types(x.dtype, torch.float32))
        ctx.save_for_backward(x, weight, rstd)
        return torch.empty_like(x, memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight), None
