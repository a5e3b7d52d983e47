"""Links that take their time, whatever the real one does."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

from trainsys.comm.group import AxisGroup
from trainsys.comm.p2p import Link, Message, Transfer

ATTEMPTS = 5
"""A sleeping rank may wake late on a busy machine; one undisturbed attempt is enough."""


def sleep_until(moment: float) -> None:
    """``moment`` on time.perf_counter, which all processes of a machine share."""
    time.sleep(max(0.0, moment - time.perf_counter()))


class Late(dist.Work):
    """Done when ``work`` is, but not before ``until``."""

    def __init__(self, work: dist.Work, until: float) -> None:
        super().__init__()
        self._work, self._until = work, until

    def wait(self, *args: Any) -> bool:
        self._work.wait()
        sleep_until(self._until)
        return True


class Lane:
    """One message after the other."""

    def __init__(self) -> None:
        self._free_at = 0.0

    def take(self, seconds: float) -> float:
        """When a message that starts now, or as soon as the lane is free, has passed."""
        self._free_at = max(time.perf_counter(), self._free_at) + seconds
        return self._free_at


class SlowLink(Link):
    """``message_s`` for what goes to one peer at a time. One lane a name: on a duplex link what goes up the ring
    does not slow what goes down."""

    def __init__(self, group: AxisGroup, message_s: float, *, overlap: bool = True) -> None:
        super().__init__(group, overlap=overlap)
        self.message_s = message_s
        self.lanes: dict[str, Lane] = {}

    def _transfer(self, op: str, sends: Sequence[Message], receives: Sequence[Message]) -> Transfer:
        done = self.lanes.setdefault(op, Lane()).take(self.message_s * len({to for _, to in sends}))
        return _SlowTransfer(self.group, op, self._start(op, sends, receives), sends, done)


class _SlowTransfer(Transfer):
    def __init__(
        self, group: AxisGroup, op: str, works: list[dist.Work], sends: Sequence[Message], done: float
    ) -> None:
        super().__init__(group, op, works, sends)
        self._done = done

    def _finish(self) -> None:
        super()._finish()
        sleep_until(self._done)
