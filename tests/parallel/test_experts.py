"""How rows travel: the same rows whatever the route, as many bytes as counted by hand, covered by computation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from support.overlap.experts import (
    CHUNKS,
    EXPERTS,
    TOKENS,
    TOP_K,
    WIDTH,
    WORLD,
    both_ways,
    mesh_of,
    predicted,
    routing,
)
from support.ranks import run_ranks
from trainsys.config.model import ModelConfig, MoEConfig
from trainsys.config.run import ExpertConfig, ParallelConfig, TrainConfig
from trainsys.errors import UserError
from trainsys.layout import Layout
from trainsys.models.moe import Experts
from trainsys.parallel.expert import trip
from trainsys.parallel.expert.apply import route_maker
from trainsys.parallel.expert.dispatch import ExpertDispatch
from trainsys.parallel.mesh import Mesh

FLAT = ExpertConfig()
TWO_LEVEL = ExpertConfig(dispatch="hierarchical", node_ranks=2)


class Multiply(Experts):
    """Expert e multiplies by e + 1, so a row that met the wrong expert shows, and counts its rows."""

    def __init__(self, first: int) -> None:
        super().__init__(1, 1, 1, "gelu")
        self.first, self.rows = first, 0
        self.arrived: list[Tensor] = []

    def compute(self, x: Tensor, counts: Tensor) -> Tensor:
        self.rows += len(x)
        self.arrived.append(x.detach().clone())
        assert counts.sum() == len(x)
        factors = torch.arange(len(counts)) + self.first + 1.0
        return x * factors.repeat_interleave(counts).unsqueeze(-1)


def _travel(cfg: ExpertConfig, skew: bool) -> dict[str, Any]:
    mesh = mesh_of()
    dispatch = ExpertDispatch(route_maker(mesh, cfg), cfg.chunks)
    x, routed = routing(mesh.rank, skew)
    x.requires_grad_()
    routed.gates.requires_grad_()
    experts = Multiply(mesh["ep"].index * EXPERTS // WORLD)
    state, rows, parts = dispatch.send(x.flatten(0, 1), routed, EXPERTS)
    out = dispatch.receive(state, experts(rows, parts))
    factors = (routed.choices[0] + 1.0).unsqueeze(-1)
    want = (routed.gates[0].unsqueeze(-1) * factors).sum(1) * x[0]
    torch.testing.assert_close(out, want)
    probe = torch.linspace(1, 2, WIDTH)
    got = torch.autograd.grad((out * probe).sum(), (x, routed.gates))
    torch.testing.assert_close(got, torch.autograd.grad((want * probe).sum(), (x, routed.gates)))
    ledger = mesh.ledger.traffic
    return {
        "rows": experts.rows,
        "bytes": ledger["ep", trip.OP].sent_bytes,
        "calls": ledger["ep", trip.OP].calls,
        "arrived": torch.cat(experts.arrived).numpy(),
        "out": out.detach().numpy(),
        "choices": routed.choices.flatten().tolist(),
    }


@pytest.mark.parametrize("skew", [False, True], ids=["random", "one rank idle"])
@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("cfg", [FLAT, TWO_LEVEL], ids=lambda c: c.dispatch)
def test_every_row_meets_its_expert_and_comes_home(cfg: ExpertConfig, chunks: int, skew: bool) -> None:
    ranks = run_ranks(WORLD, _travel, cfg.model_copy(update={"chunks": chunks}), skew)
    assert sum(r["rows"] for r in ranks) == WORLD * TOKENS * TOP_K  # none lost, none twice
    assert (ranks[1]["rows"] == 0) == skew
    legs = 2 if cfg.dispatch == "hierarchical" else 1
    for rank, r in enumerate(ranks):
        goals = [e * WORLD // EXPERTS for e in r["choices"]]
        assert r["calls"] == 4 * legs * chunks  # there and back, forward and backward
        if legs == 1:
            # What is sent there comes back, and the gradients of both go the same ways.
            away = sum(goal != rank for goal in goals)
            back = sum(
                e * WORLD // EXPERTS == rank for other in ranks if other is not r for e in other["choices"]
            )
            assert r["bytes"] == 2 * (away + back) * WIDTH * 4
    if legs == 2:
        # Inside the node whatever goes to the other place; across whatever goes to the other node.
        hops = sum(
            (goal % 2 != rank % 2) + (goal // 2 != rank // 2)
            for rank, r in enumerate(ranks)
            for goal in (e * WORLD // EXPERTS for e in r["choices"])
        )
        assert sum(r["bytes"] for r in ranks) == 4 * hops * WIDTH * 4


def test_rows_arrive_in_the_same_order_by_either_route() -> None:
    """So that the two routes give the same sums to the last bit."""
    flat, two_level = (run_ranks(WORLD, _travel, cfg, False) for cfg in (FLAT, TWO_LEVEL))
    for a, b in zip(flat, two_level, strict=True):
        assert np.array_equal(a["arrived"], b["arrived"])
        assert np.array_equal(a["out"], b["out"])


# ---- overlap: work that sleeps, a link that is slow ----------------------------------------------------


@pytest.mark.timing
@pytest.mark.parametrize("chunks", [1, CHUNKS])
def test_chunks_hide_what_arithmetic_says(chunks: int) -> None:
    trip_s, compute_s = 0.12, 0.16
    expected = predicted(chunks, trip_s, compute_s)
    if chunks == 1:
        assert expected == pytest.approx(2 * trip_s)
    else:
        assert expected < 0.6 * 2 * trip_s
    by_rank = run_ranks(WORLD, both_ways, chunks, trip_s, compute_s)
    for way in (0, 1):
        # A sleeping rank may wake late on a busy machine: of each, the attempt that was least disturbed.
        nearest = [min((a[way] for a in rank), key=lambda wait: abs(wait - expected)) for rank in by_rank]
        # Within 10% of all there is to hide.
        assert abs(sum(nearest) / WORLD - expected) < 0.1 * 2 * trip_s, (way, nearest, expected)


# ---- placement and refusals ------------------------------------------------------------------------------


def _held(layout: Layout) -> tuple[int, int, int]:
    """(first expert here, one past the last, members of expert_fsdp)."""
    mesh = Mesh(layout, torch.device("cpu"))
    each = EXPERTS // layout.ep
    return mesh["ep"].index * each, (mesh["ep"].index + 1) * each, mesh["expert_fsdp"].size


def test_neighbours_hold_different_experts() -> None:
    """ep is innermost in dp_shard × cp, so dispatch stays inside a node where ep does."""
    held = run_ranks(WORLD, _held, Layout(dp_shard=4, ep=2))
    assert held == [(0, 4, 2), (4, 8, 2), (0, 4, 2), (4, 8, 2)]


MODEL = ModelConfig(
    n_layers=1, d_model=8, n_heads=2, d_ff=8, vocab=8, moe=MoEConfig(n_experts=8, top_k=2, d_ff=8)
)


def _validate(parallel: ParallelConfig, model: ModelConfig = MODEL) -> list[str]:
    return Layout.resolve(parallel, 8).validate(model, TrainConfig(seq_len=8, global_batch=8), parallel)


@pytest.mark.parametrize(
    ("expert", "ep", "says"),
    [
        ({"node_ranks": 2}, 4, "flat knows no nodes"),
        ({"dispatch": "hierarchical"}, 8, "node_ranks can be 2 or 4"),
        ({"dispatch": "hierarchical", "node_ranks": 3}, 8, "node_ranks can be 2 or 4"),
        ({"dispatch": "hierarchical", "node_ranks": 2}, 2, "use dispatch=flat"),
    ],
)
def test_refusals(expert: dict[str, Any], ep: int, says: str) -> None:
    with pytest.raises(UserError, match=says):
        _validate(ParallelConfig(ep=ep, expert=ExpertConfig(**expert)))


def test_warnings() -> None:
    (idle,) = _validate(ParallelConfig(expert=ExpertConfig(chunks=2)))
    assert "parallel.ep=1" in idle
    one = MoEConfig(n_experts=8, top_k=1, d_ff=8)
    (gate,) = _validate(ParallelConfig(ep=2), MODEL.model_copy(update={"moe": one}))
    assert "norm_topk=false" in gate
