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
from trainsys.ops import attention_seam

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


def test_selective_plus_plus_runs_attention_forward_once(monkeypatch: pytest.MonkeyPatch) -> None:
    forwards = 0
    run = attention_seam.WholeRows.forward

    def counted(*args: object) -> object:
        nonlocal forwards
        forwards += 1
        return run(*args)

    monkeypatch.setattr(attention_seam.WholeRows, "forward", counted)
    calls, saved = _run("selective++")
    assert forwards == LAYERS, "attention itself: once a layer"
    assert calls["ffn"] == 2 * LAYERS, "all the rest: twice"
    assert _run("full")[1] == saved, "what checkpointing saves; output and lse are kept beside it"


def test_results_of_micro_batches_in_flight_do_not_meet() -> None:
    cfg = ModelConfig(n_layers=1, d_model=16, n_heads=2, d_ff=32, vocab=40)
    batches = [torch.randint(0, 40, (1, 8), generator=torch.Generator().manual_seed(i)) for i in range(3)]
    positions = torch.arange(8).expand(1, 8)

    def gradients(policy: str, order: list[int]) -> list[torch.Tensor]:
        model = Decoder(cfg)
        init_weights(model, cfg, seed=0)
        apply_recompute(model, RecomputeConfig(policy=policy))  # type: ignore[arg-type]
        losses = [(model(b, positions).square() * (i + 1)).sum() for i, b in enumerate(batches)]
        for i in order:
            losses[i].backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    for order in ([0, 1, 2], [2, 1, 0], [1, 2, 0]):
        for ours, theirs in zip(gradients("selective++", order), gradients("none", order), strict=True):
            torch.testing.assert_close(ours, theirs)
