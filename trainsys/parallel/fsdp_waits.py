"""Where the compute stream waits for FSDP2, marked for the device's waterfall.

FSDP2 gathers and reduces on streams of its own, and its compute stream waits for events that those record: before a
unit's weights are used, before memory of a reduction is used again, at the end of backward. A collective that nobody
waits for costs a step nothing, so it is these waits, not the launches, that are exposed communication.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule

from trainsys.comm.ledger import Ledger

_STREAMS = ("all_gather_stream", "reduce_scatter_stream", "all_reduce_stream")
"""of torch's FSDPCommContext, which has the same names in torch 2.11 and 2.13"""


class Waits:
    """``axis``: of the collective launched last; FSDP records its event right behind the launch."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger, self.axis = ledger, "fsdp"


class _Event:
    """An event of a stream that communicates: who waits for it on the compute stream waits for its axis."""

    def __init__(self, event: Any, waits: Waits) -> None:
        self._event, self._ledger, self._axis = event, waits.ledger, waits.axis

    def wait(self, stream: Any = None) -> None:
        with self._ledger.waiting(self._axis, stream):
            self._event.wait(stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._event, name)


class _Stream:
    """FSDP's stream, whose events are marked when they are waited for."""

    def __init__(self, stream: Any, waits: Waits) -> None:
        self._stream, self._waits = stream, waits

    def record_event(self, *args: Any) -> _Event | None:
        event = self._stream.record_event(*args)
        # A CPU's has none; FSDP then waits for the collective itself.
        return None if event is None else _Event(event, self._waits)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def mark_waits(root: FSDPModule, waits: Waits) -> None:
    """Mark the waits of all units below ``root``, once FSDP makes its streams in the first forward."""
    context: Any = root._get_fsdp_state()._comm_ctx
    make = context.lazy_init

    def lazy_init(device: torch.device) -> None:
        make(device)
        for name in _STREAMS:
            setattr(context, name, _Stream(getattr(context, name), waits))

    context.lazy_init = lazy_init
