"""How fast the device can be at what a Llama-3-8B asks of it: products, attention, copies."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpu_checks import Setting
from gpu_checks.bed import rate
from gpu_checks.machine import smi
from trainsys.config.loader import load_run
from trainsys.config.model import ModelConfig
from trainsys.flops import Gemm, causal_pairs, head_gemm, layer_gemms, packed_pairs
from trainsys.ops.attention import causal_attention
from trainsys.ops.attention_flex import FlexKernel
from trainsys.ops.attention_kernels import Kernel, kernel_for
from trainsys.ops.attention_rule import Rule
from trainsys.ops.attention_seam import WholeRows, attend
from trainsys.ops.documents import Documents
from trainsys.ops.grouped import grouped_matmul

TOKENS = 8192


def _model(at: Setting) -> ModelConfig:
    return load_run("train/demo" if at.tiny else "train/llama3-8b").model


def _gemms(at: Setting) -> dict[str, Gemm]:
    model = _model(at)
    gemms = (*layer_gemms(model), head_gemm(model))
    return {f"{g.n}x{g.k}": g for g in gemms}


def matmuls(at: Setting) -> dict[str, Any]:
    """TFLOP/s of each product of a layer and of the head in bf16: forward, and the gradients of input and weight.

    Random values, warm first: zeros draw less power, so that clocks stay higher than training ever sees.
    """
    tokens = 64 if at.tiny else TOKENS
    found: dict[str, Any] = {"tokens": tokens, "tflops": {}}
    make = partial(torch.randn, device=at.device, dtype=torch.bfloat16)
    warm = make(256, 256) if at.tiny else make(8192, 8192)
    rate(at, lambda: warm @ warm, 1.0, seconds=3.0)
    for name, g in _gemms(at).items():
        x, w, grad = make(tokens, g.k), make(g.n, g.k), make(tokens, g.n)
        assert torch.allclose((x[:2] @ w.T).float(), x[:2].float() @ w.float().T, rtol=2e-2, atol=2e-2 * g.k**0.5), name
        flops = 2.0 * tokens * g.n * g.k
        products: dict[str, Callable[[], Tensor]] = {
            "forward": lambda x=x, w=w: x @ w.T,
            "input": lambda grad=grad, w=w: grad @ w,
            "weight": lambda grad=grad, x=x: grad.T @ x,
        }
        found["tflops"][name] = {k: rate(at, run, flops, 0.2) / 1e12 for k, run in products.items()}
    found["smi"] = smi("clocks.sm", "power.draw", "clocks_event_reasons.active")
    return found


def fp8_matmuls(at: Setting) -> dict[str, Any]:
    """The same forward in e4m3 with one scale a tensor, by torch's own product: the ceiling of FP8 training."""
    if at.cuda and torch.cuda.get_device_capability(at.device) < (8, 9):
        return {"none": "no FP8 before capability 8.9"}
    tokens = 64 if at.tiny else TOKENS
    one = torch.ones((), device=at.device)
    found = {}
    for name, g in _gemms(at).items():
        x, w = (torch.randn(n, g.k, device=at.device).to(torch.float8_e4m3fn) for n in (tokens, g.n))
        run = partial(torch._scaled_mm, x, w.T, one, one, out_dtype=torch.bfloat16)
        wanted = x[:4].float() @ w.float().T
        gap = ((run()[:4].float() - wanted).norm() / wanted.norm()).item()
        assert gap < 1e-2, f"{name}: {gap:.1e} off"
        found[name] = rate(at, run, 2.0 * tokens * g.n * g.k, 0.2) / 1e12
    return {"tokens": tokens, "tflops": found}


def copies(at: Setting) -> dict[str, Any]:
    """GB/s within the device, bytes read and written, and from pinned memory to it."""
    source = torch.ones(1 << (20 if at.tiny else 30), dtype=torch.uint8, device=at.device)
    target = torch.empty_like(source)
    found = {"gb_s": rate(at, partial(target.copy_, source), 2.0 * source.nbytes) / 1e9}
    if at.cuda:
        host = torch.empty(1 << 28, dtype=torch.uint8, pin_memory=True)
        there = torch.empty_like(host, device=at.device)
        found["host_to_device_gb_s"] = rate(at, partial(there.copy_, host, non_blocking=True), host.nbytes) / 1e9
        found["device_to_host_gb_s"] = rate(at, partial(host.copy_, there, non_blocking=True), host.nbytes) / 1e9
    return found


def experts(at: Setting) -> dict[str, Any]:
    """The grouped product, one group empty: right, and its TFLOP/s forward."""
    rows, wide, deep, groups = (64, 32, 16, 4) if at.tiny else (16384, 2048, 1408, 64)
    x = torch.randn(rows, wide, device=at.device, dtype=torch.bfloat16, requires_grad=True)
    w = torch.randn(groups, deep, wide, device=at.device, dtype=torch.bfloat16, requires_grad=True)
    each = rows // (groups - 1)
    sizes = [each] * (groups - 2) + [0, rows - each * (groups - 2)]
    counts = torch.tensor(sizes, device=at.device)
    y = grouped_matmul(x, w, counts)
    y.backward(grad := torch.randn_like(y))
    parts = list(zip(x.detach().float().split(sizes), w.detach().float(), grad.float().split(sizes), strict=True))
    wanted = {
        "y": torch.cat([r @ m.T for r, m, _ in parts]),
        "dx": torch.cat([g @ m for _, m, g in parts]),
        "dw": torch.stack([g.T @ r for r, _, g in parts]),
    }
    got = {"y": y.detach(), "dx": x.grad, "dw": w.grad}
    gaps = {k: ((got[k].float() - v).norm() / v.norm()).item() for k, v in wanted.items()}  # type: ignore[union-attr]
    assert max(gaps.values()) < 1e-2, gaps
    run = partial(grouped_matmul, x.detach(), w.detach(), counts)
    return {"gaps": gaps, "tflops": rate(at, run, 2.0 * rows * wide * deep) / 1e12}


def attentions(at: Setting) -> dict[str, Any]:
    """TFLOP/s forward, and forward with backward, of each way to attention at an 8B's heads and 8k tokens."""
    model = _model(at)
    length = 64 if at.tiny else TOKENS
    head = model.dim_per_head
    make = partial(torch.randn, device=at.device, dtype=torch.bfloat16)
    q, k, v = (make(1, length, n, head, requires_grad=True) for n in (model.n_heads, *[model.kv_heads] * 2))
    part = length // 8
    runs = tuple((n * part, (n + 1) * part) for n in range(8))
    rule, rows = Rule(docs=Documents((runs,), batch=1, seq=length)), WholeRows()
    flops = 4.0 * model.n_heads * head * causal_pairs(length)
    found: dict[str, Any] = {"tokens": length}

    def both(run: Callable[[], Tensor], flops: float) -> dict[str, float]:
        grad = torch.randn_like(run())
        return {
            "forward": rate(at, run, flops, 0.3) / 1e12,
            "both": rate(at, lambda: torch.autograd.grad(run(), (q, k, v), grad), 3.5 * flops, 0.5) / 1e12,
        }

    found["causal"] = both(lambda: causal_attention(q, k, v), flops)
    packed = 4.0 * model.n_heads * head * packed_pairs([part] * 8)
    found["8 documents"] = both(lambda: attend(q, k, v, rows, rule)[0], packed)
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
        with sdpa_kernel(backend):
            try:
                found[backend.name] = both(lambda: _sdpa(q, k, v), flops)
            except RuntimeError as error:  # torch has not this one for the device or the shape
                found[backend.name] = str(error).splitlines()[0][:120]
    kernels: dict[str, Kernel] = {"seam": kernel_for(q)}
    if at.cuda:
        kernels["flex"] = FlexKernel()
    for name, kernel in kernels.items():
        found[name] = _seam(at, kernel, (q.detach(), k.detach(), v.detach()), flops)
    return found


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), is_causal=True, enable_gqa=True)


def _seam(at: Setting, kernel: Kernel, qkv: tuple[Tensor, Tensor, Tensor], flops: float) -> dict[str, float]:
    """The blockwise kernel that context parallelism and Selective Checkpoint++ use, at its two halves."""
    out, lse = kernel.forward(*qkv, "causal")
    wanted = causal_attention(*qkv)
    gap = ((out.float() - wanted.float()).norm() / wanted.float().norm()).item()
    assert gap < 1e-2, f"the blockwise kernel is {gap:.1e} off"
    grad = torch.randn_like(out)
    forward = rate(at, lambda: kernel.forward(*qkv, "causal"), flops, 0.3)
    backward = rate(at, lambda: kernel.backward(grad, *qkv, out, lse, "causal"), 2.5 * flops, 0.3)
    return {"forward": forward / 1e12, "backward": backward / 1e12}
