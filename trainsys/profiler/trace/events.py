"""What is read of a trace event, as types: the decoder allocates nothing else.

Two descriptions of the same events. ``Event`` takes any category and leaves the arguments as text. ``by_category``
takes only categories it knows, each with the arguments that matter of it, and nothing at all of those that do not:
on traces with flow and memory events that is a third less work.
"""

from __future__ import annotations

from decimal import Decimal
from functools import lru_cache
from typing import Any, Union

import msgspec
from msgspec import Raw, Struct
from msgspec import field as key

DEVICE, RUNTIME, OPERATOR, NOTE, PYTHON = range(5)

# Categories by their lower-cased name: Kineto since 2022, Kineto 2021 (``Kernel``, ``Operator``), ROCm, XPU.
KINDS = {
    "kernel": DEVICE,
    "gpu_memcpy": DEVICE,
    "gpu_memset": DEVICE,
    "memcpy": DEVICE,
    "memset": DEVICE,
    "runtime": RUNTIME,
    "cuda_runtime": RUNTIME,
    "cuda_driver": RUNTIME,
    "hip_runtime": RUNTIME,
    "driver": RUNTIME,
    "xpu_runtime": RUNTIME,
    "xpu_driver": RUNTIME,
    "xpu_sync": RUNTIME,
    "hip_driver": RUNTIME,
    "mtia_runtime": RUNTIME,
    "privateuse1_runtime": RUNTIME,
    "privateuse1_driver": RUNTIME,
    "operator": OPERATOR,
    "cpu_op": OPERATOR,
    "user_annotation": NOTE,
    "python_function": PYTHON,
}
for _name in ("kernel", "memcpy", "memset", "runtime", "operator"):
    KINDS[_name.capitalize()] = KINDS[_name]


class Event(Struct, gc=False):
    """The fields of a Chrome trace event that are read. ``ts`` and ``dur`` in the file's unit."""

    cat: str = ""
    name: str = ""
    pid: int | str = -1
    tid: int | str = -1
    ts: int | float = -1
    dur: int | float = -1
    args: Raw = Raw()


class ExactEvent(Struct, gc=False):
    """As ``Event``, where a double would lose nanoseconds: decimals as written."""

    cat: str = ""
    name: str = ""
    pid: int | str = -1
    tid: int | str = -1
    ts: Decimal = Decimal(-1)
    dur: Decimal = Decimal(-1)
    args: Raw = Raw()


AnyEvent = Event | ExactEvent


class Args(Struct, gc=False):
    """The arguments read of device, runtime and operator events, under every spelling seen."""

    correlation: int = -1
    external: int = key(name="External id", default=-1)
    external_old: int = key(name="external id", default=-1)
    stream: int = -1
    device: int = -1
    bytes: int = -1
    graph: int = key(name="graph node id", default=0)
    dims: Raw = key(name="Input Dims", default=Raw())
    types: Raw = key(name="Input type", default=Raw())
    op: str | None = key(name="Collective name", default=None)
    in_elements: int = key(name="In msg nelems", default=-1)
    out_elements: int = key(name="Out msg nelems", default=-1)
    group_size: int = key(name="Group size", default=-1)
    dtype: str = ""
    group: str | None = key(name="Process Group Name", default=None)
    group_desc: str | None = key(name="Process Group Description", default=None)
    ranks: str | None = key(name="Process Group Ranks", default=None)
    sequence: int = key(name="Seq", default=-1)


class CallArgs(Struct, gc=False):
    """All that is read of a runtime call's arguments: there are more of these than of anything else kept."""

    correlation: int = -1


_ARGS_OF: dict[int, Any] = {DEVICE: Args, RUNTIME: CallArgs}
_MOST_OTHERS = 48
_ALWAYS = ("kernel", "cpu_op")


def _struct(category: str, fields: list[Any]) -> Any:
    """An event of one category, which is the class's attribute ``cat`` as it is ``Event``'s field."""
    return msgspec.defstruct(
        "CategoryEvent", fields, tag_field="cat", tag=category, namespace={"cat": category}, gc=False
    )


def _kept(category: str) -> Any:
    args = _ARGS_OF.get(KINDS[category], Raw)
    plain = [
        (f.name, f.type, f.default) for f in msgspec.structs.fields(Event) if f.name not in ("cat", "args")
    ]
    return _struct(category, [*plain, ("args", args, key(default_factory=args))])


@lru_cache(maxsize=16)
def by_category(categories: frozenset[str]) -> msgspec.json.Decoder[Any] | None:
    """Decoder of lists of events of these categories; of those that are not in ``KINDS`` nothing is kept.

    It raises ValidationError at any other event. None for no categories, and where there are too many to be some.
    """
    if not 0 < len(categories) <= len(KINDS) + _MOST_OTHERS:
        return None
    # Two at least: a type that is alone is also taken for an event that does not name its category.
    named = sorted(categories.union(_ALWAYS))
    types = [_kept(c) if c in KINDS else _struct(c, []) for c in named]
    return msgspec.json.Decoder(list[Union[tuple(types)]])  # type: ignore[misc]  # noqa: UP007
