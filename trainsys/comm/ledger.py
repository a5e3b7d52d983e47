"""How often, how many bytes and how long each axis communicated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


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


# Called after every collective as (axis, operation, sent_bytes, blocked_s).
Listener = Callable[[str, str, int, float], None]


class Ledger:
    """Counts every collective of this rank; tells one listener (the recorder) about each."""

    def __init__(self) -> None:
        self.traffic: dict[tuple[str, str], Traffic] = {}
        self.listener: Listener | None = None

    def add(self, axis: str, op: str, sent_bytes: int, blocked_s: float) -> None:
        entry = self.traffic.get((axis, op))
        if entry is None:
            entry = self.traffic[axis, op] = Traffic()
        entry.calls += 1
        entry.sent_bytes += sent_bytes
        entry.blocked_s += blocked_s
        if self.listener is not None:
            self.listener(axis, op, sent_bytes, blocked_s)

    def calls(self, axis: str) -> int:
        return sum(t.calls for (a, _), t in self.traffic.items() if a == axis)

    def sent_bytes(self, axis: str) -> int:
        return sum(t.sent_bytes for (a, _), t in self.traffic.items() if a == axis)

    def reset(self) -> None:
        self.traffic.clear()
