"""All ranks' view of a window of steps, gathered to rank 0 off the critical path."""

from __future__ import annotations

import torch
import torch.distributed as dist

from trainsys.comm.ops import all_gather_flat
from trainsys.telemetry.aggregate import Floats, Window
from trainsys.telemetry.events import Step


class WindowGather:
    """Starts a gather of this rank's window; the result is read when the next one starts.

    A few dozen float64 a rank over gloo, in the background: nobody waits unless a whole window is shorter
    than the gather.
    """

    def __init__(self, world: int) -> None:
        self._world = world
        self._window = Window()
        self._pending: tuple[dist.Work | None, Floats] | None = None

    def add(self, step: Step) -> None:
        self._window.add(step)

    def exchange(self) -> Floats | None:
        """Send this window, which must have a step; returns the one before, if there was one: ``[R, V]``."""
        before = self.last()
        row = self._window.take()
        if self._world == 1:
            self._pending = None, row[None]
            return before
        mine = torch.from_numpy(row)
        out = mine.new_empty(self._world, mine.numel())
        self._pending = all_gather_flat(out.view(-1), mine, async_op=True), out.numpy()
        return before

    def last(self) -> Floats | None:
        """The window that was sent last, waiting for it; None if it was taken already."""
        if self._pending is None:
            return None
        work, rows = self._pending
        self._pending = None
        if work is not None:
            work.wait()
        return rows
