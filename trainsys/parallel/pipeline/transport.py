"""Activations and their gradients between the ranks of pp."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch.distributed as dist
from torch import Tensor

from trainsys.comm.group import AxisGroup
from trainsys.comm.ops import nbytes
from trainsys.schedules.program import Exchange, Message

# Sends that may be under way before the oldest is waited for. It has long been received by then: each later
# one was made by an action that came after it.
SENDS_UNDER_WAY = 4

Key = tuple[bool, int, int]
"""What a message carries: (activations or their gradient, stage and micro-batch of the action that made it)."""


class Transport:
    """Starts exchanges in the order of the program, hands over what arrived, holds what is being sent.

    Sends are counted when they are started (``send``); waiting for a message is counted as ``recv``, of 0
    bytes sent. ``buffer`` makes the empty tensor that the output of a stage is received into.
    """

    def __init__(self, group: AxisGroup, buffer: Callable[[], Tensor], *, overlap: bool = True) -> None:
        self.group, self.buffer = group, buffer
        self._most_leaving = SENDS_UNDER_WAY if overlap else 0
        self._arriving: dict[Key, tuple[Tensor, dist.Work]] = {}
        self._leaving: deque[tuple[Tensor, dist.Work]] = deque()

    def start(self, exchange: Exchange, outputs: dict[Key, Tensor]) -> None:
        """Take what is to be sent from ``outputs``, and start it beside the receives."""
        g = self.group
        sends = [(outputs.pop(_key(m)), m) for m in exchange.sends]
        receives = [(self.buffer(), m) for m in exchange.receives]
        todo = [
            *(dist.P2POp(dist.isend, x, g.ranks[m.peer], g.group) for x, m in sends),
            *(dist.P2POp(dist.irecv, x, g.ranks[m.peer], g.group) for x, m in receives),
        ]
        sent = sum(nbytes(x) for x, _ in sends)
        if sends:
            with g.ledger.span(g.axis, "send", sent):
                works = self._post(todo)
        else:
            works = self._post(todo)
        if len(works) < len(todo):  # NCCL gives one for all of them
            works = works * len(todo)
        for (x, m), work in zip(receives, works[len(sends) :], strict=True):
            self._arriving[_key(m)] = x, work
        self._leaving.extend(zip([x for x, _ in sends], works, strict=False))
        self._release(self._most_leaving)

    def _post(self, todo: list[dist.P2POp]) -> list[dist.Work]:
        """Tests put a slow link here."""
        return dist.batch_isend_irecv(todo)

    def take(self, forward: bool, stage: int, micro: int) -> Tensor:
        """What the action ``(stage, micro)`` of another rank made; waits until it is here."""
        x, work = self._arriving.pop((forward, stage, micro))
        with self.group.ledger.span(self.group.axis, "recv", 0):
            work.wait()
        return x

    def _release(self, keep: int) -> None:
        """Wait for all but the last ``keep`` sends, and forget what they sent."""
        if len(self._leaving) <= keep:
            return
        with self.group.ledger.span(self.group.axis, "sent", 0):
            while len(self._leaving) > keep:
                self._leaving.popleft()[1].wait()

    def finish(self) -> None:
        """The end of a step: everything was received and everything sent."""
        assert not self._arriving, f"received but not used: {sorted(self._arriving)}"
        self._release(0)


def _key(m: Message) -> Key:
    return m.forward, m.stage, m.micro
