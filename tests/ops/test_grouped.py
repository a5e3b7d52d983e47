"""Grouped products and the permutations around them: the same as plain indexing, forward and backward."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainsys.ops.grouped import balanced, grouped_matmul
from trainsys.ops.permute import block_order, collect, invert, reorder, sort_by_expert, spread

ALIGNED, ODD = (8, 12), (5, 7)
COUNTS = [[3, 0, 5], [0, 0, 4], [0, 0, 0], [1, 1, 1]]


@pytest.mark.parametrize("shape", [ALIGNED, ODD], ids=["kernel", "loop"])
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_every_group_meets_its_own_weight(shape: tuple[int, int], counts: list[int]) -> None:
    k, n = shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(sum(counts), k, generator=generator, requires_grad=True)
    weight = torch.randn(3, n, k, generator=generator, requires_grad=True)
    out = grouped_matmul(x, weight, torch.tensor(counts))
    want = torch.cat([rows @ w.T for rows, w in zip(x.split(counts), weight, strict=True)])
    torch.testing.assert_close(out, want)
    # An expanded gradient, as a sum gives: its strides are what torch's own backward refuses.
    got = torch.autograd.grad(out.sum(), (x, weight))
    torch.testing.assert_close(got, torch.autograd.grad(want.sum(), (x, weight)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_weight_is_cast_to_the_rows(dtype: torch.dtype) -> None:
    x, weight = torch.randn(4, 8, dtype=dtype), torch.randn(2, 16, 8, requires_grad=True)
    out = grouped_matmul(x, weight, torch.tensor([1, 3]))
    assert out.dtype == dtype
    (grad,) = torch.autograd.grad(out.float().square().sum(), weight)
    assert grad.dtype == torch.float32
    assert grad.abs().min() > 0


def test_shapes_without_numbers() -> None:
    x, weight = torch.empty(7, 8, device="meta"), torch.empty(3, 16, 8, device="meta")
    assert grouped_matmul(x, weight, torch.empty(3, device="meta", dtype=torch.int64)).shape == (7, 16)
    assert balanced(7, 3) == [3, 2, 2]


choices_of = st.integers(1, 5).flatmap(
    lambda n: st.tuples(
        st.just(n), st.lists(st.lists(st.integers(0, n - 1), min_size=2, max_size=2), min_size=1, max_size=9)
    )
)


@given(choices_of, st.randoms())
def test_spread_and_collect_are_plain_indexing(case: tuple[int, list[list[int]]], random: object) -> None:
    n_experts, listed = case
    choices = torch.tensor(listed)
    tokens, k = choices.shape
    kept = torch.tensor([[random.random() < 0.7 for _ in range(k)] for _ in range(tokens)])  # type: ignore[attr-defined]
    for mask in (None, kept):
        by = sort_by_expert(choices, n_experts, mask)
        alive = torch.ones_like(kept) if mask is None else kept
        for expert in range(n_experts):
            assert by.counts[expert] == ((choices == expert) & alive).sum()
        x = torch.randn(tokens, 3, dtype=torch.float64, requires_grad=True)
        gates = torch.randn(tokens, k, dtype=torch.float64, requires_grad=True)
        rows = spread(x, by)
        experts = choices.flatten()[by.slots]
        assert torch.equal(experts, experts.sort().values)
        scale = 1.0 + experts.unsqueeze(-1)
        out = collect(rows * scale, gates, by)
        want = (gates * alive * (1.0 + choices)).sum(1, keepdim=True) * x
        torch.testing.assert_close(out, want)
        weight = torch.randn_like(out)
        got = torch.autograd.grad((out * weight).sum(), (x, gates))
        torch.testing.assert_close(got, torch.autograd.grad((want * weight).sum(), (x, gates)))


@given(st.lists(st.integers(0, 4), min_size=6, max_size=6), st.permutations(range(6)))
def test_blocks_change_places(sizes: list[int], blocks: list[int]) -> None:
    rows = torch.arange(sum(sizes))
    order = block_order(torch.tensor(sizes), torch.tensor(blocks), sum(sizes))
    parts = rows.split(sizes)
    assert torch.equal(rows[order], torch.cat([parts[b] for b in blocks]))
    x = torch.randn(sum(sizes), 2)
    assert torch.equal(reorder(reorder(x, order, invert(order)), invert(order), order), x)
