"""Appending records to a file without the training step ever waiting for a disk."""

from __future__ import annotations

import atexit
import os
import sys
import threading
from collections import deque
from pathlib import Path

import msgspec

from trainsys.telemetry.events import Event
from trainsys.threads import helper

FLUSH_S = 0.5
MAX_PENDING = 100_000


class EventWriter:
    """One rank's append-only event file.

    ``put`` queues; a daemon thread encodes and writes every ``flush_s`` seconds, so an event must not be changed
    after it was put. A process that is killed loses at most what was queued since, and never harms an earlier
    line: the file is opened for append, whole lines go out in one write, and a line that a predecessor left torn
    is closed before the first new one. A disk that is full or stuck costs records (counted in ``lost``), never
    the step. A rank's file that cannot be opened at all raises ``OSError`` at once, when there is still someone
    to tell.
    """

    def __init__(self, path: str | Path, *, flush_s: float = FLUSH_S, max_pending: int = MAX_PENDING) -> None:
        self.path = Path(path)
        self.lost = 0
        self._encoder = msgspec.json.Encoder()
        self._queue: deque[Event] = deque()
        self._max_pending = max_pending
        self._flush_s = flush_s
        self._io = threading.Lock()
        self._stop = threading.Event()
        self._warned = False
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        size = os.fstat(self._fd).st_size
        self._torn = size > 0 and os.pread(self._fd, 1, size - 1) != b"\n"
        self._thread = helper("events", self._run)
        self._thread.start()
        atexit.register(self.close)

    def put(self, event: Event) -> None:
        """Queues one record. Never blocks, never raises for what a disk does."""
        if len(self._queue) >= self._max_pending:
            self.lost += 1
            return
        self._queue.append(event)

    def flush(self) -> None:
        """Writes what is queued now, in this thread."""
        with self._io:
            # deque.popleft is atomic, so `put` needs no lock.
            events = [self._queue.popleft() for _ in range(len(self._queue))]
            if not events or self._fd < 0:
                return
            data = memoryview((b"\n" if self._torn else b"") + self._lines(events))
            try:
                while data:
                    data = data[os.write(self._fd, data) :]
                self._torn = False
            except OSError as error:
                self._torn = True
                self._lose(len(events), error)

    def _lines(self, events: list[Event]) -> bytes:
        """One JSON object a line; an event that holds what JSON cannot is lost, and not the others with it."""
        try:
            return self._encoder.encode_lines(events)
        except (TypeError, ValueError) as error:
            if len(events) == 1:
                self._lose(1, error)
                return b""
        return b"".join(self._lines([event]) for event in events)

    def _lose(self, count: int, error: Exception) -> None:
        self.lost += count
        if not self._warned:
            self._warned = True
            print(f"trainsys: {self.path}: events are not being written: {error}", file=sys.stderr)

    def close(self, timeout_s: float = 5.0) -> None:
        """Writes the rest and closes; waits for a stuck disk no longer than ``timeout_s``."""
        if self._stop.is_set():
            return
        self._stop.set()
        atexit.unregister(self.close)
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            return
        self.flush()
        with self._io:
            os.close(self._fd)
            self._fd = -1

    def _run(self) -> None:
        while not self._stop.wait(self._flush_s):
            self.flush()
        self.flush()
