"""The product's CUDA branches on fake CUDA tensors: shapes, devices, and what would make the host wait.

Autograd asks the driver for a context, which is not there: backward functions are called directly.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trainsys.config.loader import load_run
from trainsys.models.decoder import Decoder
from trainsys.ops.attention_cuda import CudaKernel
from trainsys.ops.attention_partial import Partial
from trainsys.ops.attention_rule import Rule
from trainsys.ops.chunked_loss import chunked_cross_entropy_sum
from trainsys.ops.documents import Documents
from trainsys.ops.loss import VocabCrossEntropy, cross_entropy_sum
from trainsys.optim.norm import clip_, square_sum

pytestmark = pytest.mark.cuda_build

READS = ("_local_scalar_dense", "nonzero", "_unique2", "masked_select", "equal", "bincount")


class Census(TorchDispatchMode):
    """``waits``: operations that make the host wait for the device; ``mixed``: those that are given a tensor of each;
    ``calls``: all."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self.mixed: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func._overloadpacket.__name__
        self.calls[name] += 1
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        devices = {t.device.type for t in given}
        across = {*devices, *(t.device.type for t in tree_leaves(out) if isinstance(t, torch.Tensor))}
        if name in READS and "cuda" in devices:
            self.waits[name] += 1
        if name in ("_to_copy", "copy_"):
            if len(across) > 1 and not (kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2])):
                self.waits[f"{name} {'-'.join(sorted(across))}"] += 1
        elif len({t.device.type for t in given if t.dim()}) > 1:
            self.mixed[name] += 1
        return out


@pytest.fixture
def census(monkeypatch: pytest.MonkeyPatch) -> Iterator[Census]:
    # Fake tensors cannot be pinned; that the product pins what it sends is tests/ops/test_host_copy.py's.
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: x)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), Census() as counted:
        yield counted


def quiet(census: Census) -> None:
    assert (dict(census.waits), dict(census.mixed)) == ({}, {})


def decoder(run: str, *overrides: str) -> tuple[Decoder, int]:
    """On the fake device, and its vocabulary."""
    cfg = load_run(run, ["train.compile=false", *overrides])
    with torch.device("cuda"):
        return Decoder(cfg.model, compute_dtype=torch.bfloat16), cfg.model.vocab


def documents(seq: int, first: int) -> Documents:
    """Two, of which the first has so many tokens; the same in every row."""
    return Documents((((0, first), (first, seq)),), batch=2, seq=seq)


def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.zeros(*shape, dtype=dtype, device="cuda")


def test_the_census_sees_reads_and_mixed_devices(census: Census) -> None:
    x = torch.empty(4, device="cuda")
    x.cpu()
    x.copy_(torch.empty(4, pin_memory=False))
    x.copy_(torch.empty(4), non_blocking=True)
    assert dict(census.waits) == {"_to_copy cpu-cuda": 1, "copy_ cpu-cuda": 1}
    with pytest.raises(RuntimeError, match=r"same device|found two different devices|Unhandled FakeTensor Device"):
        torch.add(x, torch.empty(4))


@pytest.mark.parametrize("packed", [False, True], ids=["causal", "documents"])
@pytest.mark.parametrize("run", ["train/llama3-8b", "train/qwen3-0.6b"])
def test_a_forward_with_its_loss_stays_on_the_device(run: str, packed: bool, census: Census) -> None:
    model, vocab = decoder(run, "model.n_layers=2")
    census.waits.clear()  # of building it
    tokens, docs = zeros(1, 512), Documents((((0, 200), (200, 512)),), batch=1, seq=512)
    logits = model(tokens, tokens, docs if packed else None)
    loss, nll = cross_entropy_sum(logits, tokens)
    assert (logits.shape, logits.device.type, loss.device.type, nll.device.type) == (
        (1, 512, vocab), "cuda", "cuda", "cuda",
    )  # fmt: skip
    # The frequencies of the rotary embedding are sent once, by the first forward.
    once = dict(census.waits)
    assert once in ({}, {"_to_copy cpu-cuda": 1}, {"copy_ cpu-cuda": 1})
    census.waits.clear()
    model(tokens, tokens, docs if packed else None)
    quiet(census)


@pytest.mark.parametrize("visible", ["all", "causal", "documents"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("heads", [(8, 2), (4, 4)], ids=["grouped", "plain"])
def test_the_kernels_have_the_shapes_they_should(
    visible: str, dtype: torch.dtype, heads: tuple[int, int], census: Census
) -> None:
    """Rows of 90: the efficient kernel wants 8, and gives a log-sum-exp of 96. Documents of 40 and 50 tokens are one call
    of flash, and one of the efficient kernel each."""
    kernel, shape = CudaKernel(), SimpleNamespace(b=2, s=90, d=64)
    q = torch.empty(shape.b, shape.s, heads[0], shape.d, device="cuda", dtype=dtype)
    k = torch.empty(shape.b, shape.s, heads[1], shape.d, device="cuda", dtype=dtype)
    see: Any = visible
    if visible == "documents":
        part = Rule(docs=documents(90, 40)).block(range(90), range(90))
        assert part is not None
        see = part[2]
    out, lse = kernel.forward(q, k, k, see)
    assert (out.shape, lse.shape, lse.dtype) == (q.shape, (2, heads[0], 90), torch.float32)
    grads = kernel.backward(out, q, k, k, out, lse, see)
    assert [g.shape for g in grads] == [q.shape, k.shape, k.shape]
    assert {g.device.type for g in grads} == {"cuda"}
    Partial(q).merge(out, lse)
    quiet(census)
    flash = dtype == torch.bfloat16
    wanted = "_flash_attention" if flash else "_scaled_dot_product_efficient_attention"
    backward = f"{wanted}_backward"
    calls = 2 if visible == "documents" and not flash else 1
    assert census.calls[f"{wanted}_forward" if flash else wanted] == census.calls[backward] == calls


def test_clipping_and_the_norm_ask_the_device_nothing(census: Census) -> None:
    grads = [torch.empty(8, 8, device="cuda"), torch.empty(3, device="cuda")]
    norm = square_sum([(g, 1) for g in grads], torch.device("cuda")).sqrt()
    clip_(grads, norm, 1.0)
    assert norm.device.type == "cuda"
    quiet(census)


def test_the_loss_in_chunks_stays_on_the_device(census: Census) -> None:
    hidden, weight = torch.empty(1, 64, 32, device="cuda"), torch.empty(128, 32, device="cuda")
    loss, nll = chunked_cross_entropy_sum(hidden, weight, zeros(1, 64), chunk=16)
    assert (loss.device.type, nll.device.type) == ("cuda", "cuda")
    quiet(census)


class Context:
    """What autograd would hand a function."""

    def save_for_backward(self, *tensors: torch.Tensor) -> None:
        self.saved_tensors = tensors

    def mark_non_differentiable(self, *_: torch.Tensor) -> None:
        pass


def test_the_gradient_of_the_loss_stays_on_the_device(census: Census) -> None:
    ctx: Any = Context()
    logits = torch.empty(1, 64, 128, device="cuda", dtype=torch.bfloat16)
    loss, _ = VocabCrossEntropy.forward(ctx, logits, zeros(1, 64), 1e-4, 0, None)
    grad = VocabCrossEntropy.backward(ctx, loss, loss)[0]
    assert (grad.shape, grad.dtype, grad.device.type) == (logits.shape, logits.dtype, "cuda")
    quiet(census)
