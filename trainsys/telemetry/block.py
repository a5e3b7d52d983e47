"""A block of an event file: some hundred records in a few tens of bytes each, and back, bit by bit.

Columns go to ``telemetry.packing`` as integers: seconds as whole microseconds where they are that, otherwise by whichever
exact form fits. What follows from other columns (a step's time from its phases, its start from the one before, its MFU
from its time) is kept as the difference from that, which is nothing.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np

from trainsys.telemetry.events import COMM
from trainsys.telemetry.packing import MOST, Packed, pack, unpack
from trainsys.telemetry.records import KEY, PLACE, Column, Floats, Ints, Records

MICROS = "us"
UNITS = {"1": 1.0, MICROS: 1e6, "ns": 1e9}
BITS = {"f4": (np.float32, np.int32), "f8": (np.float64, np.int64)}
SHARES = {"mfu": "model", "mfu_palm": "palm", "hfu": "hardware"}
MOST_BYTES = 1 << 26
"""Size limit of an inflated block; what claims more is damage."""
Possible = tuple[float, int] | None
"""Peak FLOP/s of one rank, and ranks: what shares of it (MFU) follow from."""


class _Column(msgspec.Struct, array_like=True):
    form: str
    """``i``: integers; ``1``, ``us``, ``ns``: floats in such units; ``f4``, ``f8``: the bits of floats; ``share``:
    computed from other columns."""
    packed: Packed | None = None
    guessed: bool = False
    """Kept is the difference from what other columns say."""


class _Block(msgspec.Struct, array_like=True):
    names: list[str]
    shapes: list[tuple[list[int], list[tuple[str, bool | str | None]]]]
    shape_of: Packed
    columns: list[_Column]
    possible: Possible = None


_decoder = msgspec.msgpack.Decoder(_Block)


def dump(records: Records, possible: Possible = None, rest: Callable[[], None] = lambda: None) -> bytes:
    """``rest`` is called between columns: where another thread may run."""
    kept: dict[str, tuple[str, Ints]] = {}
    masks = {name: records.there(name) for name in records.all_names}
    for name, mask in masks.items():
        values = records.raw(name)[mask]
        kept[name] = ("i", values) if name[0] == "i" else _form(values)
        rest()

    def micros(name: str) -> Ints | None:
        if kept[name][0] != MICROS:
            return None
        return _spread(kept[name][1], masks[name])

    columns = []
    for name, (form, ints) in kept.items():
        if possible is not None and _is_share(name, records, possible):
            columns.append(_Column("share"))
            continue
        guess = _guess(name, records, micros) if form == MICROS else None
        columns.append(_Column(form, pack(ints if guess is None else ints - guess[masks[name]]), guess is not None))
        rest()
    places = {name: i for i, name in enumerate(kept)}
    shapes = [([places[n] for n in names], list(constants)) for names, constants in records.shapes]
    block = _Block(list(kept), shapes, pack(records.shape_of), columns, possible)
    return zlib.compress(msgspec.msgpack.encode(block), 6)


MARK = b"#"
"""What a block's line begins with; every other line is a JSON object."""


def to_line(data: bytes) -> bytes:
    """One line: newlines are written otherwise, so that damage never costs more than its own line."""
    return MARK + data.replace(b"=", b"=e").replace(b"\n", b"=n") + b"\n"


def of_line(line: bytes) -> Records | None:
    """The block of a line with its newline; None where it is none, or not whole."""
    if not (line.startswith(MARK) and line.endswith(b"\n")):
        return None
    try:
        return load(line[1:-1].replace(b"=n", b"\n").replace(b"=e", b"="))
    except ValueError:
        return None


def load(data: bytes) -> Records:
    """What ``dump`` made. Raises ValueError for anything else, some of it only when a column is asked for."""
    inflate = zlib.decompressobj()
    try:
        plain = inflate.decompress(data, MOST_BYTES)
        if not inflate.eof:
            raise ValueError("a block that is cut short or too long")
        block = _decoder.decode(plain)
    except (zlib.error, msgspec.DecodeError) as error:
        raise ValueError(f"no block: {error}") from error
    by_name = dict(zip(block.names, block.columns, strict=True))
    shapes = [(tuple(block.names[i] for i in at), tuple(constants)) for at, constants in block.shapes]
    shape_of = unpack(block.shape_of)
    if shape_of.size > MOST or (shape_of.size and not 0 <= shape_of.min() <= shape_of.max() < len(shapes)):
        raise ValueError("a block whose parts do not belong together")
    return Records(shapes, shape_of, _Unpacking(by_name, block.possible).column)


class _Unpacking:
    """Makes a block's columns. It holds no ``Records``: in a circle they would stay until the collector comes round."""

    def __init__(self, columns: dict[str, _Column], possible: Possible) -> None:
        self._columns, self._possible = columns, possible
        self._micros: dict[str, Ints] = {}

    def column(self, records: Records, name: str) -> Column:
        form = self._columns[name].form
        if form == "share" and self._possible is not None:
            return _share(name, records, self._possible)
        if form == "i":
            return self._ints(records, name)
        if form in UNITS:
            return self._ints(records, name) / UNITS[form]
        if form not in BITS:
            raise ValueError(f"a column of an unknown form: {form!r}")
        kind, bits = BITS[form]
        return self._ints(records, name).astype(bits).view(kind).astype(np.float64)

    def _ints(self, records: Records, name: str) -> Ints:
        """A column's integers, over all records."""
        if name in self._micros:
            return self._micros[name]
        column = self._columns[name]
        if column.packed is None:
            raise ValueError(f"a column without values: {name!r}")
        mask = records.there(name)
        values = _spread(unpack(column.packed), mask)
        if column.form == MICROS:
            guess = _guess(name, records, lambda other: self._of_micros(records, other)) if column.guessed else None
            values = values if guess is None else np.where(mask, values + guess, 0)
            self._micros[name] = values
        return values

    def _of_micros(self, records: Records, name: str) -> Ints | None:
        return self._ints(records, name) if self._columns[name].form == MICROS else None


def _spread(values: Ints, mask: np.ndarray[Any, np.dtype[np.bool_]]) -> Ints:
    out = np.zeros(mask.size, np.int64)
    out[mask] = values  # ValueError where they are not as many
    return out


def _form(values: Floats) -> tuple[str, Ints]:
    """The first exact form: every bit comes back, that of -0.0 and of nan too."""
    with np.errstate(all="ignore"):
        for unit, scale in UNITS.items():
            ints = np.rint(values * scale).astype(np.int64)
            if np.array_equal((ints / scale).view(np.int64), values.view(np.int64)):
                return unit, ints
        for form, (kind, bits) in BITS.items():
            short = values.astype(kind)
            if np.array_equal(short.astype(np.float64).view(np.int64), values.view(np.int64)):
                return form, short.view(bits).astype(np.int64)
    raise AssertionError("64 bits hold any float")


def _guess(name: str, records: Records, micros: Callable[[str], Ints | None]) -> Ints | None:
    """A column of microseconds as other columns have it, [n]; None where none do. It need not be right."""
    event, *path = name[1:].split(KEY)

    def total(found: Callable[[str], bool], head: str) -> Ints | None:
        parts = [micros(n) for n in records.all_names if n.startswith(f"f{event}{KEY}{head}{KEY}") and found(n)]
        there = [p for p in parts if p is not None]
        return np.sum(there, axis=0) if there else None

    if path == ["step_time_s"]:
        return total(lambda n: True, "phases")
    if path[0] == "phases" and path[-1].startswith(COMM):
        return total(lambda n: n.endswith(f"{PLACE}2"), f"comm{KEY}{path[-1][len(COMM):]}")
    if path == ["start_s"]:
        seconds = micros(own) if (own := f"f{event}{KEY}step_time_s") in records.all_names else None
        stalls = total(lambda n: True, "stalls")
        lasted = [x for x in (seconds, stalls) if x is not None]
        if lasted:
            # The one before has ended.
            ends = np.cumsum(np.sum(lasted, axis=0))
            return np.concatenate((np.zeros(1, np.int64), ends[:-1]))
    return None


def _share(name: str, records: Records, possible: tuple[float, int]) -> Floats:
    """As the recorder has it; 0 where it cannot be told."""
    event, field = name[1:].split(KEY)
    flops, counted = records.column(event, "flops", SHARES[field])
    seconds, _ = records.column(event, "step_time_s")
    with np.errstate(all="ignore"):
        out = flops / (seconds * possible[0] * possible[1])
    return np.where(counted & np.isfinite(out) & records.there(name), out, 0.0)


def _is_share(name: str, records: Records, possible: tuple[float, int]) -> bool:
    if name[0] != "f" or name.count(KEY) != 1 or name.split(KEY)[1] not in SHARES:
        return False
    mask = records.there(name)
    same = _share(name, records, possible)[mask].view(np.int64) == records.raw(name)[mask].view(np.int64)
    return bool(same.all())
