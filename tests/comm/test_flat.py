"""A reduce-scatter made of an exchange: the sums of the real one, at once and later, in every dtype."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from support.ranks import run_ranks
from trainsys.comm import flat


def _both(dtype: torch.dtype, later: bool) -> tuple[Tensor, Tensor, bool]:
    rank, world = dist.get_rank(), dist.get_world_size()
    x = torch.arange(5 * world, dtype=torch.float32).add(1 + rank).square().to(dtype)
    theirs, ours = torch.empty(5, dtype=dtype), torch.empty(5, dtype=dtype)
    flat._reduce_scatter(theirs, x.clone())
    given = flat.reduce_scatter_flat(ours, x, async_op=later)
    if later:
        given.wait()
        given.wait()  # a second one changes nothing
    return theirs.float(), ours.float(), flat.exchanges(x)


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_sums_are_those_of_torchs_own(dtype: torch.dtype, later: bool) -> None:
    for theirs, ours, exchanged in run_ranks(3, _both, dtype, later):
        assert exchanged
        assert ours.abs().min() > 0
        # bf16: ours adds in fp32 and rounds once.
        torch.testing.assert_close(ours, theirs, rtol=2e-2 if dtype == torch.bfloat16 else 1e-6, atol=0)


def _largest() -> list[float]:
    x, out = torch.arange(4.0) * (1 + dist.get_rank()), torch.empty(2)
    flat.reduce_scatter_flat(out, x, op=dist.ReduceOp.MAX)
    return out.tolist()


def test_other_reductions_are_torchs() -> None:
    assert run_ranks(2, _largest) == [[0.0, 2.0], [4.0, 6.0]]
