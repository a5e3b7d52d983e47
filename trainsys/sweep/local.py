"""Candidates one after the other on this machine, each by ``trainsys launch --on local``."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress

from trainsys.sweep.config import SweepConfig
from trainsys.sweep.points import Candidate
from trainsys.sweep.store import Result, Store, ended_badly, measured

_PARENT_DEATH = 1  # prctl's PR_SET_PDEATHSIG
_GRACE_S = 20.0


def run_all(sweep: SweepConfig, todo: list[Candidate], store: Store, say: Callable[[str], None]) -> None:
    """A candidate's failure is its result. Interrupted: those not ended are run by the next call."""
    for at, candidate in enumerate(todo, 1):
        say(f"[{at}/{len(todo)}] {candidate.label}")
        result = _run(sweep, candidate, store)
        store.write(candidate, result)
        took = "" if result.step_time_s is None else f": {result.step_time_s:.3g} s per step"
        say(f"    {result.status}{took}{': ' + result.reason if result.reason else ''}")


def _run(sweep: SweepConfig, candidate: Candidate, store: Store) -> Result:
    folder = store.of(candidate)
    ranks = ["--nproc", str(sweep.ranks)] if sweep.ranks else []
    command = [
        sys.executable, "-m", "trainsys", "launch", sweep.run, *candidate.overrides,
        f"telemetry.out={folder / 'runs'}", f"checkpoint.folder={folder / 'checkpoints'}",
        "--on", "local", *ranks,
    ]  # fmt: skip
    log = folder / "log.txt"
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=_die_with_parent
        )
        try:
            code = process.wait(sweep.timeout_s)
        except subprocess.TimeoutExpired:
            _end(process)
            return Result("timeout", reason=f"still at work after {sweep.timeout_s:g} s")
        except BaseException:
            _end(process)
            raise
    found = measured(folder / "runs") if code == 0 else None
    return found or ended_badly(code, log.read_text(encoding="utf-8", errors="replace"))


def _die_with_parent() -> None:
    """A sweep that is killed must leave no run behind that would disturb the next one's measurements."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PARENT_DEATH, signal.SIGTERM)


def _end(process: subprocess.Popen[bytes]) -> None:
    """The run and all of its ranks."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(_GRACE_S)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
