"""SIGTERM and SIGUSR1 in a process of its own: saved or not, the marker is there and the exit code is 0."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from trainsys.errors import MachineFault, UserError
from trainsys.resilience.drain import MARKER, Drain, was_drained

ROOT = Path(__file__).resolve().parents[2]
# A rank without torch. "deep": the main thread sits in C and runs no Python signal handler.
RANK = """
import ctypes, sys, time
from pathlib import Path
from trainsys.resilience.drain import Drain
folder, mode, grace = sys.argv[1], sys.argv[2], float(sys.argv[3])
with Drain(folder, grace) as drain:
    if mode != "setup":
        drain.begin()
        drain.saved_step = 12
    Path(folder, "ready").touch()
    while mode in ("setup", "deep"):
        ctypes.CDLL(None).sleep(60)
    while not drain.requested:
        time.sleep(0.01)
    drain.saved_step = 13
    drain.mark()
print("left by itself")
"""


def rank(
    tmp_path: Path, mode: str, number: signal.Signals, grace: float = 60.0
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", RANK, str(tmp_path), mode, str(grace)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "ready").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    os.kill(process.pid, number)
    out, err = process.communicate(timeout=50)
    return subprocess.CompletedProcess(command, process.returncode, out, err)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_step_under_way_is_finished_and_saved(tmp_path: Path, number: signal.Signals) -> None:
    (tmp_path / MARKER).write_text("of the run before")
    done = rank(tmp_path, "steps", number)
    assert (done.returncode, done.stdout) == (0, "left by itself\n"), done.stderr
    note = json.loads((tmp_path / MARKER).read_text())
    assert (note["signal"], note["saved_step"]) == (number.name, 13)


def test_before_the_first_step_it_leaves_at_once(tmp_path: Path) -> None:
    """The main thread sleeps in C for a minute, as deep as in a compiler: no Python handler would ever run."""
    done = rank(tmp_path, "setup", signal.SIGTERM)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert "before the first step" in done.stderr
    assert was_drained(tmp_path)


@pytest.mark.timing
def test_the_grace_time_is_kept_whatever_the_loop_does(tmp_path: Path) -> None:
    done = rank(tmp_path, "deep", signal.SIGUSR1, grace=0.3)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert "step 12 is saved" in done.stderr
    assert json.loads((tmp_path / MARKER).read_text())["saved_step"] == 12


def test_a_marker_of_an_earlier_run_goes_when_the_next_one_starts(tmp_path: Path) -> None:
    (tmp_path / MARKER).write_text("{}")
    code = f"from trainsys.resilience.drain import Drain\nwith Drain({str(tmp_path)!r}, 1.0): pass"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    assert not was_drained(tmp_path)


@pytest.mark.parametrize("asked_first", [True, False])
def test_of_several_ranks_the_one_that_knows_who_asked_is_heard(tmp_path: Path, asked_first: bool) -> None:
    asked, other = Drain(tmp_path, 60.0, rank=0), Drain(tmp_path, 60.0, rank=1)
    asked._asked = "SIGTERM"
    for drain in (asked, other) if asked_first else (other, asked):
        drain.saved_step = 7
        drain.mark()
    note = json.loads((tmp_path / MARKER).read_text())
    assert (note["signal"], note["saved_step"]) == ("SIGTERM", 7)


@pytest.mark.parametrize(
    ("error", "drained"),
    [
        (RuntimeError("connection closed by peer"), True),
        (ConnectionResetError(104, "Connection reset by peer"), True),
        (OSError(28, "No space left on device"), False),
        (MachineFault("checkpoint of step 2 was not written"), False),
        (UserError("checkpoint of step 2 was not written"), False),
    ],
)
def test_of_a_run_that_is_stopping_only_a_lost_peer_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, drained: bool
) -> None:
    drain = Drain(tmp_path, 60.0)
    left: list[str] = []
    monkeypatch.setattr(drain, "_leave", left.append)
    drain.lost_peer(error)
    assert not left, "nobody had asked it to stop"
    drain._asked = "SIGTERM"
    drain.lost_peer(error)
    assert bool(left) == drained
