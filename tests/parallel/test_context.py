"""Each context-parallel flavour against attention over whole rows, and its bytes against the formula.

All cases of a world size run in one visit to the ranks: attention alone, in fp64, so that equality is to
1e-12 and a flavour that forgets a block or a gradient has no rounding to hide behind.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import pytest
import torch

from support.ranks import run_ranks
from trainsys.config.run import ContextConfig
from trainsys.context.balance import ContextPlan, places
from trainsys.context.refusals import Request, refusals
from trainsys.context.traffic import AttentionSize, sent_bytes
from trainsys.layout import Layout
from trainsys.ops.attention import reference_attention
from trainsys.ops.documents import Documents
from trainsys.parallel.context.core import ContextAttention, build_method
from trainsys.parallel.mesh import Mesh

BATCH, SEQ, HEAD_DIM = 2, 48, 8


@dataclass(frozen=True, eq=False)
class Case:
    flavour: str
    options: dict[str, Any] = field(default_factory=dict)
    window: int | None = None
    docs: bool = False
    heads: int = 4
    kv_heads: int = 2
    dtype: torch.dtype = torch.float64

    @property
    def id(self) -> str:
        parts = [self.flavour, *(str(v) for v in self.options.values())]
        parts += [f"w{self.window}"] * (self.window is not None) + ["docs"] * self.docs
        return "-".join([*parts, f"{self.heads}to{self.kv_heads}", str(self.dtype)[6:]])

    def plan(self, cp: int) -> ContextPlan:
        cfg = ContextConfig(flavour=self.flavour, **self.options)
        assert not list(refusals(Request(cfg, cp, self.heads, self.kv_heads)))
        return ContextPlan.resolve(cfg, cp)

    def row(self) -> tuple[list[torch.Tensor], torch.Tensor | None]:
        """q, k, v, dout of whole rows, and documents whose borders are no multiple of anything."""
        g = torch.Generator().manual_seed(7)
        h, k = self.heads, self.kv_heads
        tensors = [
            torch.randn((BATCH, SEQ, n, HEAD_DIM), generator=g, dtype=self.dtype) for n in (h, k, k, h)
        ]
        if not self.docs:
            return tensors, None
        starts = torch.zeros(BATCH, SEQ, dtype=torch.int64)
        starts[0, [5, 6, 29]] = 1
        starts[1, [13, 40]] = 1
        return tensors, starts.cumsum(1)


RINGS = ("ring", "pass_q", "token_ring")
ALL = (*RINGS, "all_gather", "dist_flash", "ulysses")
TWO_D = (
    {"head_degree": 2},
    {"head_degree": 2, "placement": "context_first"},
    {"head_degree": 1, "inner_ring": 2},
    {"head_degree": 4},
)
BF16: dict[str, Any] = {"dtype": torch.bfloat16}
CASES: dict[int, list[Case]] = {
    2: [Case(f, window=w, docs=d) for f in ALL for w, d in ((None, False), (9, True))],
    3: [Case(f, heads=3, kv_heads=3, window=w) for f in ALL for w in (None, 20)],
    4: [
        *(
            Case(f, window=w, docs=d, kv_heads=k)
            for f in ALL
            for w, d, k in ((None, False, 2), (None, True, 4), (7, False, 1), (15, True, 2))
        ),
        *(
            Case(f, {"balance": "contiguous"}, window=w)
            for f in (*RINGS, "all_gather")
            for w in (None, 1, 14, 30)
        ),
        *(Case("dist_flash", window=w) for w in (1, 14, 30)),
        *(Case("two_d", o, window=w, docs=d) for o in TWO_D for w, d in ((None, False), (7, True))),
        *(Case(f, **BF16) for f in ALL),
        *(Case("two_d", o, **BF16) for o in TWO_D[:3]),
    ],
    8: [
        *(Case(f, heads=8, kv_heads=2) for f in ("ring", "dist_flash", "ulysses")),
        *(
            Case("two_d", {"head_degree": 2, "inner_ring": 2, "placement": p}, docs=True)
            for p in ("head_first", "context_first")
        ),
        Case("two_d", {"head_degree": 1, "inner_ring": 2, "balance": "contiguous"}, window=9),
    ],
}


@dataclass
class Result:
    tensors: list[torch.Tensor]
    """out, dq, dk, dv of this rank's tokens"""
    places: list[int]
    forward: Counter[str]
    backward: Counter[str]


def _all_on_this_rank(cases: list[Case]) -> list[Result]:
    world = torch.distributed.get_world_size()
    mesh = Mesh(Layout(cp=world), torch.device("cpu"))
    return [_one(case, mesh) for case in cases]


def _one(case: Case, mesh: Mesh) -> Result:
    cp, plan = mesh["cp"], case.plan(mesh["cp"].size)
    heads, method = build_method(plan, mesh, SEQ, case.window)
    core = ContextAttention(case.window, heads, method)
    (q, k, v, dout), docs = case.row()
    held = places(plan.shard(SEQ, cp.index))
    q, k, v = (t[:, held].requires_grad_() for t in (q, k, v))
    mesh.ledger.reset()
    rule = core.prepare(torch.empty(BATCH, len(held)), None if docs is None else Documents.of(docs))
    out = core(q, k, v, rule)
    forward = _sent(mesh)
    out.backward(dout[:, held])
    return Result([out.detach(), q.grad, k.grad, v.grad], held, forward, _sent(mesh) - forward)


def _sent(mesh: Mesh) -> Counter[str]:
    assert {axis for axis, _ in mesh.ledger.traffic} <= {"cp"}
    return Counter({op: t.sent_bytes for (_, op), t in mesh.ledger.traffic.items() if t.sent_bytes})


@lru_cache
def _results(world: int) -> list[list[Result]]:
    """By case, then by rank."""
    by_rank = run_ranks(world, _all_on_this_rank, CASES[world])
    return [list(ranks) for ranks in zip(*by_rank, strict=True)]


@lru_cache
def _whole_rows(case: Case) -> list[torch.Tensor]:
    tensors, docs = case.row()
    q, k, v, dout = (t.double() for t in tensors)
    q, k, v = (t.requires_grad_() for t in (q, k, v))
    distance = torch.arange(SEQ).unsqueeze(1) - torch.arange(SEQ)
    visible = (distance >= 0) & (distance < (case.window or SEQ))
    if docs is not None:
        visible = (visible & (docs.unsqueeze(2) == docs.unsqueeze(1))).unsqueeze(1)
    out, _ = reference_attention(q, k, v, visible)
    out.backward(dout)
    return [out.detach(), q.grad, k.grad, v.grad]


EVERY = [pytest.param(w, i, id=f"cp{w}-{c.id}") for w, cases in CASES.items() for i, c in enumerate(cases)]


@pytest.mark.parametrize(("world", "index"), EVERY)
def test_same_attention_and_gradients_as_whole_rows(world: int, index: int) -> None:
    case, ranks = CASES[world][index], _results(world)[index]
    assert sorted(p for r in ranks for p in r.places) == list(range(SEQ))
    tolerance = 1e-12 if case.dtype == torch.float64 else 2e-2
    for n, name in enumerate(("out", "dq", "dk", "dv")):
        got = torch.empty_like(_whole_rows(case)[n])
        for r in ranks:
            got[:, r.places] = r.tensors[n].double()
        want = _whole_rows(case)[n]
        gap = float(
            (got - want).norm() / want.norm().clamp(min=1.0)
        )  # dq is 0 where a token sees itself only
        assert gap < tolerance, f"{name} is off by {gap:.1e}"


@pytest.mark.parametrize(("world", "index"), EVERY)
def test_bytes_on_the_wire_are_the_formulas(world: int, index: int) -> None:
    case, ranks = CASES[world][index], _results(world)[index]
    element = torch.empty((), dtype=case.dtype).element_size()
    size = AttentionSize(
        BATCH, SEQ, case.heads, case.kv_heads, HEAD_DIM, element, max(element, 4), case.window
    )
    for rank, result in enumerate(ranks):
        want = sent_bytes(case.plan(world), size, rank)
        assert result.forward == want.forward
        assert result.backward == want.backward
    alone = case.window == 1 and case.flavour != "all_gather"  # every token sees itself only
    assert alone != any(r.forward for r in ranks)
