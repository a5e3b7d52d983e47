"""Cross-entropy against torch's; the vocabulary-sharded form against the whole one."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from support.ranks import run_ranks
from trainsys.comm.group import AxisGroup
from trainsys.comm.ledger import Ledger
from trainsys.ops import loss as loss_module
from trainsys.ops.loss import VocabCrossEntropy, cross_entropy_sum


def example(b: int, s: int, v: int, seed: int = 0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    logits = (torch.randn(b, s, v, generator=g, dtype=torch.float64) * 4).to(dtype)
    labels = torch.randint(v, (b, s), generator=g)
    labels[torch.rand(b, s, generator=g) < 0.3] = -100
    return logits, labels


def by_autograd(logits, labels, z_loss):
    """(loss, nll, gradient) from torch's own pieces, in the logits' dtype."""
    leaf = logits.detach().clone().requires_grad_()
    nll = F.cross_entropy(leaf.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
    z = (torch.logsumexp(leaf, -1).square() * (labels != -100)).sum()
    loss = nll + z_loss * z
    return loss.detach(), nll.detach(), torch.autograd.grad(loss, leaf)[0]


@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize("piece", [1, 64, 2**17])
def test_sums_and_gradient_are_torchs(monkeypatch, z_loss, piece):
    monkeypatch.setattr(loss_module, "_CPU_PIECE", piece)
    logits, labels = example(3, 7, 11, dtype=torch.float64)
    leaf = logits.requires_grad_()
    loss, nll = cross_entropy_sum(leaf, labels, z_loss=z_loss)
    want_loss, want_nll, want_grad = by_autograd(logits, labels, z_loss)
    torch.testing.assert_close(loss, want_loss)
    torch.testing.assert_close(nll, want_nll)
    assert (want_loss != want_nll) == (z_loss > 0)
    assert not nll.requires_grad
    torch.testing.assert_close(torch.autograd.grad(loss, leaf)[0], want_grad)


def test_gradient_scales_with_what_the_loss_is_multiplied_by():
    logits, labels = example(2, 5, 9)
    leaf = logits.requires_grad_()
    (cross_entropy_sum(leaf, labels, z_loss=1e-3)[0] / 7).backward()
    torch.testing.assert_close(leaf.grad, by_autograd(logits, labels, 1e-3)[2] / 7)


def test_ignored_tokens_leave_no_trace():
    logits, labels = example(2, 6, 8)
    changed = torch.where((labels == -100).unsqueeze(-1), logits + 50, logits).requires_grad_()
    loss, nll = cross_entropy_sum(changed, labels, z_loss=0.1)
    want, want_nll = cross_entropy_sum(logits, labels, z_loss=0.1)
    assert (labels == -100).any()
    assert torch.equal(loss, want)
    assert torch.equal(nll, want_nll)
    loss.backward()
    assert not changed.grad[labels == -100].any()
    nothing = torch.full_like(labels, -100)
    assert cross_entropy_sum(logits, nothing, z_loss=0.1)[0] == 0


def test_bf16_logits_are_summed_in_fp32():
    logits, labels = example(2, 64, 300, dtype=torch.bfloat16)
    leaf = logits.requires_grad_()
    loss, nll = cross_entropy_sum(leaf, labels, z_loss=1e-3)
    want_loss, want_nll, want_grad = by_autograd(logits.double(), labels, 1e-3)
    assert loss.dtype == nll.dtype == torch.float32
    torch.testing.assert_close(loss.double(), want_loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(nll.double(), want_nll, rtol=1e-6, atol=0)
    loss.backward()
    assert leaf.grad.dtype == torch.bfloat16
    assert ((leaf.grad.double() - want_grad).abs() <= want_grad.abs() * 2**-8 + 1e-9).all()


def test_huge_logits_do_not_overflow():
    logits = torch.tensor([[[1e4, 0.0, -1e4]]], requires_grad=True)
    loss, _ = cross_entropy_sum(logits, torch.tensor([[1]]))
    assert loss.item() == 1e4
    loss.backward()
    assert torch.equal(logits.grad, torch.tensor([[[1.0, -1.0, 0.0]]]))


def test_a_label_beyond_the_vocabulary_is_an_error():
    logits, _ = example(1, 2, 4)
    with pytest.raises(RuntimeError):
        cross_entropy_sum(logits, torch.tensor([[1, 4]]))


def test_backward_keeps_the_logits_and_vectors_only():
    logits, labels = example(2, 8, 50)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        cross_entropy_sum(logits.requires_grad_(), labels, z_loss=1e-3)
    matrices = [t for t in saved if t.numel() > labels.numel()]
    assert [t.data_ptr() for t in matrices] == [logits.data_ptr()]


class Threads:
    """``world`` threads that reduce with one another."""

    def __init__(self, world: int) -> None:
        self.parts: list[torch.Tensor | None] = [None] * world
        self.barrier = threading.Barrier(world, timeout=30)
        self.calls = [0] * world

    def reducer(self, rank: int):
        def reduce(x: torch.Tensor, op: str) -> None:
            self.calls[rank] += 1
            self.parts[rank] = x.clone()
            self.barrier.wait()
            stacked = torch.stack(self.parts)
            self.barrier.wait()
            x.copy_(stacked.amax(0) if op == "max" else stacked.sum(0))

        return reduce


@settings(max_examples=25, deadline=None)
@given(
    world=st.sampled_from([2, 3, 4]),
    part=st.integers(1, 5),
    z_loss=st.sampled_from([0.0, 1e-2]),
    seed=st.integers(0, 99),
)
def test_sharded_over_the_vocabulary_equals_whole(world, part, z_loss, seed):
    logits, labels = example(2, 5, world * part, seed, dtype=torch.float64)
    threads = Threads(world)

    def rank(i: int):
        local = logits[..., i * part : (i + 1) * part].clone().requires_grad_()
        loss, nll = VocabCrossEntropy.apply(local, labels, z_loss, i * part, threads.reducer(i))
        return loss.detach(), nll, torch.autograd.grad(loss, local)[0]

    with ThreadPoolExecutor(world) as pool:
        results = list(pool.map(rank, range(world)))
    want_loss, want_nll, want_grad = by_autograd(logits, labels, z_loss)
    for loss, nll, _ in results:
        torch.testing.assert_close(loss, want_loss)
        torch.testing.assert_close(nll, want_nll)
    torch.testing.assert_close(torch.cat([grad for *_, grad in results], dim=-1), want_grad)
    assert threads.calls == [2] * world


def loss_on_rank(logits, labels):
    """Runs on each of two gloo ranks: the loss, this rank's gradient, and what it sent."""
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    ledger = Ledger()
    group = AxisGroup("tp", tuple(range(world)), rank, torch.distributed.group.WORLD, ledger)
    local = logits.chunk(world, dim=-1)[rank].clone().requires_grad_()
    loss, nll = cross_entropy_sum(local, labels, z_loss=1e-2, group=group)
    loss.backward()
    return loss.item(), nll.item(), local.grad, sum(t.sent_bytes for t in ledger.traffic.values())


def test_sharded_over_a_process_group():
    logits, labels = example(2, 6, 10)
    results = run_ranks(2, loss_on_rank, logits, labels)
    want_loss, want_nll, want_grad = by_autograd(logits, labels, 1e-2)
    for loss, nll, _, sent in results:
        assert loss == pytest.approx(want_loss.item(), rel=1e-6)
        assert nll == pytest.approx(want_nll.item(), rel=1e-6)
        assert sent == 3 * labels.numel() * 4  # three fp32 numbers a token, 2 (n-1)/n of them for n = 2
    torch.testing.assert_close(torch.cat([grad for *_, grad, _ in results], dim=-1), want_grad)


def test_a_group_of_one_is_no_group():
    logits, labels = example(2, 3, 8)
    alone = AxisGroup("tp", (0,), 0, None, Ledger())
    assert torch.equal(
        cross_entropy_sum(logits, labels, group=alone)[0], cross_entropy_sum(logits, labels)[0]
    )
