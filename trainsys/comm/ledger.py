"""How often, how many bytes and how long each axis communicated."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(slots=True)
class Traffic:
    """Totals of one operation on one axis of this rank.

    ``sent_bytes`` is what this rank puts on the wire under a bandwidth-optimal (ring) algorithm, for a
    group of ``n`` and a full tensor of ``b`` bytes: all-gather, reduce-scatter and all-to-all
    ``b (n-1)/n``, all-reduce ``2 b (n-1)/n`` (Patarasuk & Yuan 2009), a send ``b``.
    ``blocked_s`` is time the calling thread waited for it (on CUDA: only the launch); where a recorder listens
    it times them, and this stays 0.
    """

    calls: int = 0
    sent_bytes: int = 0
    blocked_s: float = 0.0


class SpanRecorder(Protocol):
    def collective_span(self, axis: str, op: str, nbytes: int) -> AbstractContextManager[None]: ...

    def waiting(self, axis: str, stream: Any) -> AbstractContextManager[None]: ...


class _Span:
    """A plain class: a hundred of these a step must not be felt, and a generator would be."""

    __slots__ = ("_began", "_entry")

    def __init__(self, entry: Traffic) -> None:
        self._entry = entry

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(self, *error: Any) -> None:
        self._entry.blocked_s += time.perf_counter() - self._began


_NOTHING = nullcontext()
MAX_CACHED = 4096
"""Distinct collectives kept; sizes that vary without end (uneven all-to-all) start the cache anew."""


class Ledger:
    """Counts every collective of this rank, and has each timed by the recorder of the step, if there is one."""

    def __init__(self) -> None:
        self.traffic: dict[tuple[str, str], Traffic] = {}
        self._recorder: SpanRecorder | None = None
        self._spans: dict[tuple[str, str, int], tuple[Traffic, AbstractContextManager[None]]] = {}

    @property
    def recorder(self) -> SpanRecorder | None:
        return self._recorder

    @recorder.setter
    def recorder(self, recorder: SpanRecorder | None) -> None:
        self._recorder = recorder
        self._spans.clear()

    def span(self, axis: str, op: str, sent_bytes: int) -> AbstractContextManager[None]:
        """Around a blocking collective, or around the wait for one that was started earlier: one call. Spans of one
        axis must not be nested."""
        # One lookup for what counts and what times: this runs dozens of times a layer.
        made = self._spans.get((axis, op, sent_bytes))
        if made is None:
            made = self._make(axis, op, sent_bytes)
        entry, span = made
        entry.calls += 1
        entry.sent_bytes += sent_bytes
        return span

    def waiting(self, axis: str, stream: Any) -> AbstractContextManager[None]:
        """Around ``stream``'s wait for a collective that another stream runs: time of the axis, on the device alone,
        if ``stream`` (None: the current one) is the compute stream. It counts no call."""
        return _NOTHING if self._recorder is None else self._recorder.waiting(axis, stream)

    def _make(self, axis: str, op: str, sent_bytes: int) -> tuple[Traffic, AbstractContextManager[None]]:
        if len(self._spans) >= MAX_CACHED:
            self._spans.clear()
        entry = self.traffic.setdefault((axis, op), Traffic())
        recorder = self._recorder
        span = _Span(entry) if recorder is None else recorder.collective_span(axis, op, sent_bytes)
        made = self._spans[axis, op, sent_bytes] = entry, span
        return made

    def calls(self, axis: str) -> int:
        return sum(t.calls for (a, _), t in self.traffic.items() if a == axis)

    def sent_bytes(self, axis: str) -> int:
        return sum(t.sent_bytes for (a, _), t in self.traffic.items() if a == axis)

    def reset(self) -> None:
        self.traffic.clear()
        self._spans.clear()
