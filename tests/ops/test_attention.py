"""The reference against torch's attention, the fast path against the reference."""

from __future__ import annotations

import pytest
import torch

from trainsys.ops.attention import causal_attention, reference_attention


def qkv(b: int, s: int, t: int, h: int, k: int, d: int, seed: int = 0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    shapes = (b, s, h, d), (b, t, k, d), (b, t, k, d)
    return [torch.randn(shape, generator=g, dtype=dtype).requires_grad_() for shape in shapes]


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
def test_fast_path_equals_reference(kv_heads):
    q, k, v = qkv(2, 10, 10, 4, kv_heads, 8)
    want, _ = reference_attention(q, k, v)
    got = causal_attention(q, k, v)
    torch.testing.assert_close(got, want)
    dy = torch.randn_like(want)
    for a, b in zip(
        torch.autograd.grad(got, (q, k, v), dy), torch.autograd.grad(want, (q, k, v), dy), strict=True
    ):
        torch.testing.assert_close(a, b)
