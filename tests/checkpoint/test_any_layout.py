"""Saved in each layout, resumed in each: the same bits, and the losses of the run that was never interrupted."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint.matrix import (
    AFTER,
    BEFORE,
    EXPERT_LAYOUTS,
    LAYOUTS,
    Pieces,
    assemble,
    config,
    resume_each,
    train_and_save,
)

from support.parity import reference
from support.ranks import run_ranks

Saved = dict[str, tuple[str, dict[str, np.ndarray], list[float]]]
"""By layout: where its checkpoint is, the state it was taken of, and how that run went on."""


def on_ranks(layout: str, fn: Any, *args: Any) -> list[Any]:
    world = {**LAYOUTS, **EXPERT_LAYOUTS}[layout][0]
    return run_ranks(world, fn, config(layout), *args) if world > 1 else [fn(config(layout), *args)]


def save_each(layouts: Iterable[str], base: Path) -> Saved:
    out: Saved = {}
    for layout in layouts:
        root = str(base / layout)
        by_rank: list[tuple[Pieces, list[float]]] = on_ranks(layout, train_and_save, root)
        assert all(losses == by_rank[0][1] for _, losses in by_rank)
        out[layout] = (root, assemble(p for p, _ in by_rank), by_rank[0][1])
    return out


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return save_each(LAYOUTS, tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="module")
def saved_experts(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return save_each(EXPERT_LAYOUTS, tmp_path_factory.mktemp("experts"))


def check(layout: str, saved: Saved) -> None:
    by_rank = on_ranks(layout, resume_each, [root for root, *_ in saved.values()])
    for i, (source, (_, state, losses)) in enumerate(saved.items()):
        got = assemble(rank[i][0] for rank in by_rank)
        assert got.keys() == state.keys()
        assert sum("@exp_avg" in name for name in got) >= 2 * sum(name.endswith("weight") for name in got)
        for name, want in state.items():
            assert np.array_equal(got[name], want), f"{source} -> {layout}: {name} is not the same to the bit"
            assert want.any(), f"{name} is zero: equality says nothing"
        resumed = by_rank[0][i][1]
        assert len(resumed) == AFTER
        if source == layout:
            assert resumed == losses, "the same layout must go on to the bit"
        want = reference(config(source), BEFORE + AFTER)
        for run in (losses, resumed):
            want.check_losses(run, first=BEFORE)
        assert max(losses) - min(losses) > 1e-3, "the loss does not move: this compares dead models"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_resume_from_every_layout(layout: str, saved: Saved) -> None:
    check(layout, saved)


@pytest.mark.parametrize("layout", EXPERT_LAYOUTS)
def test_pipeline_cuts_and_expert_placement(layout: str, saved_experts: Saved) -> None:
    check(layout, saved_experts)
