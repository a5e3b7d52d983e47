"""A feed-forward in pieces: exact, and with the hidden activations of one piece at a time."""

from __future__ import annotations

import pytest
import torch

from trainsys.config.model import ModelConfig
from trainsys.memory.stream import stream_tokens
from trainsys.models.ffn import build_ffn


def _ffn(tokens: int | None) -> tuple[torch.nn.Module, list[int]]:
    """A feed-forward, and a list that fills with the positions of each call of its down projection."""
    torch.manual_seed(0)
    ffn = build_ffn(ModelConfig(n_layers=1, d_model=8, n_heads=2, d_ff=24, vocab=10), 0)
    for p in ffn.parameters():
        torch.nn.init.normal_(p, std=0.1)
    seen: list[int] = []
    ffn.w_down.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    if tokens is not None:
        stream_tokens(ffn, tokens)
    return ffn, seen


@pytest.mark.parametrize("tokens", [1, 3, 4, 64])
def test_same_output_and_gradients(tokens: int) -> None:
    x = torch.randn(2, 10, 8)
    results = []
    for size in (None, tokens):
        ffn, seen = _ffn(size)
        inputs = x.clone().requires_grad_()
        out = ffn(inputs)
        out.square().sum().backward()
        results.append((out.detach(), inputs.grad, *(p.grad for p in ffn.parameters())))
        if size is not None:
            assert max(seen) == min(size, 10)
            assert sum(seen) == 2 * 10, "each position forward once, and once more in backward"
    for ours, theirs in zip(*results, strict=True):
        assert theirs.abs().max() > 0
        torch.testing.assert_close(ours, theirs)
