"""One rank's trace as columns: what the analyses read, and nothing that grows with the rest of the file.

All times are int64 nanoseconds since the epoch the file itself uses (``baseTimeNanoseconds`` added), so
that ranks compare. Names are indices into ``names``. Memory is about 60 bytes a device activity, plus 24 a
host call that launched or waited, plus merged spans of what the host was doing.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from trainsys.profiler.trace.intervals import EMPTY, Ints, Spans

KERNEL, MEMCPY, MEMSET = 0, 1, 2


@dataclass(slots=True)
class Activities:
    """Device work: kernels, copies, sets. ``comm`` indexes ``RankTrace.comm_meta`` (-1: none given)."""

    start: Ints
    end: Ints
    name: Ints
    kind: Ints
    device: Ints
    stream: Ints
    correlation: Ints
    external: Ints
    bytes: Ints
    graph: Ints
    """The CUDA graph node a kernel was launched by, 0 for a launch of its own."""
    comm: Ints

    def __len__(self) -> int:
        return int(self.start.size)


@dataclass(slots=True)
class Calls:
    """Host-side intervals of one kind: runtime calls, annotations, operators. ``thread`` is an index."""

    start: Ints
    end: Ints
    name: Ints
    thread: Ints
    correlation: Ints

    def __len__(self) -> int:
        return int(self.start.size)


@dataclass(frozen=True, slots=True)
class CommMeta:
    """What a communication event says of itself; -1 or empty where it does not."""

    op: str = ""
    group: str = ""
    group_desc: str = ""
    ranks: tuple[int, ...] = ()
    group_size: int = -1
    in_elements: int = -1
    out_elements: int = -1
    dtype: str = ""
    sequence: int = -1


@dataclass(frozen=True, slots=True)
class Op:
    """A host operator whose FLOPs follow from its shapes."""

    name: str
    dims: tuple[tuple[int, ...], ...]
    dtype: str


@dataclass(slots=True)
class RankTrace:
    """Everything kept of one file. ``said`` is what was repaired, dropped, assumed or not linked."""

    path: Path
    rank: int
    world: int
    stated: bool = False
    """The file itself says its rank; else its name does, or nothing (-1)."""
    devices: dict[int, tuple[str, int]] = field(default_factory=dict)
    """Name and bytes of memory of the devices that the file describes."""
    device_name: str = ""
    device_memory: int = 0
    backend: str = ""
    host: str = ""
    base_ns: int = 0
    groups: dict[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)
    device: Activities = field(
        default_factory=lambda: Activities(*(np.zeros(0, np.int64) for _ in range(11)))
    )
    runtime: Calls = field(default_factory=lambda: Calls(*(np.zeros(0, np.int64) for _ in range(5))))
    notes: Calls = field(default_factory=lambda: Calls(*(np.zeros(0, np.int64) for _ in range(5))))
    """User annotations, profiler steps, data-loader and checkpoint frames, host collectives."""
    ops: Calls = field(default_factory=lambda: Calls(*(np.zeros(0, np.int64) for _ in range(5))))
    """Operators with countable FLOPs; ``correlation`` indexes ``op_shapes``."""
    op_shapes: list[Op] = field(default_factory=list)
    comm_meta: list[CommMeta] = field(default_factory=list)
    host_busy: Spans = EMPTY
    span: tuple[int, int] = (0, 0)
    """First start and last end of any event with a duration."""
    n_events: int = 0
    size_bytes: int = 0
    said: Counter[str] = field(default_factory=Counter)
