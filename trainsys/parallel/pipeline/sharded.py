"""FSDP units driven by a schedule instead of by hooks: gathered and reduced once, however many micro-batches.

Sharding, memory layout and collectives stay FSDP2's. Its hooks are taken off: they would gather and free
around every forward and backward, and they cost time in each. As ``torch.distributed.pipelining`` does for its own
stages, this reaches into parts of FSDP2 that are not public, and keeps that to this file.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule, fully_shard


class ShardedStage:
    """``units``: those of one stage, the root first."""

    def __init__(self, units: list[FSDPModule]) -> None:
        self._units = units
        states: list[Any] = [fully_shard.state(unit) for unit in units]  # type: ignore[attr-defined]
        for state in states:
            state._pre_forward_hook_handle.remove()
            state._post_forward_hook_handle.remove()
        self._root = states[0]
        self._groups = [group for state in states for group in state._fsdp_param_groups]
        # Gradients in the dtype of compute are added up in fp32, as FSDP2 does between backwards.
        self._narrow = any(group.mp_policy.param_dtype is not None for group in self._groups)

    def gather(self) -> None:
        """Start to gather; `ready` waits."""
        self._root._lazy_init()
        for unit in self._units:
            unit.unshard(async_op=True)

    def ready(self) -> None:
        """Every parameter is whole now. Costs nothing where it was already."""
        for group in self._groups:
            group.wait_for_unshard()

    def release(self) -> None:
        for unit in self._units:
            unit.reshard()

    def accumulated(self) -> None:
        """After a backward: add its gradients to those before."""
        if not self._narrow:
            return
        for group in self._groups:
            for p in group.fsdp_params:
                # Not FSDP2's own methods, which want parameters gathered: weight gradients come later.
                grad = p._unsharded_param.grad if hasattr(p, "_unsharded_param") else None
                if grad is None:
                    continue
                p._unsharded_param.grad = None
                if p.unsharded_accumulated_grad is None:
                    p.unsharded_accumulated_grad = grad.to(torch.float32)
                else:
                    p.unsharded_accumulated_grad += grad

    def reduce(self) -> None:
        """Reduce-scatter all units' gradients, which frees gradients and parameters."""
        self._root._root_post_backward_final_callback()
