"""torchrun's agent inside this process: the ranks of one attempt, from their start to the exit code it deserves."""

from __future__ import annotations

import logging
import os
import runpy
import signal
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from trainsys.failure import EXIT_FAILED, FAILURE_FILE, Failure, read_failure
from trainsys.launch.proof import DONE_FILE, doubt

TORCHRUN = "torch.distributed.run"


@dataclass(frozen=True)
class End:
    """How an attempt ended; what there was to say has been printed."""

    code: int
    failure: Failure | None = None
    """What the first rank to fail has said."""
    doubt: str = ""
    """Why the ranks' exit codes of 0 were not believed."""


def run_agent(arguments: list[str], steps: int | None = None, drained: Path | None = None) -> End:
    """Run torchrun's agent with ``arguments``.

    With ``steps`` code 0 means that rank 0, which is on this machine, has proved so many, or that the run was asked
    to stop: then there is ``drained``.
    """
    # The agent logs each end of a rank and raises with a summary. The ranks have said what there is to
    # say (see `failure`), so only what the agent alone knows is printed, in one line.
    logging.disable(logging.ERROR)
    with tempfile.TemporaryDirectory(prefix="trainsys-") as folder:
        report, proof = Path(folder) / "failure.json", Path(folder) / "done.json"
        os.environ[FAILURE_FILE], os.environ[DONE_FILE] = str(report), str(proof)
        sys.argv = [TORCHRUN, *arguments]
        try:
            runpy.run_module(TORCHRUN, run_name="__main__", alter_sys=True)
        except Exception as error:
            failure = read_failure(report)
            return End(failure.code if failure else _explain(error), failure)
        finally:
            del os.environ[FAILURE_FILE], os.environ[DONE_FILE]
        if steps is not None and not (drained and drained.exists()) and (why := doubt(proof, steps)):
            print(f"trainsys: error: the run {why}", file=sys.stderr)
            return End(EXIT_FAILED, doubt=why)
    return End(0)


def pass_on(number: int, frame: FrameType | None) -> bool:
    """Send the signal to every child process; whether there was one."""
    sent = False
    for listed in Path("/proc/self/task").glob("*/children"):
        with suppress(OSError):
            for child in listed.read_text(encoding="ascii").split():
                os.kill(int(child), number)
                sent = True
    return sent


def _explain(error: Any) -> int:
    """Say in one line how the agent ended when no rank said why; the exit code."""
    if (caught := getattr(error, "sigval", None)) is not None:
        return 128 + int(caught)
    if not hasattr(error, "get_first_failure"):
        print(f"trainsys: error: torchrun could not run the ranks: {error}", file=sys.stderr)
        return EXIT_FAILED
    # A rank that ends by a signal takes others with it; those that the agent itself ended carry SIGTERM.
    failures = sorted(error.failures.items(), key=lambda item: (item[1].exitcode == -signal.SIGTERM, item[0]))
    rank, first = failures[0]
    if first.exitcode < 0:
        name = signal.Signals(-first.exitcode).name
        hint = " (out of memory?)" if name == "SIGKILL" else ""
        print(f"trainsys: error: rank {rank} was killed by {name}{hint}", file=sys.stderr)
        return 128 - int(first.exitcode)
    print(f"trainsys: error: rank {rank} ended with exit code {first.exitcode}", file=sys.stderr)
    return int(first.exitcode)
