"""Exposed communication on a device is what its compute stream waits for: the recorder against virtual streams."""

from __future__ import annotations

import pytest

from support.apart import apart
from support.streams import Played, play
from trainsys.config.loader import load_run

LINKS = (20e9, 100e9, 400e9)
"""bytes/s: communication rules, is partly hidden, is mostly hidden"""
BASE = [
    "model.n_layers=3",
    "train.seq_len=4096",
    "data.document_mask=false",
    "train.compile=false",
    "recompute.policy=none",
    "train.micro_batch=1",
]
CASES = {
    "fsdp": (8, {"dp_shard": 8}, ()),
    "hsdp": (8, {"dp_replicate": 2, "dp_shard": 4}, ()),
    "tp": (8, {"dp_shard": 2, "tp": 4}, ("parallel.sequence_parallel=true", "model.n_layers=2")),
    "cp": (4, {"dp_shard": 2, "cp": 2}, ("train.seq_len=1024", "model.n_layers=2")),
    "pp": (8, {"pp": 2, "dp_shard": 4}, ()),
    "replicas": (8, {"dp_replicate": 8, "dp_shard": 1}, ()),
}


def played(name: str) -> list[Played]:
    world, sizes, more = CASES[name]
    axes = {"dp_replicate": 1, "dp_shard": 1, "cp": 1, "tp": 1, "pp": 1} | sizes
    layout = [f"parallel.{axis}={size}" for axis, size in axes.items()]
    cfg = load_run("train/llama3-8b", [*BASE, "train.global_batch=8", *layout, *more])
    return play(cfg, world, 0, LINKS)


@pytest.mark.parametrize("name", CASES)
def test_the_device_waterfall_says_what_the_compute_stream_waits_for(name: str) -> None:
    steps = apart(played, name)
    assert len(steps) == len(LINKS)
    for step in steps:
        assert step.marks > 10
        assert step.foreign == 0, "every mark is on the compute stream"
        assert step.negative == 0
        assert step.said.step_time_s == pytest.approx(step.seconds, rel=1e-6), "it adds up"
        said, slack = step.exposed, 1e-3 * step.seconds
        assert sum(said.values()) == pytest.approx(sum(step.waited.values()), rel=0.02, abs=slack)
        for axis in {*said, *step.waited}:
            true = step.waited.get(axis, 0.0)
            assert said.get(axis, 0.0) == pytest.approx(true, rel=0.02, abs=slack), axis
    slow, _, fast = steps
    assert sum(slow.waited.values()) > 2 * sum(fast.waited.values())
    assert sum(slow.waited.values()) > 0.2 * slow.seconds, "there is something to be seen"
