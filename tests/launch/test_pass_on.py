"""The job script passes a warning on to its ranks for as long as the job is its own, and no longer.

With stand-ins for Slurm's commands: that an attempt outlives its node's daemon takes a cluster that has lost a node.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "launchers/slurm/train.sbatch"


class Attempt:
    """A shell with the script's functions, warned once; ``restarts``: what Slurm says of the job meanwhile."""

    def __init__(self, folder: Path, own: int, restarts: str) -> None:
        self.restarts, self.sent = folder / "restarts", folder / "sent"
        self.restarts.write_text(restarts)
        self.sent.touch()
        for name, body in (
            ("scontrol", f"echo JobId=7 Restarts=$(cat {self.restarts}) JobState=RUNNING"),
            ("scancel", f'echo "$@" >> {self.sent}'),
        ):
            (folder / name).write_text(f"#!/bin/sh\n{body}\n")
            (folder / name).chmod(0o755)
        text = SCRIPT.read_text()
        functions = text[text.index("asked='' repeat=''") : text.index("on_ranks() {")]
        quick = "sleep() { command sleep 0.02; }"
        after = f"touch {folder}/ready\nwhile :; do command sleep 0.1; done"
        code = f"set -u; attempt={own} id=7\n{quick}\n{functions}\n{after}"
        path = f"{folder}:{os.environ['PATH']}"
        self.shell = subprocess.Popen(
            ["bash", "-c", code], env={**os.environ, "PATH": path}, start_new_session=True
        )
        assert _until((folder / "ready").exists), "its traps are not set"
        self.shell.send_signal(signal.SIGUSR1)

    def signals(self) -> int:
        return len(self.sent.read_text().splitlines())

    def quiet(self) -> bool:
        """Nothing more is sent, in ten times as long as between two signals, once what was on its way is there."""

        def for_a_while() -> bool:
            before = self.signals()
            time.sleep(1.0)
            return self.signals() == before

        return any(for_a_while() for _ in range(5))


def _until(happens: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 30
    while not happens() and time.monotonic() < deadline:
        time.sleep(0.02)
    return happens()


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Callable[..., Attempt]]:
    made: list[Attempt] = []

    def start(own: int, restarts: str) -> Attempt:
        made.append(Attempt(tmp_path, own, restarts))
        return made[-1]

    yield start
    for attempt in made:
        with suppress(ProcessLookupError):  # none is left
            os.killpg(attempt.shell.pid, signal.SIGKILL)
        attempt.shell.wait()


def test_a_warning_is_repeated_until_the_job_is_another_attempt(started: Callable[..., Attempt]) -> None:
    attempt = started(own=0, restarts="0")
    assert _until(lambda: attempt.signals() >= 3)
    assert set(attempt.sent.read_text().splitlines()) == {"--quiet --signal=USR1 7"}
    attempt.restarts.write_text("1")
    assert attempt.quiet()
    attempt.restarts.write_text("10")
    assert attempt.quiet(), "nor one whose number begins the same"


def test_what_outlives_its_script_signals_nobody(started: Callable[..., Attempt]) -> None:
    """Seen on a real Slurm: a script was killed with its node, and its shell stopped each later attempt at once."""
    attempt = started(own=0, restarts="0")
    assert _until(lambda: attempt.signals() >= 3)
    attempt.shell.kill()
    attempt.shell.wait()
    assert attempt.quiet()


def test_a_script_of_an_attempt_that_is_over_passes_nothing_on(started: Callable[..., Attempt]) -> None:
    attempt = started(own=0, restarts="1")
    assert attempt.quiet()
    assert attempt.signals() == 0
