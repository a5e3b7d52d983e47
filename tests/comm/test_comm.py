"""Collectives: what they compute, that their gradients are each other's, and what the ledger says."""

from __future__ import annotations

from typing import Any

import torch

from support.ranks import run_ranks
from trainsys.comm import autograd, ops
from trainsys.comm.group import AxisGroup
from trainsys.comm.ledger import Ledger
from trainsys.layout import Layout
from trainsys.parallel.mesh import Mesh


def _mesh() -> Mesh:
    return Mesh(Layout(dp_replicate=2, tp=2), torch.device("cpu"))


def _plain(_: Any = None) -> dict[str, Any]:
    mesh = _mesh()
    tp = mesh["tp"]
    x = torch.arange(8.0).reshape(2, 4) + 100 * mesh.rank
    out = {
        "rank": mesh.rank,
        "index": tp.index,
        "sum": ops.all_reduce_(x.clone(), tp),
        "max": ops.all_reduce_(x.clone(), tp, "max"),
        "gather1": ops.all_gather(x, tp, 1),
        "scatter1": ops.reduce_scatter(x, tp, 1),
        "broadcast": ops.broadcast_(x.clone(), mesh["dp_replicate"], 1),
    }
    out["traffic"] = {k: (t.calls, t.sent_bytes) for k, t in mesh.ledger.traffic.items()}
    return out


def test_values_and_ledger() -> None:
    for r in run_ranks(4, _plain):
        base = torch.arange(8.0).reshape(2, 4)
        tp_ranks = (r["rank"] // 2 * 2, r["rank"] // 2 * 2 + 1)
        both = [base + 100 * rank for rank in tp_ranks]
        assert torch.equal(r["sum"], both[0] + both[1])
        assert torch.equal(r["max"], both[1])
        assert torch.equal(r["gather1"], torch.cat(both, dim=1))
        assert torch.equal(r["scatter1"], (both[0] + both[1]).chunk(2, dim=1)[r["index"]])
        assert torch.equal(r["broadcast"], base + 100 * (r["rank"] % 2 + 2))
        # 32 bytes of input: all-reduce 2·32·1/2, all-gather 1·32, reduce-scatter 1·16.
        assert r["traffic"]["tp", "all_reduce"] == (2, 64)
        assert r["traffic"]["tp", "all_gather"] == (1, 32)
        assert r["traffic"]["tp", "reduce_scatter"] == (1, 16)
        assert r["traffic"]["dp_replicate", "broadcast"] == (1, 32 if r["rank"] >= 2 else 0)


def _gradients(name: str, dim: int | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """This rank's input, the weights its output is dotted with, and the gradient that came back."""
    tp = _mesh()["tp"]
    generator = torch.Generator().manual_seed(tp.index)
    x = torch.randn(2, 4, 6, dtype=torch.float64, generator=generator, requires_grad=True)
    fn = getattr(autograd, name)
    # `reduce` works in place, so it is given an intermediate, as in the model.
    y = fn(x * 1.0, tp) if dim is None else fn(x * 1.0, tp, dim)
    shared = name in ("reduce", "concat")  # every rank goes on with the same value and the same loss
    w = torch.randn(
        y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(7 if shared else 70 + tp.index)
    )
    (y * w).sum().backward()
    assert x.grad is not None
    return x.detach(), w, x.grad


def test_gradients_are_those_of_the_function_over_all_ranks() -> None:
    # The loss is the sum over ranks of y·w (for `reduce` and `concat` it is one shared loss).
    for name, dim in (("copy", None), ("reduce", None), ("gather", 1), ("scatter_sum", 1), ("concat", 2)):
        results = run_ranks(4, _gradients, name, dim)
        for pair in (results[0:2], results[2:4]):
            xs = [x.clone().requires_grad_() for x, _, _ in pair]
            ws = [w for _, w, _ in pair]
            if name == "copy":
                # One x on both ranks: its gradient is the sum of what each rank made of it.
                expected = [ws[0] + ws[1]] * 2
            else:
                if name == "reduce":
                    loss = ((xs[0] + xs[1]) * ws[0]).sum()
                elif name == "gather":
                    loss = sum((torch.cat(xs, dim) * w).sum() for w in ws)
                elif name == "scatter_sum":
                    loss = sum(
                        (part * w).sum() for part, w in zip((xs[0] + xs[1]).chunk(2, dim), ws, strict=True)
                    )
                else:
                    loss = (torch.cat(xs, dim) * ws[0]).sum()
                expected = list(torch.autograd.grad(loss, xs))
            for (_, _, got), want in zip(pair, expected, strict=True):
                torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_group_of_one_does_nothing_and_counts_nothing() -> None:
    ledger = Ledger()
    g = AxisGroup("tp", (0,), 0, None, ledger)
    x = torch.randn(3, 3)
    assert ops.all_reduce_(x, g) is x
    assert ops.all_gather(x, g, 0) is x
    assert ops.reduce_scatter(x, g, 1) is x
    assert autograd.gather(x, g, 0) is x
    assert not ledger.traffic
