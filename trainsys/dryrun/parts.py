"""Which part of a rank's memory a tensor is: told to a `Meter` where parameters are gathered and gradients arise."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

from trainsys.dryrun.meter import Meter
from trainsys.dryrun.swap import swapped
from trainsys.parallel import fsdp
from trainsys.parallel.parallelize import ParallelModel
from trainsys.parallel.pipeline import weights
from trainsys.parallel.pipeline.model import PipelineModel
from trainsys.parallel.pipeline.sharded import ShardedStage


@contextmanager
def told_apart(meter: Meter) -> Iterator[None]:
    """Meanwhile ``meter`` is told what FSDP2 and pipeline stages allocate."""

    def making(part: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with meter.making(part):
                return original(*args, **kwargs)

        return call

    first_unsharded = FSDPParam.init_unsharded_param

    def init_unsharded_param(param: FSDPParam) -> None:
        new = not hasattr(param, "_unsharded_param")
        first_unsharded(param)
        if new:
            param._unsharded_param.register_hook(partial(_is_gradient, meter))

    reduce = fsdp._CountedReduceScatter.__call__

    def reduce_scatter(comm: Any, output_tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        meter.belongs(output_tensor, "gradients")
        return reduce(comm, output_tensor, *args, **kwargs)

    with ExitStack() as stack:
        for owner, name, part in (
            (FSDPParam, "to_accumulated_grad_if_needed", "gradients"),
            (FSDPParamGroup, "unshard", "communication"),
            (FSDPParamGroup, "wait_for_unshard", "gathered"),
            (FSDPParamGroup, "post_backward", "communication"),
            (ShardedStage, "accumulated", "gradients"),
            (weights, "run", "gradients"),
        ):
            stack.enter_context(swapped(owner, name, making(part, getattr(owner, name))))
        stack.enter_context(swapped(FSDPParam, "init_unsharded_param", init_unsharded_param))
        # Called again before the first step, in case parameters were replaced since they were made. They were not,
        # which FSDP2 can tell of real tensors alone.
        stack.enter_context(swapped(FSDPParam, "reset_sharded_param", lambda param: None))
        stack.enter_context(swapped(fsdp._CountedReduceScatter, "__call__", reduce_scatter))
        yield


def mark(meter: Meter, model: ParallelModel | PipelineModel) -> None:
    """Tell what the built ``model`` already holds, and which gradients its plain parameters will get."""
    for part in model.parts.values() if isinstance(model, PipelineModel) else [model]:
        for p in part.module.parameters():
            whole = getattr(p, "_local_tensor", p)
            meter.belongs(whole, "parameters")
            if whole is p:
                p.register_hook(partial(_is_gradient, meter))
            if p.grad is not None:
                meter.belongs(p.grad, "gradients")


def _is_gradient(meter: Meter, grad: Tensor | None) -> None:
    if grad is not None:  # or it is to be computed later
        meter.belongs(grad, "gradients")
