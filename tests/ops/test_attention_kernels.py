"""Every back end against the definition: output, log-sum-exp, and gradients from the whole row's statistics."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from support.flash import EmulatedFlash, Ops
from trainsys.ops import attention_pieces
from trainsys.ops.attention import reference_attention
from trainsys.ops.attention_kernels import CpuFlashKernel, Kernel, ReferenceKernel, kernel_for, named_kernel
from trainsys.ops.attention_rule import Block, Rule
from trainsys.ops.attention_seam import WholeRows, attend
from trainsys.ops.documents import Documents

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
    pytest.param(EmulatedFlash, "cpu", torch.bfloat16, 2e-2, id="flash-emulated"),
    pytest.param(cuda_kernel, "cuda", torch.float32, 1e-4, id="cuda-fp32", marks=[GPU, needs_cuda]),
    pytest.param(cuda_kernel, "cuda", torch.bfloat16, 2e-2, id="cuda-bf16", marks=[GPU, needs_cuda]),
    pytest.param(flex_kernel, "cuda", torch.bfloat16, 2e-2, id="flex-bf16", marks=[GPU, needs_cuda]),
]


S = 37
# Row 0: a document from place 20 reaches 13 tokens into the second half; row 1: one from 33 reaches 4.
BORDERS = ((20, 50, 51), (5, 33, 41))


def ids() -> torch.Tensor:
    starts = torch.zeros(2, 2 * S, dtype=torch.int64)
    for row, borders in zip(starts, BORDERS, strict=True):
        row[list(borders)] = 1
    return starts.cumsum(1)


def rule(kind: str) -> Rule:
    return Rule(11 if "window" in kind else None, Documents.of(ids()) if "documents" in kind else None)


def every_pair(kind: str) -> torch.Tensor:
    """bool ``[2, 1, 2 S, 2 S]``"""
    distance = torch.arange(2 * S).unsqueeze(1) - torch.arange(2 * S)
    seen = (distance >= 0) & (distance < (11 if "window" in kind else 2 * S))
    same = ids().unsqueeze(2) == ids().unsqueeze(1)
    return (seen & same if "documents" in kind else seen.expand(2, -1, -1)).unsqueeze(1)


KINDS = ["causal", "documents", "window", "documents, window"]


def gap(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double().cpu() - want).norm() / want.norm())


@pytest.mark.parametrize(("make", "device", "dtype", "tolerance"), BACK_ENDS)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_two_blocks_are_the_whole(
    make: Any,
    device: str,
    dtype: torch.dtype,
    tolerance: float,
    kv_heads: int,
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Queries 37-73 against keys 0-36 and 37-73: each block alone has the reference's out and lse, and their gradients,
    given the out and lse of both, add up to those of one attention over all keys."""
    monkeypatch.setattr(attention_pieces, "TILE", 8)
    kernel: Kernel = make()
    g = torch.Generator().manual_seed(0)
    q, dout = (torch.randn(2, S, 4, 16, generator=g).to(dtype) for _ in range(2))
    k, v = (torch.randn(2, 2 * S, kv_heads, 16, generator=g).to(dtype) for _ in range(2))
    seen = every_pair(kind)[:, :, S:]
    exact = [x.to(torch.float64, copy=True).requires_grad_() for x in (q, k, v)]
    whole, lse = reference_attention(*exact, seen)
    whole.backward(dout.double())

    q, k, v, dout = (x.to(device) for x in (q, k, v, dout))
    dq, (dk, dv) = torch.zeros(2, S, 4, 16).double(), torch.zeros(2, *k.shape, dtype=torch.float64)
    for near in (False, True):
        found = rule(kind).block(range(S, 2 * S), range(S, 2 * S) if near else range(S))
        assert found is not None
        rows, keys, visible = slice(found[0].start - S, found[0].stop - S), slice(found[1].start, found[1].stop), found[2]
        assert isinstance(visible, Block) == (kind != "causal")
        out, part = kernel.forward(q[:, rows], k[:, keys], v[:, keys], visible)
        want, want_part = reference_attention(
            exact[0].detach()[:, rows], *(x.detach()[:, keys] for x in exact[1:]), seen[:, :, rows, keys]
        )
        assert out.dtype == dtype
        assert part.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert gap(out, want) < tolerance
        if kind == "documents" and not near:
            assert want_part.isinf().any(), "of one row more queries see something than of the other"
        assert torch.equal(part.cpu().isinf(), want_part.isinf())
        torch.testing.assert_close(part.double().cpu(), want_part, rtol=tolerance, atol=tolerance)
        a, b, c = kernel.backward(
            dout[:, rows],
            q[:, rows],
            k[:, keys],
            v[:, keys],
            whole.detach().to(q)[:, rows],
            lse.detach().to(part)[..., rows],
            visible,
        )
        dq[:, rows] += a.double().cpu()
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
    got, lse = attend(q, k, v, WholeRows(), Rule(window=4, docs=Documents.of(docs)))
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
@pytest.mark.parametrize("kind", KINDS)
def test_flex_forward_on_the_cpu_and_its_missing_backward(kind: str) -> None:
    from trainsys.ops.attention_flex import FlexKernel

    kernel, row = FlexKernel(compiled=False), range(2 * S)
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 2 * S, h, 16, generator=g) for h in (4, 2, 2))
    got, lse = attend(q, k, v, WholeRows(kernel), rule(kind))
    want, want_lse = reference_attention(q, k, v, every_pair(kind))
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(lse, want_lse)
    found = rule(kind).block(row, row)
    assert found is not None
    with pytest.raises(NotImplementedError, match="use CpuFlashKernel"):
        kernel.backward(got, q, k, v, got, lse, found[2])


@pytest.mark.parametrize("kind", KINDS)
def test_whole_rows_by_flash_are_one_call(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name in ("_flash_attention_forward", "_flash_attention_backward"):
        real = getattr(Ops, name)
        monkeypatch.setattr(Ops, name, lambda *a, _real=real, _name=name, **k: calls.append(_name) or _real(*a, **k))
    g = torch.Generator().manual_seed(0)
    leaves = [torch.randn(2, 2 * S, h, 16, generator=g).bfloat16().requires_grad_() for h in (4, 2, 2)]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    got, _ = attend(*leaves, WholeRows(EmulatedFlash()), rule(kind))
    want, _ = reference_attention(*exact, every_pair(kind))
    assert gap(got.detach(), want.detach()) < 2e-2
    dout = torch.randn(want.shape, generator=g)
    for a, b in zip(
        torch.autograd.grad(got, leaves, dout.bfloat16()), torch.autograd.grad(want, exact, dout.double()), strict=True
    ):
        assert gap(a, b) < 4e-2
    assert calls == ["_flash_attention_forward", "_flash_attention_backward"]
