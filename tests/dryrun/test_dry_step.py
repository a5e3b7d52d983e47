"""A dry run counts what real gloo ranks count: FLOPs, calls and bytes by axis, and every byte of memory."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch.distributed as dist

from support.apart import apart
from support.dry import of_case
from support.dry_cases import CASES, world
from support.ranks import run_ranks
from trainsys.comm import ledger
from trainsys.config.run import RunConfig
from trainsys.dryrun.step import RankStep, metered_step
from trainsys.layout import Layout

# The first of them waits for the dry runs of all cases.
pytestmark = pytest.mark.timeout(1200)

# One of each thing that could differ between a fake and a real group; the others are held to the planner's count.
REAL = (
    "one", "one-bf16", "one-docs", "chunked-loss", "fsdp-bf16", "fsdp-each", "fsdp3-ragged", "hsdp", "hsdp-each", "tp",
    "sp-full-fsdp", "cp-ring", "cp-ulysses", "cp-ring-docs", "cp-dist_flash", "pp-1f1b", "pp-zbv-fsdp", "pp-tied-sp",
    "moe-tp",
)  # fmt: skip


class _Settled(ledger._Span):
    """gloo's own thread lets go of a collective's tensors a moment after the wait for it has ended."""

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        time.sleep(0.02)


def _real(cfg: RunConfig) -> RankStep:
    ledger._Span = _Settled  # type: ignore[misc]
    try:
        return _metered(cfg)
    finally:
        ledger._Span = _Settled.__base__  # type: ignore[misc, assignment]


def _metered(cfg: RunConfig) -> RankStep:
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    return metered_step(cfg, Layout.resolve(cfg.parallel, size), rank, warm_steps=1)


@pytest.mark.parametrize("name", REAL)
def test_equals_real_ranks(name: str) -> None:
    """Their second step: the dry run's first is like any later one."""
    cfg = CASES[name]
    real = [apart(_real, cfg)] if world(cfg) == 1 else run_ranks(world(cfg), _real, cfg)
    for dry in of_case(name):
        found = real[dry.rank]
        assert dry.total_flops == found.total_flops > 0
        assert dry.traffic == found.traffic
        assert dry.held == found.held
        if cfg.model.moe is not None:
            continue  # a grouped product is one kernel on real tensors and a loop over experts on fake ones
        assert dry.memory == found.memory
        assert dry.peak_bytes == found.peak_bytes == sum(dry.memory.values())
