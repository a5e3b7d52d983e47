"""What a policy recomputes, counted: equal results alone would not show that anything was."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from trainsys.config.model import ModelConfig
from trainsys.config.run import RecomputeConfig
from trainsys.memory.recompute import apply_recompute
from trainsys.models.decoder import Decoder
from trainsys.models.init import init_weights

LAYERS = 4


def _run(policy: str, every_n: int = 2) -> tuple[Counter[str], int]:
    """Forward calls of attention cores and of whole blocks in one step, and bytes that forward saved."""
    cfg = ModelConfig(n_layers=LAYERS, d_model=16, n_heads=2, d_ff=32, vocab=40)
    model = Decoder(cfg)
    init_weights(model, cfg, seed=0)
    calls: Counter[str] = Counter()
    for block in model.layers.values():
        block.attn.core.register_forward_pre_hook(lambda *_: calls.update(["core"]))
        block.ffn.register_forward_pre_hook(lambda *_: calls.update(["ffn"]))
    apply_recompute(model, RecomputeConfig(policy=policy, every_n=every_n))  # type: ignore[arg-type]
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved = 0

    def pack(x: torch.Tensor) -> torch.Tensor:
        nonlocal saved
        if x.untyped_storage().data_ptr() not in parameters:
            saved += x.numel() * x.element_size()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = model(torch.arange(24).view(2, 12), torch.arange(12).expand(2, 12)).square().mean()
    loss.backward()
    return calls, saved


@pytest.mark.parametrize(
    ("policy", "every_n", "cores", "ffns"),
    [
        ("none", 2, LAYERS, LAYERS),
        ("full", 2, 2 * LAYERS, 2 * LAYERS),
        ("every_n", 2, LAYERS + 2, LAYERS + 2),
        ("every_n", 3, LAYERS + 2, LAYERS + 2),
        ("every_n", 4, LAYERS + 1, LAYERS + 1),
    ],
)
def test_blocks_run_again(policy: str, every_n: int, cores: int, ffns: int) -> None:
    calls, _ = _run(policy, every_n)
    assert calls == {"core": cores, "ffn": ffns}


def test_less_is_saved_the_more_is_recomputed() -> None:
    none, selective, some, full = (_run(p)[1] for p in ("none", "selective", "every_n", "full"))
    assert full < some < none
    assert selective < none
