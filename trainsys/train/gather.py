"""All ranks' view of a window of steps, gathered to rank 0 off the critical path."""

from __future__ import annotations

from concurrent.futures import Future

import numpy as np

from trainsys.checkpoint.ranks import Ranks
from trainsys.telemetry.aggregate import Floats, Window
from trainsys.telemetry.events import Step
from trainsys.threads import Lane


class WindowGather:
    """Starts a gather of this rank's window; rank 0 reads the result when the next one starts.

    A few dozen float64 a rank, in the background: nobody waits unless a whole window is shorter than the gather.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks.beside()
        self._window = Window()
        self._sender = Lane("window")
        self._pending: Future[list[Floats]] | None = None

    def add(self, step: Step) -> None:
        self._window.add(step)

    def exchange(self) -> Floats | None:
        """Send this window, which must have a step. On rank 0 returns the one before, if there was one: ``[R, V]``."""
        before = self.last()
        self._pending = self._sender.submit(self._ranks.to_first, self._window.take())
        return before

    def last(self) -> Floats | None:
        """The window that was sent last, waiting for it; None on other ranks, or if it was taken already."""
        if self._pending is None:
            return None
        rows, self._pending = self._pending.result(), None
        return np.stack(rows) if rows else None

    def close(self) -> None:
        """Give up what is under way."""
        self._ranks.close()
        self._sender.shutdown(wait=False, cancel_futures=True)
