"""The bounds of parity are tight: a layout with one small fault is off by many times what rounding explains."""

from __future__ import annotations

from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from test_parity import NO_SP, config

from support.parity import reference, train_on_this_rank, whole
from support.ranks import run_ranks
from support.rounding import Gaps
from trainsys.config.run import RunConfig
from trainsys.engines import native
from trainsys.parallel.mesh import AxisGroup

STEPS = 3
MARGIN = 20.0
"""How many times its bound the part that a fault moves most is off, at least."""


def first_only(x: torch.Tensor, g: AxisGroup) -> torch.Tensor:
    """In place of a sum over ranks: what the first holds, on all, so that no copies differ."""
    dist.broadcast(x, group_src=0, group=g.group)
    return x


def loss_over_cp() -> Any:
    real = native.loss_sums

    def scaled(cfg: RunConfig, *args: Any) -> Any:
        loss, nll = real(cfg, *args)
        return loss / cfg.parallel.cp, nll

    return patch.object(native, "loss_sums", scaled)


def norm_not_summed() -> Any:
    return patch("trainsys.parallel.parallelize.ops", SimpleNamespace(all_reduce_=first_only))


def one_sum_left_out() -> Any:
    """The fifth all-reduce of all is not added up: in the first layer of the first forward."""
    real, calls = dist.all_reduce, [0]

    def all_reduce(x: torch.Tensor, *args: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == 5:
            return dist.broadcast(x, group_src=0, group=options.get("group"))
        return real(x, *args, **options)

    return patch.object(dist, "all_reduce", all_reduce)


FAULTS = {f.__name__: f for f in (loss_over_cp, norm_not_summed, one_sum_left_out)}


def train_with(fault: str, cfg: RunConfig) -> Any:
    with ExitStack() as stack:
        if fault:
            stack.enter_context(FAULTS[fault]())
        return train_on_this_rank(cfg, STEPS)


def other(cfg: RunConfig, section: str, **values: Any) -> RunConfig:
    return cfg.model_copy(update={section: getattr(cfg, section).model_copy(update=values)})


WINDOW = config({"cp": 2}, model={"sliding_window": 5})
CONTIGUOUS = config(
    {"cp": 4, "context": {"balance": "contiguous"}}, model={"sliding_window": 6}, seq_len=32, global_batch=2
)
TP_SP, TP = config({"tp": 2}), config({"tp": 2, **NO_SP})
FSDP = config({"dp_shard": 2})
CASES = {
    "the loss divided by cp": (2, config({"cp": 2}), config({"cp": 2}), "loss_over_cp"),
    "a norm's gradient not summed over tp": (2, TP_SP, TP_SP, "norm_not_summed"),
    "one sum over tp left out": (2, TP, TP, "one_sum_left_out"),
    "a window one too long": (2, WINDOW, other(WINDOW, "model", sliding_window=6), ""),
    "a window one too short, the case with most rounding": (
        4, CONTIGUOUS, other(CONTIGUOUS, "model", sliding_window=5), "",
    ),
    "a fifth less weight decay": (2, FSDP, other(FSDP, "optim", weight_decay=0.08), ""),
    "z-loss left out": (2, FSDP, other(FSDP, "optim", z_loss=0.0), ""),
    "epsilon of norms 2e-5": (2, FSDP, other(FSDP, "model", norm_eps=2e-5), ""),
}  # fmt: skip


def times_the_bound(world: int, right: RunConfig, run: RunConfig, fault: str) -> float:
    want = reference(right, STEPS)
    got = whole(run_ranks(world, train_with, fault, run))
    return max(gap / want.bounds[what] for what, gap in Gaps.between(got, want.exact, want.slack).items())


@pytest.mark.parametrize("name", CASES)
def test_a_fault_is_far_beyond_the_bound(name: str) -> None:
    world, right, run, fault = CASES[name]
    times = times_the_bound(world, right, run, fault)
    print(f"{name}: {times:.0f} times the bound")
    assert times > MARGIN


@pytest.mark.parametrize("name", [name for name, (_, right, run, fault) in CASES.items() if fault or right is CONTIGUOUS])
def test_without_the_fault_it_is_within(name: str) -> None:
    world, right, _, _ = CASES[name]
    assert times_the_bound(world, right, right, "") < 1.0
