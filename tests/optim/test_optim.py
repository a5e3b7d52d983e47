"""Learning-rate schedules, clipping and the local AdamW."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn

from trainsys.config.run import OptimConfig
from trainsys.models.shards import ShardSpec
from trainsys.optim.adamw import LocalAdamW
from trainsys.optim.local import Owned
from trainsys.optim.norm import clip_, square_sum
from trainsys.optim.schedule import learning_rate


@example("wsd", 18, 20)  # a warm-up that leaves less than a tenth of the run
@given(st.sampled_from(["cosine", "linear", "wsd", "constant"]), st.integers(0, 50), st.integers(2, 300))
def test_schedule_laws(kind: str, warmup: int, steps: int) -> None:
    cfg = OptimConfig(lr=1.0, schedule=kind, warmup_steps=warmup, min_lr_ratio=0.1)  # type: ignore[arg-type]
    rates = [learning_rate(cfg, s, steps) for s in range(steps)]
    assert all(0.0 < r <= 1.0 + 1e-12 for r in rates)
    warm, after = rates[:warmup], rates[warmup:]
    assert all(b > a for a, b in itertools.pairwise(warm))
    assert all(b <= a + 1e-12 for a, b in itertools.pairwise(after))
    if len(after) > 1:
        assert after[0] == pytest.approx(1.0)
        assert after[-1] == pytest.approx(1.0 if kind == "constant" else 0.1)


def test_cosine_is_half_way_in_the_middle() -> None:
    cfg = OptimConfig(lr=2.0, schedule="cosine", warmup_steps=0, min_lr_ratio=0.0)
    assert learning_rate(cfg, 50, 101) == pytest.approx(1.0)
    assert learning_rate(cfg, 25, 101) == pytest.approx(1.0 + math.cos(math.pi / 4))


def test_wsd_holds_then_falls_over_decay_steps() -> None:
    cfg = OptimConfig(lr=1.0, schedule="wsd", decay_steps=20, min_lr_ratio=0.0)
    assert learning_rate(cfg, 79, 100) == 1.0
    assert learning_rate(cfg, 89, 100) == pytest.approx(0.5)


def test_norm_counts_copies_once_and_clips_to_it() -> None:
    a, b = torch.full((3, 4), 2.0), torch.full((5,), -1.0)
    # Two ranks hold `b`, each adds half of its squares.
    total = 2 * square_sum([(b, 2)], torch.device("cpu")) + square_sum([(a, 1)], torch.device("cpu"))
    assert float(total) == pytest.approx(float(a.square().sum() + b.square().sum()))
    norm = total.sqrt()
    clip_([a, b], norm, 1.0)
    assert float(torch.cat([a.flatten(), b]).norm()) == pytest.approx(1.0, rel=1e-5)
    before = a.clone()
    clip_([a], a.norm(), 10.0)
    assert torch.equal(a, before)


def test_adamw_is_torchs_and_spares_vectors_from_decay() -> None:
    torch.manual_seed(0)
    cfg = OptimConfig(lr=1e-2, weight_decay=0.5)
    named = {"w": nn.Parameter(torch.randn(4, 3)), "norm": nn.Parameter(torch.randn(3))}
    twins = {k: nn.Parameter(p.detach().clone()) for k, p in named.items()}
    ours = LocalAdamW({n: Owned(p, ShardSpec.whole(p.shape), 1) for n, p in named.items()}, cfg)
    theirs = torch.optim.AdamW(
        [{"params": [twins["w"]], "weight_decay": 0.5}, {"params": [twins["norm"]], "weight_decay": 0.0}],
        lr=1e-2, betas=cfg.betas, eps=cfg.eps, fused=True,
    )  # fmt: skip
    for step in range(3):
        for name in named:
            named[name].grad = torch.randn_like(named[name])
            twins[name].grad = named[name].grad.clone()
        ours.step(1e-2 * (step + 1))
        for group in theirs.param_groups:
            group["lr"] = 1e-2 * (step + 1)
        theirs.step()
    for name in named:
        assert torch.equal(named[name], twins[name])
        assert ours.state(name)["exp_avg"].shape == named[name].shape
    assert ours.updates == 3
