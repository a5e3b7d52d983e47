"""The desk: a run's sinks, live waterfall and blame, in a process of their own beside rank 0.

What they take of an interpreter (a W&B record, a chart's point, a drawn bar) is a tenth of a 50 ms step where they
share it with the step, however many threads they have. Here the step shares nothing with them: it writes to a socket.

    python -m trainsys.train.desk FD    # started by ``desk_link``; FD: the socket's file descriptor

Over the socket come pickled lists of (method of ``Desk``, its arguments), after one ``Brief``; back go (kind,
arguments) for ``desk_link``. Both ends are this project's, on one machine, over a socket that nobody else has.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import Any

from trainsys.profiler.live import LiveWatch
from trainsys.profiler.said_live import finding_of
from trainsys.profiler.steps import Capture
from trainsys.profiler.verdict import Verdict
from trainsys.telemetry.aggregate import Floats, aggregate
from trainsys.telemetry.events import Step
from trainsys.telemetry.metrics import step_metrics
from trainsys.telemetry.sinks.build import build_sinks
from trainsys.train.desk_link import Brief

NICE = 5
"""Below the ranks, which may need every core."""


class Desk:
    """Each public method is a call that may come over ``line``."""

    def __init__(self, brief: Brief, line: Connection) -> None:
        self._line, self._sending = line, threading.Lock()
        self._replicas, self._hosts = brief.replicas, brief.hosts
        self._sinks = build_sinks(brief.telemetry, self._warn, lambda text: self._tell("info", text))
        self._sinks.start(brief.info)
        self._watch = LiveWatch(
            brief.layout, brief.peak_flops, self._found, self._sinks.extra, brief.recompute_share,
            brief.peak_measured, brief.hosts, brief.stages,
        )

    def message(self, level: str, text: str) -> None:
        """A line for the user."""
        self._sinks.message(level, text)

    def window(self, ranks: Floats, shown: Step, tokens_seen: int) -> None:
        """Each rank's mean step ``[R, V]`` since the last window; rank 0's own last step of it."""
        try:
            together = aggregate(ranks, self._replicas)
            self._sinks.step(shown.step, step_metrics(shown, together, tokens_seen=tokens_seen))
            self._watch.add(ranks, shown.flops)
        except Exception as error:
            # A defect here must not be silent, nor stop the run.
            self._warn(f"step {shown.step} could not be shown: {type(error).__name__}: {error}")

    def refine(self, capture: Capture) -> None:
        self._watch.refine(capture)

    def settle(self) -> None:
        """Look at what is there already; then say so."""
        self._watch.close()
        self._reply("settled")

    def finish(self, summary: Mapping[str, Any], timeout_s: float) -> None:
        self._sinks.finish(summary, timeout_s)
        self._reply("finished")

    def _warn(self, text: str) -> None:
        self._tell("warning", text)

    def _tell(self, level: str, text: str) -> None:
        self._sinks.message(level, text)
        self._reply("message", level, text)

    def _found(self, verdict: Verdict) -> None:
        if verdict.news == "over":
            self._tell("info", f"over since step {verdict.until}: {verdict.title}")
        elif verdict.news != "lasting":  # which has been said
            worse = "now worse: " if verdict.news == "worse" else ""
            ended = "" if verdict.until is None else f" in steps {verdict.since} to {verdict.until}"
            self._warn(f"{worse}{verdict.title}; {1e3 * verdict.cost_s:.1f} ms per step{ended}; {verdict.advice}")
        finding = finding_of(verdict, self._watch.last_step, self._hosts)
        self._sinks.finding(finding)
        self._reply("verdict", verdict, finding)

    def _reply(self, kind: str, *args: Any) -> None:
        """From any thread. Without a rank at the other end nobody wants to know."""
        with self._sending, contextlib.suppress(OSError):
            self._line.send((kind, args))


def main(fd: int) -> None:
    # Ctrl-C and a scheduler's warning go to every process of the job; the desk ends when its rank has.
    for sig in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(sig, signal.SIG_IGN)
    os.nice(NICE)
    line = Connection(fd)
    try:
        desk = Desk(line.recv(), line)
        finished = False
        while not finished:
            for name, args in line.recv():
                getattr(desk, name)(*args)
                finished = name == "finish"
    except (EOFError, ConnectionError):
        # The rank was killed: what it said until then is shown, and that it did not end well.
        desk.finish({"status": "killed"}, timeout_s=5.0)


if __name__ == "__main__":
    main(int(sys.argv[1]))
