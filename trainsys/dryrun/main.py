"""``trainsys dryrun``: the step of some ranks of a world of any size, on one CPU, before a device is paid for."""

from __future__ import annotations

import json as jsonlib
import time
from collections.abc import Sequence
from typing import Any

import torch

from trainsys.config.loader import load_run
from trainsys.config.run import RunConfig
from trainsys.dryrun.ranks import distinct_ranks
from trainsys.dryrun.report import render
from trainsys.dryrun.step import RankStep, dry_step
from trainsys.errors import UserError
from trainsys.flops import batch_flops, row_pairs
from trainsys.layout import Layout
from trainsys.telemetry.host_memory import host_memory

# Of `train`: how a dry run takes it, and what is said where the run has it otherwise.
_PLAIN = {
    "compile": (
        False, "train.compile is left out: what compiled blocks keep is not known without compiling them",
    ),
    "attention": (
        "auto",
        "train.attention=flex counts as auto, which keeps the same; flex runs attention forward once more in backward",
    ),
}  # fmt: skip


def dryrun(
    path: str, overrides: Sequence[str] = (), *, world: int, rank: str = "0", json: bool = False
) -> dict[str, Any]:
    """The command. ``rank``: a number, or ``all`` for one of each kind that differs. Returns what it printed.

    Raises:
        UserError: an engine other than native, a layout that does not divide, or a rank that is not in the world.
    """
    began = time.perf_counter()
    cfg = load_run(path, overrides)
    if cfg.engine != "native":
        raise UserError(
            f"engine={cfg.engine}: a dry run runs trainsys' own step; engine=native would work, "
            "and trainsys plan --stack predicts others"
        )
    if world < 1:
        raise UserError(f"--world {world}: at least 1")
    layout, notes = Layout.of(cfg, world)
    for setting, (plain, why) in _PLAIN.items():
        if getattr(cfg.train, setting) != plain:
            cfg = cfg.model_copy(update={"train": cfg.train.model_copy(update={setting: plain})})
            notes.append(why)
    ranks = _ranks(rank, cfg, layout)
    torch.set_num_threads(1)
    steps = [dry_step(cfg, layout, r, as_cuda=cfg.train.device != "cpu") for r in ranks]
    data = result(cfg, layout, steps) | {
        "notes": notes,
        "seconds": time.perf_counter() - began,
        "peak_rss_bytes": host_memory().peak,
    }
    if json:
        print(jsonlib.dumps(data, indent=1))
    else:
        render(data)
    return data


def _ranks(text: str, cfg: RunConfig, layout: Layout) -> list[int]:
    if text == "all":
        return distinct_ranks(cfg, layout)
    if not text.isdigit() or int(text) >= layout.world:
        raise UserError(f"--rank {text}: a rank from 0 to {layout.world - 1}, or all for one of each kind")
    return [int(text)]


def result(cfg: RunConfig, layout: Layout, steps: Sequence[RankStep]) -> dict[str, Any]:
    """Everything ``dryrun`` says, as plain data. FLOPs are counts, memory and traffic bytes."""
    rows = cfg.train.global_batch
    pairs = rows * row_pairs(cfg.train.seq_len, cfg.model.sliding_window, cfg.data.document_length)
    model = batch_flops(cfg.model, rows * cfg.train.seq_len, pairs)
    return {
        "model": cfg.model.name,
        "world": layout.world,
        "layout": layout.describe(cfg.parallel),
        "device": "cpu" if cfg.train.device == "cpu" else "cuda",
        "micro_batches": rows // (layout.data_world * cfg.train.micro_batch),
        "model_flops": model.train,
        "model_flops_per_rank": model.train / layout.world,
        "ranks": [
            {
                "rank": s.rank,
                "coords": s.coords,
                "flops": s.total_flops,
                "flops_by_operation": s.flops,
                "traffic": {
                    axis: {op: {"calls": c, "sent_bytes": b} for op, (c, b) in ops.items()}
                    for axis, ops in s.traffic.items()
                },
                "peak_bytes": s.peak_bytes,
                "memory_at_peak": s.memory,
                "memory_between_steps": s.held,
                "seconds": s.seconds,
            }
            for s in steps
        ],
    }
