"""Head and loss in pieces: the same numbers, and no full logits anywhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from trainsys.ops.chunked_loss import chunked_cross_entropy_sum
from trainsys.ops.loss import IGNORE, cross_entropy_sum


@pytest.mark.parametrize("chunk", [1, 4, 7, 12, 100])
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_equals_the_loss_of_whole_logits(chunk: int, z_loss: float) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(3, 12, 8, requires_grad=True)
    weight = torch.randn(20, 8, requires_grad=True)
    labels = torch.randint(0, 20, (3, 12))
    labels[1, 3:6] = IGNORE
    want, want_nll = cross_entropy_sum(hidden @ weight.T, labels, z_loss=z_loss)
    got, got_nll = chunked_cross_entropy_sum(hidden, weight, labels, chunk=chunk, z_loss=z_loss)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(got_nll, want_nll)
    # A factor, as the engine's division by the tokens of the global batch.
    for ours, theirs in zip(
        torch.autograd.grad(got * 0.25, (hidden, weight)),
        torch.autograd.grad(want * 0.25, (hidden, weight)),
        strict=True,
    ):
        assert theirs.abs().max() > 0
        torch.testing.assert_close(ours, theirs)


def test_nothing_is_kept_or_computed_for_backward_without_gradients() -> None:
    hidden, weight = torch.randn(1, 6, 4), torch.randn(10, 4)
    loss, _ = chunked_cross_entropy_sum(hidden, weight, torch.zeros(1, 6, dtype=torch.int64), chunk=2)
    assert not loss.requires_grad


class _Largest(TorchDispatchMode):
    """The most elements that any tensor made inside had."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, Tensor):
                self.numel = max(self.numel, x.numel())
        return out


def test_a_million_tokens_never_meet_the_whole_vocabulary() -> None:
    tokens, vocab, width, chunk = 2**20, 128_256, 64, 2**13
    hidden = torch.empty(1, tokens, width, device="meta", requires_grad=True)
    weight = torch.empty(vocab, width, device="meta", requires_grad=True)
    labels = torch.empty(1, tokens, device="meta", dtype=torch.int64)
    with _Largest() as seen:
        loss, _ = chunked_cross_entropy_sum(hidden, weight, labels, chunk=chunk)
        loss.backward()
    assert hidden.grad is not None
    assert hidden.grad.shape == hidden.shape
    assert seen.numel == max(tokens * width, chunk * vocab)
    assert seen.numel < tokens * vocab / 100
