"""RMSNorm against its definition, on the path with the hand-written backward and on torch's own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trainsys.ops.norm import rms_norm


def by_definition(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 5, 4, 16)])
def test_value_and_gradients_are_those_of_the_definition(shape):
    torch.manual_seed(0)
    x, weight, dy = torch.randn(shape) * 3 + 1, torch.randn(shape[-1]), torch.randn(shape)
    ours = [t.clone().requires_grad_() for t in (x, weight)]
    exact = [t.double().requires_grad_() for t in (x, weight)]
    y, want = rms_norm(*ours, 1e-5), by_definition(*exact, 1e-5)
    assert "_CpuRmsNorm" in type(y.grad_fn).__name__
    torch.testing.assert_close(y.double(), want, rtol=1e-6, atol=1e-6)
    got_grads = torch.autograd.grad(y, ours, dy)
    want_grads = torch.autograd.grad(want, exact, dy.double())
    for got, expected in zip(got_grads, want_grads, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


def test_input_and_gradient_that_are_not_contiguous():
    base = torch.randn(6, 4, 8, requires_grad=True)
    weight, dy = torch.randn(8, requires_grad=True), torch.randn(8, 4, 6).permute(1, 2, 0)
    x = base.transpose(0, 1)
    assert not x.is_contiguous()
    assert not dy.is_contiguous()
    got, want = (torch.autograd.grad(f(x, weight, 1e-5), (x, weight), dy) for f in (rms_norm, by_definition))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_eps_counts_where_the_input_is_small():
    x, weight = torch.full((1, 8), 1e-3, requires_grad=True), torch.ones(8)
    torch.testing.assert_close(rms_norm(x, weight, 1e-6), torch.full((1, 8), 2**-0.5))


def test_bf16_is_normalised_in_fp32():
    torch.manual_seed(1)
    x, weight = torch.randn(64, 512).bfloat16(), torch.randn(512)
    want = by_definition(x.double(), weight.bfloat16().double(), 1e-5)
    y = rms_norm(x, weight, 1e-5)
    assert y.dtype == torch.bfloat16
    # One rounding at the end: half a unit in the last of bf16's 8 bits.
    assert ((y.double() - want).abs() <= want.abs() * 2**-8).all()


def test_fp64_stays_fp64():
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-5), (x, weight))
