"""Work for later: handed over at once, done together in a thread of its own once a second.

A thread that wakes up for every step takes the interpreter from the step each time; a batch takes it once.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

from trainsys.threads import helper

EVERY_S = 1.0

T = TypeVar("T")


class Batches(Generic[T]):
    """``handle`` gets all that was put since it was called last, in order, from one thread; it must not raise."""

    def __init__(self, handle: Callable[[list[T]], None], name: str, every_s: float = EVERY_S) -> None:
        self._handle, self._every_s = handle, every_s
        self._items: deque[T] = deque()
        self._wake, self._over = threading.Event(), False
        self._thread = helper(name, self._run)
        self._thread.start()

    def __len__(self) -> int:
        """What waits to be handled."""
        return len(self._items)

    def put(self, item: T) -> None:
        self._items.append(item)

    def flush(self) -> None:
        """Have what waits handled now; does not wait for it."""
        self._wake.set()

    def close(self, timeout_s: float = 30.0) -> None:
        """Handles the rest and ends; one that hangs is left behind after ``timeout_s``."""
        self._over = True
        self._wake.set()
        self._thread.join(timeout_s)

    def _run(self) -> None:
        over = False
        while not over:
            self._wake.wait(self._every_s)
            self._wake.clear()
            over = self._over
            if self._items:
                self._handle([self._items.popleft() for _ in range(len(self._items))])
