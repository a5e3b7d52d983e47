"""A Slurm of its own, of which one node is bad: the job finds it, leaves it and completes on the others."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from support.slurm import (
    BAD,
    SLOW,
    everything,
    losses,
    needs_slurm,
    quiet,
    ranks_of,
    saved,
    spoil,
    starts_of,
    states,
    submit,
    wait_for,
)
from trainsys.launch import slurm

pytestmark = [pytest.mark.timing, *needs_slurm]

FULL_DISK = "import shutil; shutil.disk_usage = lambda path: shutil._ntuple_diskusage(9, 9, 0)"


def completed(identity: str, folder: Path) -> str:
    """The job script's own words."""
    over = {"COMPLETED", "FAILED", "CANCELLED"}
    wait_for("the end", lambda: states(identity) <= over, folder)
    assert states(identity) == {"COMPLETED"}, everything(folder)
    return (folder / "logs/slurm-0.out").read_text()


def test_a_node_that_fails_preflight_is_left_out(cluster: Callable[..., None], work: Path) -> None:
    # -P keeps sitecustomize of PYTHONPATH: it drops only the script's own folder.
    identity, folder = submit(spoil(work, FULL_DISK), "launch.preflight=true", "train.steps=6")
    said = completed(identity, folder)
    assert f"exclude {BAD}: {BAD}: pre-flight: 0.0 GiB free" in said, everything(folder)
    assert "attempt 1 on 127.0.0.[11,13]" in said
    assert "attempt 1: done" in said
    assert "2 problems" not in everything(folder), "the good node is not blamed"


def test_a_node_left_out_is_let_in_again_once_it_cannot_be_spared(
    cluster: Callable[..., None], work: Path
) -> None:
    """Blamed once while three nodes are there for two; then another one goes."""
    identity, folder = submit()
    out = folder / "logs/slurm-0.out"

    def next_attempt(attempt: int, nodes: str) -> None:
        wait_for(f"attempt {attempt - 1} trains", lambda: saved(folder, attempt - 1), folder)
        os.kill(ranks_of(identity)[-1], signal.SIGKILL)
        wait_for(nodes, lambda: f"attempt {attempt} on 127.0.0.[{nodes}]" in out.read_text(), folder)

    note = {"host": BAD, "reason": "wrong results", "sure": True, "attempt": 0}
    wait_for("attempt 0 trains", lambda: saved(folder, 0), folder)
    (folder / "blamed.jsonl").write_text(json.dumps(note) + "\n")
    next_attempt(1, "11,13")
    assert f"exclude {BAD}: {BAD}: wrong results" in out.read_text()
    slurm.ask("scontrol", "update", "NodeName=127.0.0.13", "State=DRAIN", "Reason=test")
    next_attempt(2, "11-12")
    # Beside it the node of the rank that was killed twice.
    assert re.search(rf"keep \S*{BAD}\S*: blamed, but of 2 nodes that may be used the job needs 2", out.read_text())


@pytest.mark.slow  # a slow node stands out only where the others are not slowed by neighbours
def test_a_slow_node_is_left_and_nothing_is_lost(cluster: Callable[..., None], work: Path) -> None:
    steps = 200
    options = [
        "launch.evict_share=0.2",
        "telemetry.log_every=1",
        f"train.steps={steps}",
        "checkpoint.every=0",
        "checkpoint.every_minutes=0",
    ]
    identity, folder = submit(spoil(work, SLOW), *options)
    said = completed(identity, folder)
    assert f"asked to stop by {BAD}, which costs" in said, everything(folder)
    assert f"exclude {BAD}: {BAD}: " in said
    assert "attempt 1 on 127.0.0.[11,13]" in said
    assert "attempt 1: done" in said
    disturbed = losses(Path("runs"), "tiny")
    assert sorted(disturbed) == list(range(steps))
    assert disturbed == pytest.approx(quiet("quiet", f"train.steps={steps}"), rel=1e-4)
    starts = starts_of(Path("runs"), "tiny")
    assert starts[0] == 0
    assert 16 <= starts[1] < steps, "the second attempt went on where the first had saved"
