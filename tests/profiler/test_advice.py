"""Advice follows evidence: the largest loss always has one, and none names a setting that is on already."""

from __future__ import annotations

import re

import pytest

from trainsys.config.loader import load_run
from trainsys.config.run import RunConfig
from trainsys.profiler.advice import advise
from trainsys.profiler.settings import Settings
from trainsys.profiler.verdict import Verdict
from trainsys.profiler.waterfall import LABELS, STALL, Term, Waterfall, label

TERMS = [
    *(name for name in LABELS if name not in ("useful", "compute", "unattributed")),
    *(f"comm/{axis}" for axis in ("tp", "fsdp", "dp_shard", "dp_replicate", "cp", "ep", "world")),
    STALL + "checkpoint", STALL + "capture", STALL + "eval",
]  # fmt: skip
ON = (
    "train.compile=true", "telemetry.capture_every=500", "data.packing=concat", "checkpoint.mode=async",
    "parallel.overlap.gradients=true", "parallel.overlap.context=true",
    "parallel.fsdp.reshard_after_forward=false",
)  # fmt: skip
CONFIGS: dict[str, RunConfig | None] = {
    "none": None,
    "demo": load_run("train/demo", ()),
    "8b": load_run("train/llama3-8b", ()),
    "8b, all on": load_run("train/llama3-8b", (*ON, "train.dtype=bf16", "train.global_batch=64", "train.micro_batch=1")),
    "8b, off": load_run("train/llama3-8b", (
        "train.dtype=fp32", "data.packing=pad", "checkpoint.mode=sync", "parallel.overlap.gradients=false",
        "data.prefetch=0", "recompute.policy=full", "train.compile=false",
    )),
    "overlap": load_run("train/llama3-8b", ("parallel.tp=2", "parallel.overlap.tensor=true", "train.micro_batch=2")),
    "replicas": load_run("train/llama3-8b", (
        "parallel.dp_replicate=2", "parallel.dp_shard=4", "parallel.shard.optim=over_replicas",
    )),
    "zero bubble": load_run("train/llama3-8b", ("parallel.pp=4", "parallel.pipeline.schedule=zero_bubble")),
    "interleaved": load_run("train/llama3-8b", ("parallel.pp=4", "parallel.pipeline.schedule=interleaved_1f1b")),
    "every_n": load_run("train/llama3-8b", ("recompute.policy=every_n",)),
}  # fmt: skip
SETTING = re.compile(r"\b((?:train|data|parallel|telemetry|checkpoint|recompute)(?:\.[a-z_]+)+)=([\w.]+)")


def fall(largest: str, others: float = 0.01) -> Waterfall:
    """A step of 1 s, useful for 0.4 s, of which ``largest`` takes most of the rest."""
    seconds = {"useful": 0.4, "unattributed": 0.1 - others, "gc": others} | {largest: 0.5}
    terms = [Term(n, label(n), s, s, None if n == "useful" else 0.4 / (1.0 - s), False, 0, s) for n, s in seconds.items()]
    return Waterfall(terms, 1.0, 1.0, 100, 0.4, 1e12, 1e12, "host")


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("term", TERMS)
def test_the_largest_loss_has_advice_that_is_not_followed_already(term: str, config: str) -> None:
    cfg = CONFIGS[config]
    found = advise(fall(term), cfg, None)
    assert found
    assert found[0].what.strip()
    assert 0.25 <= found[0].gain <= 0.5
    assert found[0].mfu is not None
    assert 0.4 < found[0].mfu <= 0.4 / 0.5 + 1e-9
    for advice in found:
        assert "  " not in advice.what
        for key, value in SETTING.findall(advice.what):
            now = Settings(cfg).value(key)
            if cfg is None:
                continue
            assert now is not None, f"no such setting: {key}"
            assert str(now).lower() != value, f"{advice.what}: {key} is {value} already"


def test_every_setting_that_is_named_is_one_that_loads() -> None:
    cfg = CONFIGS["8b, off"]
    assert cfg is not None
    told = [advice.what for term in TERMS for advice in advise(fall(term), cfg, None)]
    named = {"=".join(found) for what in told for found in SETTING.findall(what)}
    assert {"train.compile=true", "data.packing=concat", "checkpoint.mode=async", "telemetry.capture_every=500"} <= named
    for setting in named - {"data.source=shards"}:  # which wants a path as well
        load_run("train/llama3-8b", (setting,))


def test_waiting_without_a_culprit_is_jitter_and_with_one_is_its() -> None:
    (first, *_) = advise(fall("straggler"), None, None)
    assert "jitter" in first.what
    for cause in ("garbage collection", "clocks", "network", "processes"):
        assert cause in first.what
    late = Verdict("rank", "rank 3 on node1 computes slowly", "", "", 0.5, 0.5, (3,), "compute", 0)
    (first, *_) = advise(fall("straggler"), None, None, [late])
    assert "rank 3 on node1 computes slowly" in first.what
    assert "jitter" not in first.what
    # Garbage collection has a term of its own.
    collects = Verdict("gc", "garbage collection pauses rank 0", "", "", 0.5, 0.5, (0,), "gc", 0)
    assert "jitter" in advise(fall("straggler"), None, None, [collects])[0].what


def test_compute_is_captured_first_and_then_told_what_is_left() -> None:
    cfg = CONFIGS["8b"]
    assert advise(fall("compute_below_peak"), cfg, None)[0].what.startswith("telemetry.capture_every=500 to see")
    all_on = advise(fall("compute_below_peak"), CONFIGS["8b, all on"], None)[0].what
    assert "capture_every" not in all_on
    assert "compile" not in all_on


def test_small_losses_have_no_advice() -> None:
    assert advise(fall("unattributed", others=0.004), None, None) == []
