"""Ctrl-C: the step under way is saved and said, the exit code is 130, and a second press leaves at once."""

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
from trainsys.resilience.drain import MARKER, SAME_PRESS_S, Drain
from trainsys.telemetry.run_data import load_run

ROOT = Path(__file__).resolve().parents[2]
RUN = """\
name: stopped
hardware: H100-SXM-80
model: {n_layers: 1, d_model: 32, n_heads: 2, d_ff: 64, vocab: 64, max_seq_len: 32}
parallel: {dp_shard: -1}
data: {source: synthetic}
train: {steps: 100000, seq_len: 16, global_batch: 4, micro_batch: 2, dtype: fp32, device: cpu, threads: 1}
telemetry: {console: "off", log_every: 1000}
checkpoint: {every: 100000}
resilience: {max_restarts: 3}
"""
# A rank without torch, whose main thread sits in C; "slow" never comes to its save.
RANK = """
import ctypes, sys, time
from pathlib import Path
from trainsys.resilience.drain import Drain
folder, mode = sys.argv[1], sys.argv[2]
with Drain(folder, 60.0) as drain:
    if mode != "setup":
        drain.begin()
        drain.saved_step = 12
    Path(folder, "ready").touch()
    while mode != "steps":
        ctypes.CDLL(None).sleep(60)
    while not drain.requested:
        time.sleep(0.01)
    drain.saved_step = 13
    drain.mark()
sys.exit(drain.exit_code)
"""


def start(tmp_path: Path, mode: str, **env: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", RANK, str(tmp_path), mode], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, **env},
    )  # fmt: skip
    wait_until((tmp_path / "ready").exists, process)
    return process


def test_one_press_saves_and_ends_with_130(tmp_path: Path) -> None:
    process = start(tmp_path, "steps")
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)  # the same press, from the terminal and from a launcher
    _, err = process.communicate(timeout=50)
    assert process.returncode == 130, err
    assert "once more leaves at once" in err
    note = json.loads((tmp_path / MARKER).read_text())
    assert (note["signal"], note["saved_step"]) == ("SIGINT", 13)


def test_a_second_press_leaves_at_once_whatever_the_main_thread_does(tmp_path: Path) -> None:
    process = start(tmp_path, "slow")
    process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(SAME_PRESS_S + 0.3)  # the first asks for a save, and has a minute
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "a second time; step 12 is saved" in err


def test_before_the_first_step_there_is_nothing_to_save(tmp_path: Path) -> None:
    process = start(tmp_path, "setup")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "before the first step: nothing to save" in err


def test_under_torchrun_a_rank_ends_with_0_lest_it_is_started_again(tmp_path: Path) -> None:
    process = start(tmp_path, "steps", TORCHELASTIC_RESTART_COUNT="0")
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=50) is not None
    assert process.returncode == 0
    assert json.loads((tmp_path / MARKER).read_text())["signal"] == "SIGINT"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_scheduler_still_gets_0(tmp_path: Path, number: signal.Signals) -> None:
    drain = Drain(tmp_path, 60.0)
    drain._asked = number.name
    assert (drain.exit_code, drain.interrupted) == (0, False)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_whole_run_on_one_process_and_under_the_launcher(tmp_path: Path, ranks: int) -> None:
    """With restarts allowed: an interrupted run must not come back. A terminal sends SIGINT to the launcher's group,
    in which the ranks are not."""
    (tmp_path / "run.yaml").write_text(RUN)
    env = {k: v for k, v in os.environ.items() if not k.startswith(("RANK", "WORLD_", "LOCAL_", "TORCHELASTIC"))}
    command = ["launch", "run.yaml", "train.seed=3", "--on", "local", "--nproc", str(ranks)]
    command += ["resilience.max_restarts=0"] if ranks == 1 else []  # then it is no torchrun at all
    process = subprocess.Popen(
        [sys.executable, "-m", "trainsys", *command], cwd=tmp_path, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**env, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    steps = tmp_path / "runs"
    wait_until(lambda: any(p.stat().st_size > 20_000 for p in steps.glob("stopped-*/events/rank_00000*")), process)
    os.killpg(process.pid, signal.SIGINT)
    out, _ = process.communicate(timeout=200)
    assert process.returncode == 130, out
    folder = Folder(tmp_path / "runs/checkpoints/stopped")
    ((_, manifest),) = folder.read_all()[0]
    assert manifest.step > 0
    assert len({f.name[:10] for f in manifest.files}) == ranks
    last = out.strip().splitlines()[-1]
    assert f"step {manifest.step}" in last, out
    assert "is saved in runs/checkpoints/stopped" in last
    assert "go on with: trainsys launch run.yaml train.seed=3" in last
    assert "--on local" in last
    assert "Traceback" not in out
    (run,) = steps.glob("stopped-*")
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["status"], summary["steps"]) == ("stopped", manifest.step)
    assert load_run(run) is not None


def wait_until(condition: Callable[[], object], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 200
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)
