"""What an allocator snapshot says. Bytes."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Holder:
    """What holds memory at the peak: ``where`` is the user's own line, ``module`` the call path of modules.

    ``part``: optimizer, backward, forward, input/parameters (allocated from plain Python) or unknown.
    """

    where: str
    module: str
    part: str
    bytes: int
    blocks: int
    each: list[int] = field(default_factory=list)
    """Bytes of its blocks, oldest first: layers that share a line are told apart by their order. At most 128."""


@dataclass(frozen=True, slots=True)
class Leak:
    """A line of code whose allocations were never freed, throughout the history."""

    where: str
    bytes: int
    blocks: int


@dataclass(frozen=True, slots=True)
class OutOfMemory:
    """One refused request.

    ``total_free``: the allocator's free bytes that the request could have used had they been in one block;
    ``elsewhere_free``: those in CUDA graphs' private pools, of other streams, or in segments for small requests.
    ``would_fit``: usable free bytes plus the device's own would hold it. ``expandable``: those lie in expandable
    segments already.
    """

    request: int
    device_free: int
    largest_free_block: int
    total_free: int
    would_fit: bool
    where: str
    elsewhere_free: int = 0
    expandable: bool = False


@dataclass(slots=True)
class MemoryReport:
    """One device of one snapshot.

    ``reserved`` = ``active`` + ``inactive``: from the driver; in use; kept for reuse. ``rounding``: part of
    active that was not asked for. ``fragmentation``: share of the free bytes that no single block holds:
    1 - largest free block / all free bytes. ``peak`` is of active bytes over the recorded history.
    """

    path: str
    device: int
    reserved: int
    active: int
    inactive: int
    rounding: int
    segments: int
    largest_free_block: int
    fragmentation: float
    peak: int
    peak_time_us: int
    holders: list[Holder]
    by_part: dict[str, int]
    """Bytes active at the peak by part; sums to ``peak``."""
    by_module: dict[str, int]
    timeline: list[tuple[int, int, int]]
    """(time in us since the first event, active bytes, reserved bytes), at most 600 points, maxima kept."""
    out_of_memory: list[OutOfMemory] = field(default_factory=list)
    largest_request: int = 0
    """The largest allocation of the history: what ``would_fit`` is about where nothing failed."""
    would_fit: bool = True
    """Whether the largest request fits in one free block now."""
    pending_free: int = 0
    """Bytes freed by the program that wait for another stream's work before they can be used again."""
    private: int = 0
    """Bytes reserved by private pools (CUDA graphs)."""
    leaks: list[Leak] = field(default_factory=list)
    said: dict[str, int] = field(default_factory=dict)
