"""What a step gives its device to do, in the order in which the host says so: the record that checks read.

Streams, events and storages are numbers. Stream 0 computes. A storage's number stands for one allocation: emptied and
filled again, it has another.
"""

from __future__ import annotations

from dataclasses import dataclass, field

MAIN = 0

Channel = tuple[str, tuple[int, ...]]
"""A communicator: the name of its process group, and its ranks."""


@dataclass(slots=True)
class Kernel:
    stream: int
    name: str
    flops: int
    nbytes: int
    """touched"""
    reads: tuple[int, ...]
    writes: tuple[int, ...]


@dataclass(slots=True, frozen=True)
class Message:
    sends: bool
    peer: int
    """rank"""
    key: tuple[object, ...]
    """what it carries: both ends say the same"""
    nbytes: int


@dataclass(slots=True)
class Comm:
    """A collective, or a batch of messages that NCCL starts together."""

    stream: int
    channel: Channel
    axis: str
    op: str
    shape: tuple[int, ...]
    """bytes in and out: equal on all ranks of an even collective"""
    nbytes: int
    """that this rank sends"""
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    messages: tuple[Message, ...] = ()


@dataclass(slots=True)
class Record:
    stream: int
    event: int


@dataclass(slots=True)
class Wait:
    """What the stream is given from here on comes after what the event stands for."""

    stream: int
    event: int


@dataclass(slots=True)
class Alloc:
    """From the pool of the stream that is current, as the caching allocator has it."""

    stream: int
    storage: int


@dataclass(slots=True)
class Free:
    storage: int


@dataclass(slots=True)
class HostSync:
    """The host waits for the device."""

    what: str


Node = Kernel | Comm | Record | Wait | Alloc | Free | HostSync


@dataclass
class Trace:
    """Two steps of one rank; the first makes what is made once."""

    rank: int
    nodes: list[Node]
    marks: list[tuple[list[str], list[int]]]
    """of each step, as `trainsys.telemetry.timer.MarkedStep` has them: names, events"""
    second: int
    """where the second step begins in ``nodes``"""
    groups: dict[str, str] = field(default_factory=dict)
    """axis -> the axis that counts for all with its process group"""
    foreign_marks: int = 0
    """on another stream than the one that computes"""
