"""Which keys each query sees, pair by pair, in every form that a kernel is given it in."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trainsys.ops import attention_flex
from trainsys.ops.attention_kernels import as_mask
from trainsys.ops.attention_rule import Band, Block, Rule
from trainsys.ops.documents import Documents

CPU = torch.device("cpu")
SEQ, ROWS = 14, 2


def brute(window: int | None, ids: list[list[int]] | None, q: range, k: range) -> Tensor:
    """bool ``[ROWS, len(q), len(k)]``"""
    return torch.tensor(
        [
            [
                [
                    j <= i and (window is None or i - j < window) and (ids is None or ids[b][i] == ids[b][j])
                    for j in k
                ]
                for i in q
            ]
            for b in range(ROWS)
        ]
    )


@st.composite
def rules(draw: st.DrawFn) -> tuple[int | None, list[list[int]] | None]:
    window = draw(st.none() | st.integers(1, SEQ + 1))
    if draw(st.booleans()):
        return window, None
    borders = draw(
        st.lists(st.lists(st.booleans(), min_size=SEQ, max_size=SEQ), min_size=ROWS, max_size=ROWS)
        | st.lists(st.booleans(), min_size=SEQ, max_size=SEQ).map(lambda row: [row] * ROWS)
    )
    return window, [np.cumsum(row).tolist() for row in borders]


def rule_of(window: int | None, ids: list[list[int]] | None) -> Rule:
    return Rule(window, None if ids is None else Documents.of(np.array(ids)))


@st.composite
def spans(draw: st.DrawFn) -> range:
    start = draw(st.integers(0, SEQ - 1))
    return range(start, draw(st.integers(start + 1, SEQ)))


@settings(deadline=None, max_examples=150)
@given(rules(), spans(), spans(), st.none() | st.integers(1, 4))
def test_a_block_is_what_the_rule_says_of_each_pair(drawn, q: range, k: range, tile: int | None) -> None:
    want = brute(*drawn, q, k)
    found = rule_of(*drawn).block(q, k)
    if found is None:
        assert not want.any()
        return
    queries, keys, sees = found
    assert want.any(), "computes a block that is empty"
    inside = np.ix_(range(ROWS), [i - q.start for i in queries], [j - k.start for j in keys])
    assert want.sum() == want[inside].sum(), "leaves out what is seen"
    for edge in (want[inside][:, 0], want[inside][:, -1], want[inside][..., 0], want[inside][..., -1]):
        assert edge.any(), "more than what is seen"
    _whole_is_the_same(rule_of(*drawn), q, k, want)
    mask = as_mask(sees, len(queries), len(keys), CPU)
    mask = torch.ones(1, 1, len(queries), len(keys), dtype=torch.bool) if mask is None else mask
    assert torch.equal(mask[:, 0].expand_as(want[inside]), want[inside])
    if want[inside].all():
        assert sees == "all", "masks a block that needs none"
    if isinstance(sees, Block):
        _pieces_are_the_mask(sees, want[inside], tile)


def _whole_is_the_same(rule: Rule, q: range, k: range, want: Tensor) -> None:
    found = rule.block(q, k, whole=True)
    assert found is not None
    assert found[:2] == (q, k)
    mask = as_mask(found[2], len(q), len(k), CPU)
    mask = torch.ones(1, 1, len(q), len(k), dtype=torch.bool) if mask is None else mask
    assert torch.equal(mask[:, 0].expand_as(want), want)


def _pieces_are_the_mask(block: Block, want: Tensor, tile: int | None) -> None:
    got, asked = torch.zeros_like(want), torch.zeros(want.shape[:2], dtype=torch.int64)
    for p in block.pieces(tile):
        n, m = p.q.stop - p.q.start, p.k.stop - p.k.start
        if isinstance(p.sees, Band):
            seen = p.sees.mask(n, m, CPU)[0, 0]
            assert tile is None or n <= tile
            assert not seen.all(), "masks a piece that needs none"
        else:
            seen = torch.ones(n, m, dtype=torch.bool)
            seen = seen.tril() if p.sees == "causal" else seen
            assert p.sees == "all" or n == m
        assert seen.any(0).all()
        assert seen.any(1).all(), "a query of a piece that sees nothing"
        got[p.rows, p.q, p.k] |= seen
        asked[p.rows, p.q] += 1
    assert torch.equal(got, want)
    assert asked.max() <= 1, "a query in two pieces, whose results nobody merges"


@settings(deadline=None, max_examples=50)
@given(rules(), spans())
def test_cumulative_lengths_are_of_the_documents_in_a_span(drawn, span: range) -> None:
    edges, longest = Block(rule_of(*drawn), span, span).sequences(ROWS, CPU)
    ids = drawn[1] or [[0] * SEQ] * ROWS
    flat = [(b, ids[b][i]) for b in range(ROWS) for i in span]
    want = [0] + [n for n in range(1, len(flat)) if flat[n] != flat[n - 1]] + [len(flat)]
    assert edges.dtype == torch.int32
    assert edges.tolist() == want
    assert longest == max(b - a for a, b in pairwise(want))


@settings(deadline=None, max_examples=60)
@given(rules(), spans(), spans())
def test_flex_is_told_which_blocks_hold_anything_and_which_are_full(drawn, q: range, k: range) -> None:
    want = brute(*drawn, q, k)
    size, before = 3, attention_flex.SIZE
    attention_flex.SIZE = size
    try:
        block = Block(rule_of(*drawn), q, k)
        mask = attention_flex.block_mask(block, CPU)
        assert attention_flex.block_mask(block, CPU) is mask, "made anew for each layer"
    finally:
        attention_flex.SIZE = before
    places = [torch.arange(n) for n in (ROWS, 1, len(q), len(k))]
    assert torch.equal(mask.mask_mod(*torch.meshgrid(*places, indexing="ij"))[:, 0], want)
    for b in range(ROWS):
        row = b % mask.kv_num_blocks.shape[0]
        for i in range(-(-len(q) // size)):
            listed = {
                kind: set(indices[row, 0, i, : numbers[row, 0, i]].tolist())
                for kind, numbers, indices in (
                    ("partial", mask.kv_num_blocks, mask.kv_indices),
                    ("full", mask.full_kv_num_blocks, mask.full_kv_indices),
                )
            }
            for j in range(-(-len(k) // size)):
                cell = want[b, size * i : size * (i + 1), size * j : size * (j + 1)]
                full = cell.numel() == size * size and bool(cell.all())
                assert (j in listed["full"]) == full
                assert (j in listed["partial"]) == (bool(cell.any()) and not full)


def test_documents_are_runs_and_rows_that_are_alike_are_one() -> None:
    docs = Documents.of(torch.tensor([[5, 5, 3, 3, 3], [0, 1, 1, 1, 2]]))
    assert docs.rows == (((0, 2), (2, 5)), ((0, 1), (1, 4), (4, 5)))
    assert docs.starts().tolist() == [[0, 0, 2, 2, 2], [0, 1, 1, 1, 4]]
    assert docs.pairs() == 3 + 6 + 1 + 6 + 1
    assert Documents.of(docs) is docs
    alike = Documents.of(np.array([[0, 0, 1], [4, 4, 7]]))
    assert alike.rows == (((0, 2), (2, 3)),)
    assert alike.pairs() == 2 * (3 + 1)


def test_documents_in_pieces_are_refused() -> None:
    with pytest.raises(AssertionError, match="must be next to each other"):
        Documents.of(np.array([[0, 0, 1, 0]]))
