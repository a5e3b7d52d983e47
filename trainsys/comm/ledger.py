"""How often, how many bytes and how long each axis communicated."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Protocol


@dataclass(slots=True)
class Traffic:
    """Totals of one operation on one axis of this rank.

    ``sent_bytes`` is what this rank puts on the wire under a bandwidth-optimal (ring) algorithm, for a
    group of ``n`` and a full tensor of ``b`` bytes: all-gather, reduce-scatter and all-to-all
    ``b (n-1)/n``, all-reduce ``2 b (n-1)/n`` (Patarasuk & Yuan 2009), a send ``b``.
    ``blocked_s`` is time the calling thread waited for it (on CUDA: only the launch).
    """

    calls: int = 0
    sent_bytes: int = 0
    blocked_s: float = 0.0


class SpanRecorder(Protocol):
    def collective_span(self, axis: str, op: str, nbytes: int) -> AbstractContextManager[None]: ...


class Ledger:
    """Counts every collective of this rank, and tells the recorder of the step, if there is one, about each."""

    def __init__(self) -> None:
        self.traffic: dict[tuple[str, str], Traffic] = {}
        self.recorder: SpanRecorder | None = None

    @contextmanager
    def span(self, axis: str, op: str, sent_bytes: int) -> Iterator[None]:
        """Around a blocking collective, or around the wait for one that was started earlier: one call."""
        recorder = self.recorder
        t0 = time.perf_counter()
        with nullcontext() if recorder is None else recorder.collective_span(axis, op, sent_bytes):
            yield
        entry = self.traffic.setdefault((axis, op), Traffic())
        entry.calls += 1
        entry.sent_bytes += sent_bytes
        entry.blocked_s += time.perf_counter() - t0

    def calls(self, axis: str) -> int:
        return sum(t.calls for (a, _), t in self.traffic.items() if a == axis)

    def sent_bytes(self, axis: str) -> int:
        return sum(t.sent_bytes for (a, _), t in self.traffic.items() if a == axis)

    def reset(self) -> None:
        self.traffic.clear()
