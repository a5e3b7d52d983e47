"""The mask rule pair by pair, the reference against torch's attention, the fast path against the reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainsys.ops.attention import attention, attention_mask, reference_attention


def qkv(b: int, s: int, t: int, h: int, k: int, d: int, seed: int = 0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    shapes = (b, s, h, d), (b, t, k, d), (b, t, k, d)
    return [torch.randn(shape, generator=g, dtype=dtype).requires_grad_() for shape in shapes]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_mask_is_the_rule_applied_to_each_pair(data):
    s = data.draw(st.integers(1, 9))
    window = data.draw(st.none() | st.integers(1, 10))
    docs = data.draw(st.none() | st.lists(st.integers(0, 2), min_size=s, max_size=s))
    some = data.draw(st.lists(st.integers(0, s - 1), min_size=1, max_size=s, unique=True))
    all_docs = None if docs is None else torch.tensor([docs])
    mask = attention_mask(
        len(some),
        s,
        window=window,
        q_docs=None if all_docs is None else all_docs[:, some],
        k_docs=all_docs,
        q_positions=torch.tensor([some]),
        k_positions=torch.arange(s).unsqueeze(0),
    )
    for row, i in enumerate(some):
        for j in range(s):
            sees = j <= i and (window is None or j > i - window) and (docs is None or docs[i] == docs[j])
            assert mask[0, 0, row, j].item() == sees
    whole = attention_mask(s, s, window=window, q_docs=all_docs, k_docs=all_docs)
    if whole is None:
        assert docs is None
        assert window is None or window >= s
    else:
        assert torch.equal(whole[0, 0, some], mask[0, 0])


def test_reference_is_torchs_attention_and_its_lse_normalises_the_weights():
    q, k, v = qkv(2, 6, 6, 2, 2, 8)
    out, lse = reference_attention(q, k, v)
    want = torch.nn.functional.scaled_dot_product_attention(
        *(t.transpose(1, 2) for t in (q, k, v)), is_causal=True
    )
    torch.testing.assert_close(out, want.transpose(1, 2))
    scores = torch.einsum("bshd,bthd->bhst", q, k) / 8**0.5
    weights = torch.exp(scores - lse.unsqueeze(-1)).tril()
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(lse))


def test_a_query_that_sees_nothing_is_neutral():
    q, k, v = qkv(1, 3, 3, 1, 1, 4)
    visible = torch.tensor([[True, False, True], [False, False, False], [True, True, True]])
    out, lse = reference_attention(q, k, v, visible)
    assert torch.equal(lse[0, 0] == float("-inf"), torch.tensor([False, True, False]))
    assert torch.equal(out[0, 1], torch.zeros(1, 4, dtype=torch.float64))
    assert out.isfinite().all()


def test_merging_parts_by_their_lse_gives_the_whole():
    """What ring attention relies on."""
    q, k, v = qkv(1, 8, 8, 4, 2, 4)
    visible = torch.ones(8, 8, dtype=torch.bool).tril()
    whole, _ = reference_attention(q, k, v)
    outs, lses = zip(
        *(reference_attention(q, k[:, a:b], v[:, a:b], visible[:, a:b]) for a, b in ((0, 3), (3, 8))),
        strict=True,
    )
    share = torch.softmax(torch.stack(lses), dim=0).transpose(2, 3).unsqueeze(-1)
    torch.testing.assert_close((share * torch.stack(outs)).sum(0), whole)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("window", [None, 3, 100])
@pytest.mark.parametrize("documents", [False, True])
def test_fast_path_equals_reference(kv_heads, window, documents):
    q, k, v = qkv(2, 10, 10, 4, kv_heads, 8)
    docs = torch.tensor([[0] * 4 + [1] * 6, [5] * 7 + [3] * 3]) if documents else None
    distance = torch.arange(10).unsqueeze(1) - torch.arange(10)
    visible = (distance >= 0) & (distance < (window or 100))
    if docs is not None:
        visible = (visible & (docs.unsqueeze(2) == docs.unsqueeze(1))).unsqueeze(1)
    want, _ = reference_attention(q, k, v, visible)
    got = attention(q, k, v, window=window, q_docs=docs, k_docs=docs)
    torch.testing.assert_close(got, want)
    dy = torch.randn_like(want)
    for a, b in zip(
        torch.autograd.grad(got, (q, k, v), dy), torch.autograd.grad(want, (q, k, v), dy), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_queries_of_some_positions_against_all_keys():
    q, k, v = qkv(1, 12, 12, 4, 2, 8)
    whole = attention(q, k, v)
    some = torch.tensor([[0, 1, 2, 9, 10, 11]])  # a zigzag shard
    part = attention(q[:, some[0]], k, v, q_positions=some, k_positions=torch.arange(12).unsqueeze(0))
    torch.testing.assert_close(part, whole[:, some[0]])


def test_a_mask_made_before_is_used_as_it_is():
    q, k, v = qkv(1, 5, 5, 2, 1, 4)
    itself = torch.eye(5, dtype=torch.bool).view(1, 1, 5, 5)
    torch.testing.assert_close(attention(q, k, v, mask=itself), v.expand(1, 5, 2, 4))
