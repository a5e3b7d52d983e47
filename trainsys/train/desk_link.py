"""Rank 0's line to its desk: calls go out in batches, messages and verdicts come back; the step never waits."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import trainsys
from trainsys.config.run import TelemetryConfig
from trainsys.failure import FAILURE_FILE
from trainsys.layout import Layout
from trainsys.profiler.expected import StageWork
from trainsys.profiler.verdict import Verdict
from trainsys.telemetry.batches import Batches
from trainsys.telemetry.events import Finding
from trainsys.telemetry.sinks.base import RunInfo
from trainsys.threads import helper

DEPTH = 1024
"""Windows that may wait for a desk that is behind."""
EXIT_S = 5.0
"""For the desk to end by itself after its last word."""


@dataclass(frozen=True)
class Brief:
    """What the desk has to know of the run. ``replicas``: how many ranks read the same rows; ``peak_flops``: of one
    rank, ``peak_measured`` here; ``recompute_share``: of forward FLOPs, that backward repeats;
    ``hosts``: each rank's node; ``stages``: what each pipeline stage has to compute."""

    telemetry: TelemetryConfig
    info: RunInfo
    layout: Layout
    replicas: int
    peak_flops: float | None
    recompute_share: float
    peak_measured: bool = False
    hosts: tuple[str, ...] = ()
    stages: StageWork | None = None


class DeskLink:
    """Starts the desk (``trainsys.train.desk``) and calls its methods. Only ``settle`` and ``finish`` wait.

    A desk that cannot start, or dies, costs the run its sinks and live blame and is told in one line. Event files, from
    which ``trainsys explain`` says the same afterwards, are each rank's own.

    Arguments:
        message: (level, text) that the desk has shown, for the record.
        verdict: each that it finds, and its record. Both are called from a thread of the link's.
    """

    def __init__(
        self,
        brief: Brief,
        message: Callable[[Literal["info", "warning"], str], None],
        verdict: Callable[[Verdict, Finding], None],
    ) -> None:
        self._replies: dict[str, Callable[..., None]] = {
            "message": message,
            "verdict": verdict,
            "settled": self._done,
            "finished": self._done,
        }
        self._answered = threading.Event()
        self._dropped = 0
        self._gone = False
        mine, its = socket.socketpair()
        self._line = Connection(mine.detach())
        sys.stdout.flush()
        with its:
            self._process: subprocess.Popen[bytes] | None = None
            try:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "trainsys.train.desk", str(its.fileno())],
                    pass_fds=[its.fileno()], stdin=subprocess.DEVNULL, env=_environment(),
                )  # fmt: skip
            except OSError as error:
                self._lost(f"did not start: {error}")
        self._calls: Batches[tuple[str, tuple[Any, ...]]] = Batches(self._send, "desk")
        helper("desk-replies", self._listen).start()
        self._send(brief)

    def message(self, level: str, text: str) -> None:
        self._calls.put(("message", (level, text)))

    def call(self, name: str, *args: Any) -> None:
        """Method ``name`` of ``Desk``; beyond ``DEPTH`` that wait, calls are dropped, and counted."""
        if len(self._calls) < DEPTH:
            self._calls.put((name, args))
        else:
            self._dropped += 1

    def settle(self, timeout_s: float = 30.0) -> None:
        """Until the desk has looked at everything so far, and its verdicts are in."""
        self._ask("settle", (), timeout_s)

    def finish(self, summary: Mapping[str, Any], timeout_s: float) -> None:
        """Ends the sinks, which together get ``timeout_s``, and the desk."""
        if self._dropped:
            self.message("warning", f"the desk could not keep up: it missed {self._dropped} windows of steps")
        self._ask("finish", (summary, timeout_s), timeout_s + EXIT_S)
        self._gone = True
        self._calls.close(timeout_s=1.0)
        if self._process is not None:
            try:
                self._process.wait(EXIT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    def _ask(self, name: str, args: tuple[Any, ...], timeout_s: float) -> None:
        self._answered.clear()
        if not self._gone:
            self._calls.put((name, args))
            self._calls.flush()
            self._answered.wait(timeout_s)

    def _done(self) -> None:
        self._answered.set()

    def _send(self, what: Any) -> None:
        try:
            if not self._gone:
                self._line.send(what)
        except OSError:
            pass  # the listener sees the same end, and tells

    def _listen(self) -> None:
        try:
            while True:
                kind, args = self._line.recv()
                self._replies[kind](*args)
        except (EOFError, OSError):
            self._lost("has ended")

    def _lost(self, how: str) -> None:
        if not self._gone:
            self._gone = True
            text = f"the process of console, W&B and live blame {how}; training goes on, and so do event files"
            print(f"warning: {text}", file=sys.stderr)
            self._replies["message"]("warning", text)
        self._answered.set()


def _environment() -> dict[str, str]:
    """The desk's environment: this very package, no device, no numpy threads that would take cores from ranks. It
    is not a rank: its end must not be reported as one's failure."""
    above = str(Path(trainsys.__file__).parents[1])
    path = os.pathsep.join(filter(None, (above, os.environ.get("PYTHONPATH"))))
    ours = {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    of_a_rank = ("RANK", "WORLD_SIZE", FAILURE_FILE, "TORCHELASTIC_ERROR_FILE")
    theirs = {name: value for name, value in os.environ.items() if name not in of_a_rank}
    return {**theirs, **ours, "WANDB_PROGRAM": os.environ.get("WANDB_PROGRAM", sys.argv[0])}
