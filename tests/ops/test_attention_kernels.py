"""Every back end against the definition: output, log-sum-exp, and gradients from the whole row's statistics."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from trainsys.ops.attention import reference_attention
from trainsys.ops.attention_kernels import (
    CpuFlashKernel,
    Kernel,
    ReferenceKernel,
    Visible,
    as_mask,
    kernel_for,
    named_kernel,
)
from trainsys.ops.attention_seam import Rule, WholeRows, attend

GPU = pytest.mark.gpu
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def cuda_kernel() -> Kernel:
    from trainsys.ops.attention_cuda import CudaKernel

    return CudaKernel()


def flex_kernel() -> Kernel:
    from trainsys.ops.attention_flex import FlexKernel

    return FlexKernel()


BACK_ENDS: list[Any] = [
    pytest.param(ReferenceKernel, "cpu", torch.float64, 1e-12, id="reference"),
    pytest.param(CpuFlashKernel, "cpu", torch.float64, 1e-12, id="cpu-fp64"),
    pytest.param(CpuFlashKernel, "cpu", torch.float32, 1e-6, id="cpu-fp32"),
    pytest.param(CpuFlashKernel, "cpu", torch.bfloat16, 2e-2, id="cpu-bf16"),
    pytest.param(cuda_kernel, "cuda", torch.float32, 1e-4, id="cuda-fp32", marks=[GPU, needs_cuda]),
    pytest.param(cuda_kernel, "cuda", torch.bfloat16, 2e-2, id="cuda-bf16", marks=[GPU, needs_cuda]),
    pytest.param(flex_kernel, "cuda", torch.bfloat16, 2e-2, id="flex-bf16", marks=[GPU, needs_cuda]),
]


def sees(kind: str, s: int, t: int) -> Visible:
    if kind == "mask":
        mask = torch.rand(2, 1, s, t, generator=torch.Generator().manual_seed(1)) < 0.6
        mask[0, :, 1] = False  # a query that sees nothing
        return mask
    return "causal" if kind == "causal" else "all"


def gap(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double().cpu() - want).norm() / want.norm())


@pytest.mark.parametrize(("make", "device", "dtype", "tolerance"), BACK_ENDS)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("kind", ["all", "causal", "mask"])
def test_two_blocks_are_the_whole(
    make: Any, device: str, dtype: torch.dtype, tolerance: float, kv_heads: int, kind: str
) -> None:
    """Keys 0-36 and 37-73: each block alone has the reference's out and lse, and their gradients, given the
    out and lse of both, add up to those of one attention over all keys."""
    kernel: Kernel = make()
    s = 37
    g = torch.Generator().manual_seed(0)
    q, dout = (torch.randn(2, s, 4, 16, generator=g).to(dtype) for _ in range(2))
    k, v = (torch.randn(2, 2 * s, kv_heads, 16, generator=g).to(dtype) for _ in range(2))
    visible = sees(kind, s, s)
    mask = as_mask(visible, s, s, torch.device("cpu"))
    mask = torch.ones(1, 1, s, s, dtype=torch.bool) if mask is None else mask
    exact = [x.to(torch.float64, copy=True).requires_grad_() for x in (q, k, v)]
    whole, lse = reference_attention(*exact, torch.cat([mask, torch.ones_like(mask)], dim=-1))
    whole.backward(dout.double())

    there = visible.to(device) if isinstance(visible, torch.Tensor) else visible
    q, k, v, dout = (x.to(device) for x in (q, k, v, dout))
    dq, (dk, dv) = torch.zeros_like(q, dtype=torch.float64), torch.zeros(2, *k.shape, dtype=torch.float64)
    dq = dq.cpu()
    for keys, block, block_mask in ((slice(s), there, mask), (slice(s, None), "all", None)):
        out, part = kernel.forward(q, k[:, keys], v[:, keys], block)
        want, want_part = reference_attention(
            exact[0].detach(),
            exact[1].detach()[:, keys],
            exact[2].detach()[:, keys],
            torch.ones(()).bool() if block_mask is None else block_mask,
        )
        assert out.dtype == dtype
        assert part.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert gap(out, want) < tolerance
        assert torch.equal(part.cpu().isinf(), want_part.isinf())
        torch.testing.assert_close(part.double().cpu(), want_part, rtol=tolerance, atol=tolerance)
        a, b, c = kernel.backward(
            dout, q, k[:, keys], v[:, keys], whole.detach().to(q), lse.detach().to(part), block
        )
        dq += a.double().cpu()
        dk[:, keys] += b.double().cpu()
        dv[:, keys] += c.double().cpu()
    for x, want in zip((dq, dk, dv), exact, strict=True):
        assert want.grad is not None
        assert gap(x, want.grad) < 2 * tolerance


def test_the_seam_is_differentiable_attention_and_says_its_log_sum_exp() -> None:
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 12, h, 8, generator=g, dtype=torch.float64).requires_grad_() for h in (4, 2, 2))
    docs = (torch.arange(12) > 6).long().expand(2, 12)
    distance = torch.arange(12).unsqueeze(1) - torch.arange(12)
    mask = (distance >= 0) & (distance < 4) & (docs[0].unsqueeze(1) == docs[0])
    want, want_lse = reference_attention(q, k, v, mask)
    got, lse = attend(q, k, v, WholeRows(), Rule(window=4, docs=docs))
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(lse, want_lse)
    assert not lse.requires_grad
    dout = torch.randn_like(want)
    for a, b in zip(
        torch.autograd.grad(got, (q, k, v), dout), torch.autograd.grad(want, (q, k, v), dout), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_cpu_gets_the_cpu_kernel() -> None:
    assert isinstance(kernel_for(torch.empty(1)), CpuFlashKernel)


def test_a_kernel_is_chosen_by_name() -> None:
    from trainsys.ops.attention_flex import FlexKernel

    assert named_kernel("auto") is None
    assert isinstance(named_kernel("flex"), FlexKernel)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("kind", ["all", "causal", "mask"])
def test_flex_forward_on_the_cpu_and_its_missing_backward(kind: str) -> None:
    from trainsys.ops.attention_flex import FlexKernel

    kernel = FlexKernel(compiled=False)
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 37, h, 16, generator=g) for h in (4, 2, 2))
    masks = [sees(kind, 37, 37)]
    if isinstance(masks[0], torch.Tensor):
        masks.append(masks[0][1:])  # one mask for both rows
    for mask in masks:
        got, lse = kernel.forward(q, k, v, mask)
        want, want_lse = ReferenceKernel().forward(q, k, v, mask)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(lse, want_lse)
    with pytest.raises(NotImplementedError, match="use CpuFlashKernel"):
        kernel.backward(got, q, k, v, got, lse, "all")
