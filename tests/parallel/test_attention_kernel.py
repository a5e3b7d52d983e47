"""A kernel of one's choice (``train.attention``) computes every block of attention, under every flavour."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
from test_parity import config

from support.parity import reference, train_on_this_rank
from support.ranks import run_ranks
from trainsys.config.run import RunConfig
from trainsys.ops.attention_kernels import ReferenceKernel

LAYOUTS: list[dict[str, Any]] = [
    {},
    {"pp": 2},
    *(
        {"cp": 2, "context": {"flavour": f}}
        for f in ("ring", "all_gather", "pass_q", "token_ring", "dist_flash")
    ),
    {"cp": 2, "context": {"flavour": "ulysses"}},
    {"cp": 2, "context": {"flavour": "two_d", "head_degree": 1}},
]


class Counted(ReferenceKernel):
    calls = 0

    def forward(self, *args: Any) -> Any:
        Counted.calls += 1
        return super().forward(*args)

    def backward(self, *args: Any) -> Any:
        Counted.calls += 1
        return super().backward(*args)


def _by_own_kernel(cfg: RunConfig) -> tuple[list[float], list[float], int]:
    """Losses and gradient norms, and calls. The device's own kernel, whose answer is the same, is an error."""
    Counted.calls = 0
    with (
        patch("trainsys.parallel.parallelize.named_kernel", lambda name: Counted()),
        patch("trainsys.ops.attention_seam.kernel_for", None),
        patch("trainsys.parallel.context.blocks.kernel_for", None),
    ):
        trace = train_on_this_rank(cfg, 2)
    return trace.losses, trace.norms, Counted.calls


@pytest.mark.parametrize("parallel", LAYOUTS, ids=str)
def test_every_block_goes_through_it(parallel: dict[str, Any]) -> None:
    want = reference(config({}), 2)
    ranks = run_ranks(parallel.get("pp", 1) * parallel.get("cp", 1), _by_own_kernel, config(parallel))
    for losses, norms, calls in ranks:
        want.check_losses(losses, norms)
        # Two steps of 8 micro-batches, 2 layers or a pipeline's half of them, forward and backward.
        assert calls >= 2 * 8 * 2 * (config({}).model.n_layers // parallel.get("pp", 1))
