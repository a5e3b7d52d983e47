"""Sends and receives between members of a group that run while something else is computed.

``link.exchange`` starts them and returns at once; ``wait`` on what it returns blocks until they are done.
Both directions are posted together: gloo's sends wait for their receiver, so two ranks that first send and
then receive would wait for each other for ever.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from trainsys.comm.group import AxisGroup
from trainsys.comm.ops import nbytes

Message = tuple[Tensor, int]
"""A contiguous tensor and the peer's index in the group."""


class Transfer:
    """Messages in flight. Their tensors must not be written to before ``wait`` returns."""

    def __init__(self, group: AxisGroup, op: str, works: list[dist.Work], sends: Sequence[Message]) -> None:
        self._group, self._op, self._works, self._sends = group, op, works, list(sends)

    def wait(self) -> None:
        """On CUDA: make the current stream wait, not the thread. Nothing in flight: nothing is counted."""
        if not self._works:
            return
        sent = sum(nbytes(x) for x, _ in self._sends)
        with self._group.ledger.span(self._group.axis, self._op, sent):
            self._finish()
        self._works = []

    def _finish(self) -> None:
        for work in self._works:
            work.wait()


class Incoming:
    """Tensors on their way here."""

    def __init__(self, transfer: Transfer, tensors: list[Tensor]) -> None:
        self._transfer, self._tensors = transfer, tensors

    def wait(self) -> list[Tensor]:
        """Until they are here, and what was sent with them may be written to."""
        self._transfer.wait()
        return self._tensors


class Link:
    """How the members of one group reach each other. Tests put a slow one in its place.

    Without ``overlap`` what is started is waited for at once. That cannot lock up where all members make the same
    exchanges in the same order, as every flavour of context parallelism does.
    """

    def __init__(self, group: AxisGroup, *, overlap: bool = True) -> None:
        self.group, self.overlap = group, overlap

    def exchange(self, op: str, sends: Sequence[Message], receives: Sequence[Message]) -> Transfer:
        """Start all of ``sends`` and ``receives`` (filled in place). ``op`` names them in the ledger.

        Messages between the same two ranks arrive in the order in which they were started; those of an
        ``op`` of another name may be started in another order on the other side, but not on NCCL.
        """
        transfer = self._transfer(op, sends, receives)
        if not self.overlap:
            transfer.wait()
        return transfer

    def swap(
        self,
        op: str,
        tensors: Sequence[Tensor],
        to: int | None,
        source: int | None,
        like: Sequence[Tensor] | None = None,
    ) -> Incoming:
        """Send ``tensors`` to one member and receive as many from another, of the shapes of ``like`` (None:
        of ``tensors``). A peer that is None: nothing that way."""
        arriving = [
            torch.empty_like(x, memory_format=torch.contiguous_format)
            for x in ((like or tensors) if source is not None else ())
        ]
        sends = [] if to is None else [(x, to) for x in tensors]
        receives = [] if source is None else [(x, source) for x in arriving]
        return Incoming(self.exchange(op, sends, receives), arriving)

    def _transfer(self, op: str, sends: Sequence[Message], receives: Sequence[Message]) -> Transfer:
        return Transfer(self.group, op, self._start(op, sends, receives), sends)

    def _start(self, op: str, sends: Sequence[Message], receives: Sequence[Message]) -> list[dist.Work]:
        g, tag = self.group, _tag(op)
        todo = [
            *(dist.P2POp(dist.isend, x, g.ranks[to], g.group, tag) for x, to in sends),
            *(dist.P2POp(dist.irecv, x, g.ranks[source], g.group, tag) for x, source in receives),
        ]
        for p2p in todo:
            assert p2p.tensor.is_contiguous(), f"{op}: only contiguous tensors can be sent"
        return dist.batch_isend_irecv(todo) if todo else []


def _tag(op: str) -> int:
    """Equal on all ranks, which Python's ``hash`` is not."""
    return int.from_bytes(op.encode(), "big") % 32749
