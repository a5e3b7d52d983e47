"""Sweeps on real ranks: failures are results, a killed sweep goes on, the planner learns from what finished."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from trainsys.errors import UserError
from trainsys.sweep.config import load_sweep
from trainsys.sweep.page import page
from trainsys.sweep.points import candidates
from trainsys.sweep.store import ended_badly

# d_ff so large that no machine has memory for it: a real allocation that fails.
SWEEP = """
name: tiny
run: train/demo
overrides: [train.global_batch=4, train.micro_batch=2, train.seq_len=64, parallel.tp=1, telemetry.console=off]
points:
  - {parallel.dp_shard: 2}
  - {parallel.dp_shard: 1, parallel.tp: 2}
  - {parallel.dp_shard: 1, parallel.tp: 3}
  - {parallel.dp_shard: 1, model.d_ff: 4000000000000}
steps: 2
timeout_s: 200
out: OUT
"""


def write(folder: Path) -> Path:
    path = folder / "sweep.yaml"
    path.write_text(SWEEP.replace("OUT", str(folder / "out")), encoding="utf-8")
    return path


def start(path: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "trainsys", "sweep", str(path), *more]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)


def ended(folder: Path) -> dict[str, dict[str, object]]:
    return {p.parent.name: json.loads(p.read_text()) for p in sorted(folder.glob("out/tiny/*/result.json"))}


@pytest.mark.slow
def test_a_killed_sweep_goes_on_and_failures_are_results(tmp_path: Path) -> None:
    path = write(tmp_path)
    first = start(path)
    deadline = time.monotonic() + 150
    while not any(r["status"] == "done" for r in ended(tmp_path).values()):
        assert first.poll() is None, first.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.2)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    before = ended(tmp_path)
    table = tmp_path / "learned.json"
    again = start(path, "--cluster", "dgx-a100", "--calibration", str(table), "--json")
    text = again.communicate(timeout=250)[0]
    assert again.returncode == 0, text
    after = ended(tmp_path)
    assert {k: after[k] for k in before} == before, "what had ended was run again"
    assert sorted(str(r["status"]) for r in after.values()) == ["done", "done", "oom", "refused"]
    assert json.loads(table.read_text())["runs"] == 2


def test_points_are_unique_and_refusals_are_told(tmp_path: Path) -> None:
    found = candidates(load_sweep(write(tmp_path)))
    assert [c.run is None for c in found] == [False, False, True, False]
    assert "parallel.tp=3" in found[2].refused
    assert len({c.key for c in found}) == 4


def test_a_sweep_without_points_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text("name: x\nrun: train/demo\n", encoding="utf-8")
    with pytest.raises(UserError, match="no points"):
        load_sweep(path)


@pytest.mark.parametrize(
    ("code", "said", "status"),
    [
        (2, "trainsys: error: tp=3 does not divide", "refused"),
        (1, "RuntimeError: CUDA out of memory. Tried to allocate", "oom"),
        (137, "trainsys: error: rank 1 was killed by SIGKILL (out of memory?)", "oom"),
        (1, "ValueError: something else", "failed"),
    ],
)
def test_how_a_run_ended(code: int, said: str, status: str) -> None:
    assert ended_badly(code, said).status == status


def test_page_names_every_candidate_and_needs_no_network() -> None:
    row = {
        "candidate": "tp=<2>", "point": {"parallel.tp": 2}, "status": "done", "reason": "", "step_time_s": 1.0,
        "tokens_per_s": 5.0, "mfu": 0.5, "memory_peak_bytes": 1, "predicted_s": None,
    }  # fmt: skip
    text = page("x", [row, {**row, "candidate": "tp=1", "point": {"parallel.tp": 1}, "step_time_s": 2.0}])
    assert "tp=&lt;2&gt;" in text
    assert "http" not in text.replace("http-equiv", "")
