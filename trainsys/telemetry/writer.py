"""Appending records to a file without the training step ever waiting for a disk.

Finished blocks are in the rank's file, packed (``telemetry.block``); the records of the block under way are JSON lines in
its *tail* (``telemetry.tail``). So a process that is killed at any moment leaves all it had flushed, and a run takes a
few tens of bytes per step.
"""

from __future__ import annotations

import atexit
import errno
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

import msgspec

from trainsys.telemetry import block, tail
from trainsys.telemetry.events import Event, RunEnd, RunStart, Step
from trainsys.telemetry.records import Gathering, NoColumns
from trainsys.threads import helper

FLUSH_S = 0.5
MAX_PENDING = 100_000
BLOCK = 512
"""Steps of a block; of other records it has up to three times as many beside them."""
MOST_OPEN = 16 * BLOCK
"""Records that are kept for a disk that takes no block; more are lost."""
REST_S = 0.0002
"""Between two columns of a block that is packed beside training: the step's thread gets the interpreter."""


class EventWriter:
    """One rank's event file.

    ``put`` queues; a daemon thread writes every ``flush_s`` seconds, so an event must not be changed after it was put. A
    process that is killed loses at most what was queued since. A disk that is full or stuck costs records (counted in
    ``lost``), never the step. What a killed predecessor left in the tail is packed first. A rank's file that cannot be
    opened at all raises ``OSError`` at once, when there is still someone to tell.

    ``kept``: what of a record goes to the file (``telemetry.resolution``).
    """

    def __init__(
        self,
        path: str | Path,
        *,
        kept: Callable[[Event], Event] = lambda event: event,
        flush_s: float = FLUSH_S,
        max_pending: int = MAX_PENDING,
    ) -> None:
        self.path = Path(path)
        self.lost = 0
        self._kept = kept
        self._encoder = msgspec.json.Encoder()
        self._queue: deque[Event] = deque()
        self._max_pending = max_pending
        self._flush_s = flush_s
        self._io = threading.Lock()
        self._stop = threading.Event()
        self._warned = False
        self._taken = 0
        """Records, of all that were queued: how far the thread has come."""
        self._open = Gathering()
        self._steps = 0
        """In it, since it was last tried to be packed."""
        self._fresh: list[bytes] = []
        """Lines of the block under way that are not in the tail."""
        self._possible: block.Possible = None
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        self._size = os.fstat(self._fd).st_size
        left = tail.read(self.path)
        self._tail = tail.Tail(tail.path_of(self.path))
        self._adopt(left)
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
            if self._fd < 0:
                return
            for event in events:
                self._take(event)
                self._taken += 1
            self._to_tail()

    def _take(self, event: Event) -> None:
        """Into the block under way; what it cannot hold, and an attempt's first and last record, as lines between
        blocks."""
        try:
            event = self._kept(event)
            line = self._encoder.encode(event)
        except (TypeError, ValueError) as error:
            self._lose(1, error)
            return
        if isinstance(event, RunStart | RunEnd) and self._pack() and self._append(line + b"\n"):
            if isinstance(event, RunStart):
                self._possible = (event.peak_flops, event.world) if event.peak_flops else None
            return
        try:
            self._open.add(msgspec.to_builtins(event))
        except NoColumns as error:
            if not (self._pack() and self._append(line + b"\n")):
                self._lose(1, error)
            return
        self._fresh.append(line)
        self._steps += isinstance(event, Step)
        if self._steps >= BLOCK or len(self._open) % (4 * BLOCK) == 0:
            self._steps = 0
            if not self._pack() and len(self._open) >= MOST_OPEN:
                self._drop()

    def _pack(self) -> bool:
        """Closes the block under way. False: the disk does not take it, and it stays open."""
        if not len(self._open):
            return True
        rest = (lambda: None) if self._stop.is_set() else (lambda: time.sleep(REST_S))
        if not self._append(block.to_line(block.dump(self._open.records(), self._possible, rest)), sync=True):
            return False
        self._begin()
        return True

    def _begin(self) -> None:
        """The next block."""
        self._open, self._fresh, self._steps = Gathering(), [], 0
        try:
            self._tail.clear()
        except OSError as error:
            self._warn(error)

    def _drop(self) -> None:
        """The records that no disk has taken."""
        self._lose(len(self._fresh), OSError("the disk takes none"))
        self._begin()

    def _append(self, data: bytes, sync: bool = False) -> bool:
        """``data`` whole at the end of the rank's file, or none of it."""
        try:
            tail.write_all(self._fd, data)
            if sync:
                _sync(self._fd)  # before the tail is emptied
        except OSError as error:
            self._warn(error)
            try:
                os.ftruncate(self._fd, self._size)
            except OSError as also:
                self._warn(also)
            return False
        self._size += len(data)
        return True

    def _to_tail(self) -> None:
        if not self._fresh:
            return
        try:
            self._tail.write(b"\n".join(self._fresh) + b"\n", self._size)
            self._fresh = []
        except OSError as error:
            self._warn(error)

    def _adopt(self, left: tuple[int, bytes] | None) -> None:
        """Leaves whole lines where a killed predecessor left a torn one, and its tail in a block."""
        if left is not None:
            after, lines = left
            if after < self._size:  # a block that was cut short: the tail has all of it
                os.ftruncate(self._fd, after)
                self._size = after
            for line in lines.split(b"\n"):
                try:
                    self._open.add(msgspec.json.decode(line, type=dict))
                    self._fresh.append(line)
                except (msgspec.DecodeError, NoColumns):
                    continue
        if self._size and os.pread(self._fd, 1, self._size - 1) != b"\n":
            self._append(b"\n")
        if self._pack():
            self._tail.remove()

    def _lose(self, count: int, error: Exception) -> None:
        self.lost += count
        self._warn(error)

    def _warn(self, error: Exception) -> None:
        if not self._warned:
            self._warned = True
            print(f"trainsys: {self.path}: events are not being written: {error}", file=sys.stderr)

    def close(self, timeout_s: float = 5.0) -> None:
        """Writes the rest and closes. A stuck disk is waited for no longer than ``timeout_s``; a slow one, or a busy
        machine, for as long as it takes records."""
        if self._stop.is_set():
            return
        self._stop.set()
        atexit.unregister(self.close)
        taken = -1
        while self._thread.is_alive():
            if taken == self._taken:
                return
            taken = self._taken
            self._thread.join(timeout_s)
        self.flush()
        with self._io:
            if self._pack():
                self._tail.remove()
            else:
                self._lose(len(self._fresh), OSError("the disk is full"))
            os.close(self._fd)
            self._fd = -1

    def _run(self) -> None:
        while not self._stop.wait(self._flush_s):
            self.flush()
        self.flush()


def _sync(fd: int) -> None:
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # what cannot be synced at all
            raise
