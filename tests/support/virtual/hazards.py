"""Races between the streams of one rank, by vector clocks: whatever kernels take, what uses a block comes after what
made it, and a block is used again only after all that used it before.

A block goes back to the pool of the stream that it was allocated on, whose next allocation may have it. A hazard is
said once for each pair of operations.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import NamedTuple

from support.virtual.trace import Alloc, Comm, Free, Kernel, Node, Record, Wait


class _Use(NamedTuple):
    stream: int
    at: int
    """position in the stream"""
    what: str


class _Block:
    def __init__(self, home: int) -> None:
        self.home = home
        self.written: _Use | None = None
        self.read: dict[int, _Use] = {}
        """last of each stream"""

    def uses(self) -> list[_Use]:
        return [*([self.written] if self.written else []), *self.read.values()]


class _Clocks:
    """What each stream knows to be done before what it is given next."""

    def __init__(self) -> None:
        self._known: dict[int, dict[int, int]] = defaultdict(dict)
        self._events: dict[int, dict[int, int]] = {}
        self._at: Counter[int] = Counter()

    def next(self, stream: int, what: str) -> _Use:
        self._at[stream] += 1
        return _Use(stream, self._at[stream], what)

    def record(self, stream: int, event: int) -> None:
        self._events[event] = {**self._known[stream], stream: self._at[stream]}

    def wait(self, stream: int, event: int) -> bool:
        """Whether the stream learns anything by it."""
        mine = self._known[stream]
        news = {o: at for o, at in self._events[event].items() if o != stream and at > mine.get(o, 0)}
        mine.update(news)
        return bool(news)

    def knows(self, stream: int, use: _Use) -> bool:
        return use.stream == stream or self._known[stream].get(use.stream, 0) >= use.at


def hazards(nodes: Iterable[Node]) -> list[str]:
    """A line for each; empty where every use is in order."""
    clocks, found = _Clocks(), dict[str, None]()
    blocks: dict[int, _Block] = {}
    freed: dict[int, list[_Block]] = defaultdict(list)

    def expect(stream: int, what: str, before: Iterable[_Use], of: str) -> None:
        for use in before:
            if not clocks.knows(stream, use):
                late = f"{use.what} on stream {use.stream} ({of})"
                found[f"{what} on stream {stream} does not wait for {late}"] = None

    for node in nodes:
        if isinstance(node, Record):
            clocks.record(node.stream, node.event)
        elif isinstance(node, Wait):
            clocks.wait(node.stream, node.event)
        elif isinstance(node, Alloc):
            for block in freed.pop(node.stream, ()):
                expect(node.stream, "an allocation", block.uses(), "its block was freed")
            block = blocks[node.storage] = _Block(node.stream)
            # Who had the block before is done for this stream alone.
            block.written = clocks.next(node.stream, "the allocation")
        elif isinstance(node, Free):
            if block := blocks.pop(node.storage, None):
                freed[block.home].append(block)
        elif isinstance(node, Kernel | Comm):
            what = node.name if isinstance(node, Kernel) else f"{node.axis} {node.op}"
            use = clocks.next(node.stream, what)
            for storage in node.reads:
                block = blocks.setdefault(storage, _Block(node.stream))
                expect(node.stream, use.what, [block.written] if block.written else [], "what it reads")
                block.read[node.stream] = use
            for storage in node.writes:
                block = blocks.setdefault(storage, _Block(node.stream))
                expect(node.stream, use.what, block.uses(), "what it writes")
                block.written, block.read = use, {}
    return list(found)


def without_needless_waits(nodes: Iterable[Node]) -> list[Node]:
    """Less the waits for what a stream knows already to be done, as the second of two for one collective."""
    clocks, kept = _Clocks(), list[Node]()
    for node in nodes:
        if isinstance(node, Record):
            clocks.record(node.stream, node.event)
        elif isinstance(node, Kernel | Comm | Alloc):
            clocks.next(node.stream, "")
        elif isinstance(node, Wait) and not clocks.wait(node.stream, node.event):
            continue
        kept.append(node)
    return kept
