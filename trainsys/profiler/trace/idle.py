"""Why the device was idle: for each gap, what the host was doing about the activity that ended it.

- ``data``: the host was waiting for the data loader;
- ``sync``: the host had drained the device (a synchronise, a blocking copy) and was starting over;
- ``host``: the host simply had not launched the next activity yet;
- ``launch``: launched, the queue empty, not yet running: launch latency;
- ``queued``: launched before the gap began: another stream, an event or the device's own gap between kernels;
- ``unlinked``: the trace does not say who launched it.
"""

from __future__ import annotations

import re

import numpy as np

from trainsys.profiler.trace import intervals as iv
from trainsys.profiler.trace.columns import RankTrace
from trainsys.profiler.trace.intervals import Ints, Spans
from trainsys.profiler.trace.link import Launches

CAUSES = ("host", "data", "sync", "launch", "queued", "unlinked")
SYNC = re.compile(
    r"(?:Device|Stream|Event|Host|Queue)Synchronize|^ur(?:QueueFinish|EventWait)$|^(?:cuda|hip)Memcpy(?:WithStream)?$|^(?:cuda|hip)(?:Malloc|Free)$"
)
_DATA = re.compile(r"DataLoader|\bdata(?:_|\.)?(?:wait|load|loading|stall)|next_batch|fetch_batch", re.I)
_SETTLE_NS = 5_000


def data_spans(trace: RankTrace) -> Spans:
    """When the host was inside a data loader's ``__next__`` or an annotation that says as much."""
    notes = trace.notes
    loading = np.array([_DATA.search(n) is not None for n in trace.names], bool)
    chosen = np.flatnonzero(loading[notes.name]) if len(notes) else np.zeros(0, np.int64)
    return iv.union(notes.start[chosen], notes.end[chosen])


class IdleFinder:
    """Holds what is common to all the gaps of a trace."""

    def __init__(self, trace: RankTrace, launches: Launches) -> None:
        self.trace, self.launches = trace, launches
        self.starts = trace.device.start
        runtime = trace.runtime
        flags = np.array([SYNC.search(n) is not None for n in trace.names], bool)
        synced = np.flatnonzero(flags[runtime.name]) if len(runtime) else np.zeros(0, np.int64)
        self.sync_ends = np.sort(runtime.end[synced])
        self.data = data_spans(trace)

    def causes(self, gaps: Spans) -> dict[str, int]:
        """Nanoseconds of the gaps by cause; sums to their length. Causes that did not occur are left out."""
        table = self._table(gaps)
        return {cause: ns for cause, row in zip(CAUSES, table, strict=True) if (ns := int(row.sum()))}

    def main_cause(self, gaps: Spans) -> list[str]:
        """The cause with most of each gap."""
        return [CAUSES[i] for i in np.argmax(self._table(gaps), axis=0)] if gaps[0].size else []

    def _table(self, gaps: Spans) -> Ints:
        """[causes, gaps]: ns of each gap by cause."""
        begin, end = gaps
        if not begin.size:
            return np.zeros((len(CAUSES), 0), np.int64)
        after = np.minimum(np.searchsorted(self.starts, end), self.starts.size - 1)
        launch = self.launches.start[after]
        linked = launch >= 0
        # The host's share of a gap ends when it launches the activity that ends the gap.
        handover = np.clip(launch, begin, end)
        waiting = np.where(linked, handover - begin, 0)
        data = np.where(linked, iv.covered(self.data, begin, np.maximum(handover, begin)), 0)
        synced = self._drained(begin, handover)
        early = linked & (launch <= begin)
        rest = waiting - data
        zero = np.zeros_like(begin)
        return np.stack(
            [
                np.where(synced, zero, rest),
                data,
                np.where(synced, rest, zero),
                np.where(linked & ~early, end - handover, zero),
                np.where(early, end - begin, zero),
                np.where(linked, zero, end - begin),
            ]
        )

    def _drained(self, begin: Ints, handover: Ints) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
        """Whether a synchronising call returned between the gap's begin and the launch that ends it."""
        i = np.searchsorted(self.sync_ends, begin - _SETTLE_NS)
        j = np.searchsorted(self.sync_ends, handover, "right")
        return np.asarray(j > i)
