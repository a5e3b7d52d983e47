"""Traces whose events have no category: JAX and XLA, Ascend. What they are is said by the names of their tracks.

``process_name`` and ``thread_name`` name the tracks; those that are a device's own are taken. Tracks that repeat the
device's work at another level (modules, steps, source lines) are not.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec

from trainsys.profiler.trace.events import AnyEvent

_DEVICE = re.compile(r"/device:(?:GPU|TPU|XPU):(\d+)|^Ascend Hardware|^NPU\b|^(?:HCCL|Communication)$", re.I)
_REPEATS = re.compile(
    r"XLA Modules|Steps|Framework|Source|TraceMe|Name Scope|Launch Stats|^Plane|Overlap", re.I
)
_WAITS = frozenset(
    {"EVENT_WAIT", "EVENT_RECORD", "NOTIFY_WAIT", "NOTIFY_RECORD", "NOTIFY_WAIT_SQE", "EVENT_WAIT_SQE"}
)
MOST = 5_000_000


class Tracks:
    """Collects uncategorised events, and gives those of devices as (event, device, stream)."""

    def __init__(self) -> None:
        self.processes: dict[Any, str] = {}
        self.threads: dict[tuple[Any, Any], str] = {}
        self.events: list[AnyEvent] = []

    def add(self, events: list[AnyEvent]) -> None:
        for e in events:
            if e.name in ("process_name", "thread_name"):
                label = str(_args(e).get("name", ""))
                if e.name == "process_name":
                    self.processes[e.pid] = label
                else:
                    self.threads[e.pid, e.tid] = label
            elif e.dur >= 0 and e.ts >= 0 and len(self.events) < MOST:
                self.events.append(e)

    def device_events(self) -> list[tuple[AnyEvent, int, int]]:
        """Device by its number in the track's name (0 where there is none), stream by the thread."""
        streams: dict[tuple[Any, Any], int] = {}
        chosen = []
        for e in self.events:
            found = _DEVICE.search(self.processes.get(e.pid, ""))
            track = self.threads.get((e.pid, e.tid), "")
            if found is None or _REPEATS.search(track) or self._beside_streams(e, track):
                continue
            if str(_args(e).get("Task Type", "")) in _WAITS:
                continue
            if self.processes[e.pid] in ("HCCL", "Communication") and not e.name.startswith("hcom_"):
                continue
            stream = streams.setdefault((e.pid, e.tid), len(streams))
            chosen.append((e, int(found.group(1) or 0), stream))
        return chosen

    def _beside_streams(self, event: AnyEvent, track: str) -> bool:
        """``XLA Ops`` repeats a GPU's streams; on a TPU, which has none, it is all there is."""
        if track != "XLA Ops":
            return False
        return any(pid == event.pid and name.startswith("Stream") for (pid, _), name in self.threads.items())


def _args(event: AnyEvent) -> dict[str, Any]:
    try:
        found = msgspec.json.decode(event.args or b"{}")
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
