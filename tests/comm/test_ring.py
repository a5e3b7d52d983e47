"""The collectives that are taken apart: the same results and bytes, in the order that leaves room for work."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from support.ranks import run_ranks
from trainsys.comm import ops
from trainsys.comm.p2p import Link
from trainsys.comm.ring import gathered, summed
from trainsys.layout import Layout
from trainsys.parallel.mesh import Mesh


def _both(world: int) -> dict[str, Any]:
    mesh = Mesh(Layout(tp=world), torch.device("cpu"))
    tp, me = mesh["tp"], mesh["tp"].index
    mine = torch.arange(6.0).view(2, 3) + 10 * me
    order, parts = [], [torch.empty(0)] * world
    for i, part in gathered(mine, Link(tp)):
        order.append(i)
        parts[i] = part.clone()
    assert torch.equal(torch.cat(parts), ops.all_gather(mine, tp, 0))
    assert order == [(me - hop) % world for hop in range(world)], "the own part first, then each neighbour's"

    made: list[int] = []
    # Powers of two, so that each sum is exact in any order.
    terms = torch.tensor([[2.0**me * (i + 1)] * 3 for i in range(world)])

    def make(i: int) -> torch.Tensor:
        made.append(i)
        return terms[i].clone()

    total = summed(make, Link(tp))
    assert torch.equal(total, ops.reduce_scatter(terms, tp, 0)[0])
    assert sorted(made) == list(range(world))
    assert made[-1] == me, "the own part last: it is what arrives"
    return {op: t.sent_bytes for (_, op), t in mesh.ledger.traffic.items()}


@pytest.mark.parametrize("world", [2, 3, 4])
def test_same_results_and_bytes_as_the_collectives(world: int) -> None:
    for sent in run_ranks(world, _both, world):
        assert sent["send_part"] == sent["all_gather"] == (world - 1) * 6 * 4
        assert sent["send_sum"] == sent["reduce_scatter"] == (world - 1) * 3 * 4
