"""All-gather and reduce-scatter of flat tensors, under the names of every torch that we support."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.13 renamed these two; 2.11 has only the older names.
all_gather_flat = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def reduce_scatter_flat(
    out: Tensor,
    x: Tensor,
    op: Any = dist.ReduceOp.SUM,
    group: dist.ProcessGroup | None = None,
    async_op: bool = False,
) -> Any:
    """``x [n * len(out)]`` of every rank, summed; this rank's part of it in ``out``. As ``torch.distributed``'s.

    On CPU the parts change places and each rank adds up its own: the same bytes on the wire, and gloo's own
    reduce-scatter takes 1.2 to 5 times as long (``profiling/reduce_scatter.py``). Sums are of fp32 within, whatever
    the dtype, and in the order of ranks.
    """
    if not exchanges(x) or op != dist.ReduceOp.SUM:
        return _reduce_scatter(out, x, op=op, group=group, async_op=async_op)
    parts = torch.empty_like(x)
    pending = _Sum(dist.all_to_all_single(parts, x, group=group, async_op=True), parts.view(-1, *out.shape), out)
    return pending if async_op else pending.wait()


def exchanges(x: Tensor) -> bool:
    """Whether a reduce-scatter of ``x`` is made of an all-to-all. NCCL's is a single kernel, and better."""
    return x.device.type == "cpu"


class _Sum(dist.Work):
    """What is left to do when the parts are here."""

    def __init__(self, work: dist.Work, parts: Tensor, out: Tensor) -> None:
        super().__init__()
        self._left: tuple[dist.Work, Tensor, Tensor] | None = (work, parts, out)

    def wait(self, *args: Any) -> bool:
        if self._left is not None:
            (work, parts, out), self._left = self._left, None
            work.wait(*args)
            torch.sum(parts, 0, out=out)
        return True
