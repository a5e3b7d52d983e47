"""Streams and events that write down what they are told, where a product expects those of ``torch.cuda``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

from support.virtual.trace import MAIN, HostSync, Node, Record, Wait


class Device:
    """One device of one rank, from when it is made."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.held: dict[int, Any] = {}
        """event -> tensors of a collective that nobody has waited for, which NCCL keeps for as long"""
        self._streams, self._events = count(MAIN), count()
        self._stack = [Stream(self)]

    # What torch asks for by these names.
    def Stream(self, *_: Any, **__: Any) -> Stream:
        return Stream(self)

    def Event(self, *_: Any, **__: Any) -> Event:
        return Event(self)

    def current_stream(self, *_: Any) -> Any:
        return self._stack[-1]

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        self._stack.append(stream or self._stack[-1])
        try:
            yield
        finally:
            self._stack.pop()

    def synchronize(self, *_: Any) -> None:
        self.host_sync("synchronize")

    @property
    def current(self) -> int:
        # A product's stand-in for a stream passes reads on.
        return int(self._stack[-1].number)

    def host_sync(self, what: str) -> None:
        """Noted with the line of the product that made the host wait."""
        frame = sys._getframe(1)
        while frame.f_back is not None and not frame.f_globals.get("__name__", "").startswith("trainsys."):
            frame = frame.f_back
        where = f"{frame.f_globals.get('__name__')}:{frame.f_lineno}"
        self.nodes.append(HostSync(f"{what} at {where}"))

    def new_event(self, stream: int) -> int:
        event = next(self._events)
        self.nodes.append(Record(stream, event))
        return event

    def wait(self, stream: int, event: int) -> None:
        self.nodes.append(Wait(stream, event))
        self.held.pop(event, None)


class Stream:
    def __init__(self, device: Device) -> None:
        self._device, self.number = device, next(device._streams)

    def wait_event(self, event: Any) -> None:
        event.wait(self)

    def wait_stream(self, other: Any) -> None:
        self.wait_event(other.record_event())

    def record_event(self, event: Any = None) -> Any:
        event = event or Event(self._device)
        event.record(self)
        return event

    def synchronize(self) -> None:
        self._device.host_sync("Stream.synchronize")


class Event:
    """``number``: of what was recorded last; an event may be recorded again."""

    def __init__(self, device: Device) -> None:
        self._device, self.number, self.stream = device, -1, -1

    def record(self, stream: Any = None) -> None:
        self.stream = self._device.current if stream is None else stream.number
        self.number = self._device.new_event(self.stream)

    def wait(self, stream: Any = None) -> None:
        if self.number >= 0:
            self._device.wait(self._device.current if stream is None else stream.number, self.number)

    def query(self) -> bool:
        """The device is behind: what a mark stands for is never done while the host goes on."""
        return False

    def synchronize(self) -> None:
        self._device.host_sync("Event.synchronize")
