"""Fully sharded data parallelism (ZeRO-3 or ZeRO-2) with torch's FSDP2, over dp_shard × cp.

Gradients are summed, never averaged: the loss is already divided by the tokens of the whole global batch.
They are whole until the last micro-batch, or shards of each micro-batch's add up (``ParallelModel.set_sync``).
With dp_replicate > 1 (HSDP) a hook sums each reduced shard over the replicas, unless replicas shard gradients and
optimizer (`replica_shards`). With ep > 1 a rank's experts are
sharded over the ranks that have the same ones (``expert_fsdp``), and left alone where there is no other.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard

from trainsys.comm import ops
from trainsys.comm.group import AxisGroup
from trainsys.config.run import FsdpConfig
from trainsys.models.decoder import Decoder
from trainsys.models.moe import MoE
from trainsys.parallel.fsdp_waits import Waits, mark_waits
from trainsys.parallel.mesh import Mesh
from trainsys.parallel.replicate import ShardSums


class _CountedWork(dist.Work):
    """A pending collective, counted when it is waited for."""

    def __init__(self, work: dist.Work, span: AbstractContextManager[None]) -> None:
        super().__init__()
        self._work, self._span = work, span

    def wait(self, *args: Any) -> bool:
        with self._span:
            return self._work.wait(*args)


class _Counted:
    """FSDP2's communication seam: torch's collectives, counted in the ledger."""

    def __init__(self, group: AxisGroup, waits: Waits) -> None:
        self.group, self.waits = group, waits

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def _run(self, op: str, shard: Tensor, start: Callable[[], dist.Work | None], async_op: bool) -> Any:
        self.waits.axis = self.group.axis
        span = self.group.ledger.span(self.group.axis, op, ops.nbytes(shard) * (self.group.size - 1))
        if async_op:
            work = start()
            assert work is not None
            return _CountedWork(work, span)
        with span:
            return start()


class _CountedAllGather(_Counted):
    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False
    ) -> Any:
        start = partial(ops.all_gather_flat, output_tensor, input_tensor, group=group, async_op=async_op)
        return self._run("all_gather", input_tensor, start, async_op)


class _CountedReduceScatter(_Counted):
    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False
    ) -> Any:
        start = partial(
            ops.reduce_scatter_flat, output_tensor, input_tensor, op=op, group=group, async_op=async_op
        )
        return self._run("reduce_scatter", output_tensor, start, async_op)


def apply_fsdp(
    model: Decoder,
    mesh: Mesh,
    cfg: FsdpConfig,
    compute_dtype: torch.dtype,
    sums: ShardSums | None = None,
) -> list[FSDPModule]:
    """Shard every block, and embedding, final norm and head together, over the ``fsdp`` axis; with ep > 1 the
    experts of a block are a unit of their own.

    Parameters and reductions are fp32, gathered copies are of ``compute_dtype``. ``sums`` is told of each reduced
    shard. Returns the units: the root comes first and its parameters stay gathered from forward to backward, then
    blocks in the order of forward, then experts.
    """
    options: dict[str, Any] = {
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=None if compute_dtype == torch.float32 else compute_dtype,
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,
        ),
    }
    own: dict[int, FSDPModule] = {}
    whole: set[nn.Parameter] = set()
    if mesh["ep"].size > 1:
        experts = {i: b.ffn.experts for i, b in enumerate(model.layers.values()) if isinstance(b.ffn, MoE)}
        if mesh["expert_fsdp"].size > 1:
            over = {"mesh": mesh.device_mesh("expert_fsdp"), "shard_placement_fn": _even(mesh["expert_fsdp"])}
            own = {
                i: fully_shard(e, reshard_after_forward=cfg.reshard_after_forward, **over, **options)
                for i, e in experts.items()
            }
        else:
            whole = {p for e in experts.values() for p in e.parameters()}
    options["mesh"] = mesh.device_mesh("fsdp")
    options["ignored_params"] = whole
    options["shard_placement_fn"] = _even(mesh["fsdp"])
    blocks = [
        fully_shard(block, reshard_after_forward=cfg.reshard_after_forward, **options)
        for block in model.layers.values()
    ]
    root = fully_shard(model, **options)
    waits = Waits(mesh.ledger)
    for unit in (root, *blocks):
        _count_and_sum(unit, mesh["fsdp"], sums, waits)
    for unit in own.values():
        _count_and_sum(unit, mesh["expert_fsdp"], sums, waits)
    mark_waits(root, waits)
    for i, block in enumerate(blocks):
        # A block's own experts are needed before the next block, and in backward before its own attention.
        mine = [own[i]] if i in own else []
        block.set_modules_to_forward_prefetch([*mine, *blocks[i + 1 : i + 1 + cfg.prefetch]])
        block.set_modules_to_backward_prefetch([*mine, *blocks[max(0, i - cfg.prefetch) : i][::-1]])
    if mesh.device.type == "cpu":
        # Without streams a prefetched gather overlaps with compute only if it is started in the background.
        root._set_unshard_async_op(True)
    return [root, *blocks, *own.values()]


def _even(group: AxisGroup) -> Callable[[nn.Parameter], Shard | None]:
    """Along which dim: the first, but for stacked experts the first that the ranks share evenly."""

    def place(param: nn.Parameter) -> Shard | None:
        if param.dim() < 3:
            return None
        return next((Shard(d) for d in range(param.dim()) if param.shape[d] % group.size == 0), None)

    return place


def _count_and_sum(unit: FSDPModule, group: AxisGroup, sums: ShardSums | None, waits: Waits) -> None:
    unit.set_custom_all_gather(_CountedAllGather(group, waits))
    unit.set_custom_reduce_scatter(_CountedReduceScatter(group, waits))
    unit.set_gradient_divide_factor(1.0)
    # gloo has no PREMUL_SUM; a plain sum is what is wanted anyway.
    unit.set_force_sum_reduction_for_comms(True)
    if sums is not None:
        unit.set_all_reduce_hook(partial(_sum_shard, sums, unit))


def _sum_shard(sums: ShardSums, unit: Any, shard: Tensor) -> None:
    # Parameters as they are now: those that FSDP was given were on the meta device.
    groups = unit._get_fsdp_state()._fsdp_param_groups
    sums.reduced([p.sharded_param for group in groups for p in group.fsdp_params], shard)
