"""The short form of profiling/checkpoint_kill.py, and one run by real torchrun that loses a rank."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from trainsys.checkpoint.folder import Folder

pytestmark = pytest.mark.timing

ROOT = Path(__file__).resolve().parents[2]
RUN = """\
name: killed
hardware: H100-SXM-80
model: {n_layers: 1, d_model: 32, n_heads: 2, d_ff: 64, vocab: 64, max_seq_len: 32}
parallel: {dp_shard: 2}
data: {source: synthetic}
train: {steps: 400, seq_len: 16, global_batch: 4, micro_batch: 2, dtype: fp32, device: cpu, threads: 1}
telemetry: {console: "off", log_every: 100}
checkpoint: {every: 20}
resilience: {max_restarts: 1}
"""


def test_killed_at_random_and_nothing_is_lost(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    command = [sys.executable, "profiling/checkpoint_kill.py", "--n", "3", "--steps", "10"]
    command += ["--seed", "3", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(out.read_text())
    assert result["failures"] == []
    assert result["events"] >= 3
    assert result["steps_compared"] >= 10
    assert result["worst_relative_loss_gap"] < 1e-5


def test_a_run_killed_twice_with_progress_in_between_goes_on_and_a_drained_one_exits_0(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(RUN)
    folder = Folder(tmp_path / "runs" / "checkpoints" / "killed")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    launch = subprocess.Popen(
        [sys.executable, "-m", "trainsys", "launch", "run.yaml", "--on", "local"],
        cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    attempts = tmp_path / "runs"
    before = None
    for kill in (1, 2):  # one restart is allowed: what is counted is failures without a newer saved step
        wait_until(lambda: folder.latest() not in (None, before), launch)  # noqa: B023
        before = folder.latest()
        os.kill(children(launch.pid)[0], signal.SIGKILL)
        wait_until(lambda: len(list(attempts.glob("killed-*/events"))) == kill + 1, launch)  # noqa: B023
    wait_until(lambda: folder.latest() != before, launch)
    launch.send_signal(signal.SIGTERM)
    out, _ = launch.communicate(timeout=100)
    assert launch.returncode == 0, out
    note = json.loads((folder.root / "drained.json").read_text())
    newest = folder.read_all()[0][0][1]
    assert newest.step == note["saved_step"] > 20
    assert newest.attempt == 2
    assert newest.resumed_from


def children(pid: int) -> list[int]:
    found = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        found += [int(p) for p in path.read_text().split()]
    return found


def wait_until(condition: Callable[[], object], process: subprocess.Popen[str]) -> None:
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
