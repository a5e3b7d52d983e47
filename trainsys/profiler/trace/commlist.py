"""One rank's communications as columns: what is needed to match them with the other ranks'."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trainsys.profiler.trace.breakdown import comm_group
from trainsys.profiler.trace.classify import COMM, axis_of, comm_op
from trainsys.profiler.trace.columns import CommMeta, RankTrace
from trainsys.profiler.trace.intervals import Ints
from trainsys.profiler.trace.link import Launches, steps_at
from trainsys.profiler.trace.opflops import ELEMENT_BYTES

HOST_PREFIXES = ("gloo:", "mpi:", "ucc:")


@dataclass(frozen=True, slots=True)
class GroupKey:
    """A communicator: name, description, axis and member ranks as far as the trace tells."""

    name: str
    label: str
    axis: str
    ranks: tuple[int, ...]


@dataclass(slots=True)
class CommList:
    """In order of start. ``key``, ``op`` index ``keys``, ``ops``; ``size`` in bytes, ``seq``, ``step`` -1 unknown.

    ``size`` is the full message as bus bandwidth counts it: the input of all_reduce and reduce_scatter, the
    output of all_gather.
    """

    start: Ints
    end: Ints
    key: Ints
    op: Ints
    size: Ints
    seq: Ints
    step: Ints
    """The profiler step it was launched in."""
    keys: list[GroupKey]
    ops: list[str]
    on_host: bool

    def __len__(self) -> int:
        return int(self.start.size)


def list_communications(trace: RankTrace, kinds: Ints, launches: Launches) -> CommList:
    """Device communications; for a run without a device, the host's (gloo, MPI)."""
    chosen = np.flatnonzero(kinds == COMM) if len(trace.device) else np.zeros(0, np.int64)
    on_host = not len(trace.device)
    source = trace.notes if on_host else trace.device
    if on_host and len(trace.notes):
        host = np.array([n.startswith(HOST_PREFIXES) for n in trace.names], bool)
        chosen = np.flatnonzero(host[trace.notes.name])
    meta = trace.notes.correlation[chosen] if on_host else trace.device.comm[chosen]
    keys: dict[GroupKey, int] = {}
    ops: dict[str, int] = {}
    by_pair: dict[tuple[int, int], tuple[int, int, int, int]] = {}
    rows = []
    for m, n in zip(meta.tolist(), source.name[chosen].tolist(), strict=True):
        row = by_pair.get((m, n))
        if row is None:
            found = trace.comm_meta[m] if m >= 0 else CommMeta()
            op = comm_op(found.op or trace.names[n])
            key = _key(trace, m, found)
            row = by_pair[(m, n)] = (
                keys.setdefault(key, len(keys)),
                ops.setdefault(op, len(ops)),
                _size(found, op),
                found.sequence,
            )
        rows.append(row)
    columns = np.array(rows, np.int64).reshape(-1, 4)
    return CommList(
        source.start[chosen],
        source.end[chosen],
        columns[:, 0],
        columns[:, 1],
        columns[:, 2],
        columns[:, 3],
        steps_at(trace, source.start[chosen] if on_host else launches.start[chosen]),
        list(keys),
        list(ops),
        on_host,
    )


def _key(trace: RankTrace, index: int, meta: CommMeta) -> GroupKey:
    label, axis = comm_group(trace, index)
    ranks = meta.ranks or trace.groups.get(meta.group, ("", ()))[1]
    if label == "unknown" and len(trace.groups) == 1:
        # The file knows of one group only, so what names none is of that one.
        ((name, (description, ranks)),) = trace.groups.items()
        return GroupKey(name, f"{name}:{description}", axis_of(description) or "unknown", ranks)
    return GroupKey(meta.group, label, axis, ranks)


def _size(meta: CommMeta, op: str) -> int:
    width = ELEMENT_BYTES.get(meta.dtype, 0)
    elements = meta.in_elements
    if op == "all_gather" or elements < 0:
        elements = max(meta.out_elements, meta.in_elements)
    return elements * width if elements >= 0 and width else -1
