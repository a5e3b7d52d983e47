"""Many records as columns: what readers compute with, and what ``telemetry.block`` packs.

A record is its *shape* (names, and every value that is no number) and its numbers. A run has few shapes, and each number
of theirs is a column over the records that have it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from trainsys.telemetry.events import AnyEvent

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
Column = npt.NDArray[Any]
"""int64 or float64, over all records; 0 where a record lacks it."""

# In a column's name, before a key, before a place in a list, and after a container that is empty.
KEY, PLACE, EMPTY = "\x1f", "\x1e", "\x1d"
Shape = tuple[tuple[str, ...], tuple[tuple[str, Any], ...]]
"""Names of columns, and (name, value) of what is no number."""


class NoColumns(ValueError):
    """A record that has no place in columns: it is written as it is."""


class Records:
    """Records in order. A column's name is ``i`` or ``f`` (integers or floats), the record's type, and the path in it."""

    def __init__(self, shapes: Sequence[Shape], shape_of: Ints, make: Callable[[Records, str], Column]) -> None:
        """``shape_of[n]``: each record's shape. ``make`` gives a column, when it is asked for first."""
        self.shapes, self.shape_of = shapes, shape_of
        self.all_names = list(dict.fromkeys(name for names, _ in shapes for name in names))
        self._make = make
        self._known = set(self.all_names)
        self._made: dict[str, Column] = {}
        self._there: dict[str, Mask] = {}
        self._events = [_event_of(shape) for shape in shapes]

    def __len__(self) -> int:
        return int(self.shape_of.size)

    def raw(self, name: str) -> Column:
        if name not in self._made:
            self._made[name] = self._make(self, name)
        return self._made[name]

    def there(self, name: str) -> Mask:
        """[n]: which records have this column."""
        if name not in self._there:
            self._there[name] = np.array([name in names for names, _ in self.shapes], bool)[self.shape_of]
        return self._there[name]

    def of(self, event: str) -> Mask:
        """[n]: which records are of this type."""
        return np.array([e == event for e in self._events], bool)[self.shape_of]

    def names(self, event: str, *path: str) -> list[str]:
        """Names right under ``path`` in records of this type, in the order in which they came up."""
        head = KEY.join((event, *path)) + KEY
        found = (name[1 + len(head) :] for name in self.all_names if name.startswith(head, 1))
        return list(dict.fromkeys(name.split(KEY)[0].split(PLACE)[0] for name in found))

    def column(self, event: str, *path: str) -> tuple[Floats, Mask]:
        """A number of all records as floats, 0 where it is not there; and where it is. Not to be changed. A place in a
        list is written after its name: ``at("all_reduce", 2)``."""
        found = [name for kind in "if" if (name := kind + KEY.join((event, *path))) in self._known]
        if len(found) == 1:
            return self.raw(found[0]).astype(np.float64, copy=False), self.there(found[0])
        values, there = np.zeros(len(self)), np.zeros(len(self), bool)
        for name in found:
            values += self.raw(name)
            there |= self.there(name)
        return values, there

    def rows(self, but: tuple[str, ...] = ()) -> Iterator[dict[str, Any]]:
        """Each record again, as JSON has it, without those of some types."""
        wanted = [event not in but for event in self._events]
        lists = {
            name: self.raw(name).tolist()
            for name in {n for (names, _), take in zip(self.shapes, wanted, strict=True) if take for n in names}
        }
        routes = [
            ([(_route(n[1:]), lists[n]) for n in names], [(_route(n), n, v) for n, v in constants]) if take else None
            for (names, constants), take in zip(self.shapes, wanted, strict=True)
        ]
        for row, shape in enumerate(self.shape_of.tolist()):
            route_of = routes[shape]
            if route_of is None:
                continue
            numbers, constants = route_of
            record: dict[str, Any] = {}
            for route, values in numbers:
                _put(record, route, values[row])
            for route, name, value in constants:
                _put(record, route, ({} if value == "{}" else []) if name.endswith(EMPTY) else value)
            yield record

    def events(self, but: tuple[str, ...] = ()) -> Iterator[AnyEvent | None]:
        """The same typed, without those of some types; None for one that this version does not know."""
        for record in self.rows(but):
            try:
                yield msgspec.convert(record, AnyEvent)
            except msgspec.ValidationError:
                yield None


class Gathering:
    """Makes ``Records``, one by one."""

    def __init__(self) -> None:
        self._shapes: dict[Shape, int] = {}
        self._numbers: list[list[list[float]]] = []
        """By shape and record, in the order of the shape's names."""
        self._shape_of: list[int] = []

    def __len__(self) -> int:
        return len(self._shape_of)

    def add(self, record: dict[str, Any]) -> None:
        """One record, as JSON has it. Raises NoColumns."""
        names: list[str] = []
        numbers: list[float] = []
        constants: list[tuple[str, Any]] = []
        event = str(record.get("event", ""))
        _check(event)
        _flatten(record, event, names, numbers, constants)
        shape = (tuple(names), tuple(constants))
        number = self._shapes.get(shape)
        if number is None:
            number = self._shapes[shape] = len(self._shapes)
            self._numbers.append([])
        self._numbers[number].append(numbers)
        self._shape_of.append(number)

    def records(self) -> Records:
        shapes, shape_of = list(self._shapes), np.array(self._shape_of, np.int64)
        made: dict[str, Column] = {}
        for number, (names, _) in enumerate(shapes):
            rows = np.flatnonzero(shape_of == number)
            for name, values in zip(names, zip(*self._numbers[number], strict=True), strict=True):
                kind = np.int64 if name[0] == "i" else np.float64
                column = made.setdefault(name, np.zeros(shape_of.size, kind))
                column[rows] = np.array(values, kind)
        return Records(shapes, shape_of, lambda records, name: made[name])


def at(name: str, place: int) -> str:
    """The path entry of a place in a list."""
    return f"{name}{PLACE}{place}"


def gathered(events: Sequence[Any]) -> Records:
    """Typed records as columns."""
    out = Gathering()
    for event in events:
        out.add(msgspec.to_builtins(event))
    return out.records()


def _flatten(
    value: Any, path: str, names: list[str], numbers: list[float], constants: list[tuple[str, Any]]
) -> None:
    kind = type(value)
    if kind is float:
        names.append("f" + path)
        numbers.append(value)
    elif kind is int:
        if not -(1 << 63) <= value < 1 << 63:
            raise NoColumns(f"{value} has no 64 bits")
        names.append("i" + path)
        numbers.append(value)
    elif kind is dict and value:
        for key, inner in value.items():
            _check(key)
            _flatten(inner, f"{path}{KEY}{key}", names, numbers, constants)
    elif kind is list and value:
        for place, inner in enumerate(value):
            _flatten(inner, f"{path}{PLACE}{place}", names, numbers, constants)
    elif kind is dict or kind is list:
        constants.append((path + EMPTY, "{}" if kind is dict else "[]"))
    elif value is None or kind is str or kind is bool:
        constants.append((path, value))
    else:
        raise NoColumns(f"a {kind.__name__} has no place in a record")


def _check(name: str) -> None:
    if KEY in name or PLACE in name or EMPTY in name:
        raise NoColumns(f"a name with a control character: {name!r}")


def _event_of(shape: Shape) -> str:
    first = shape[0][0][1:] if shape[0] else shape[1][0][0]
    return first.split(KEY)[0].split(PLACE)[0]


def _route(name: str) -> list[str | int]:
    """The way to a value: keys, and places in lists."""
    steps: list[str | int] = []
    for part in name.split(KEY)[1:]:
        key, *places = part.rstrip(EMPTY).split(PLACE)
        steps += [key, *map(int, places)]
    return steps


def _put(record: dict[str, Any], route: list[str | int], value: Any) -> None:
    if not route:  # a record without anything
        return
    into: Any = record
    for step, following in pairwise(route):
        into = _slot(into, step, {} if isinstance(following, str) else [])
    _slot(into, route[-1], value)


def _slot(into: Any, step: str | int, fresh: Any) -> Any:
    if isinstance(step, str):
        return into.setdefault(step, fresh)
    into += [None] * (step + 1 - len(into))
    if into[step] is None:
        into[step] = fresh
    return into[step]
