"""Unpickling that cannot run code: every class and every function is refused, plain data is not.

Flight-recorder dumps and memory snapshots are dicts, lists, strings and numbers; nothing in them needs a
global. Refusing ``find_class`` refuses them all, persistent ids and extension codes included, before anything
could be called. Memory is bounded by refusing frames and strings larger than the file.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from pathlib import Path
from typing import Any

from trainsys.errors import UserError
from trainsys.profiler.trace.source import read_all

_CALLS = frozenset({"GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "PERSID",
                    "BINPERSID", "EXT1", "EXT2", "EXT4", "NEXT_BUFFER", "READONLY_BUFFER"})  # fmt: skip


class _Refusing(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it asks for a persistent object")


def load_plain(path: Path, limit: int = 2 << 30) -> Any:
    """The plain data of a pickle file (gzip allowed).

    Raises UserError naming the file and, where one can be told, the offset: not a pickle, cut off, larger
    than ``limit`` bytes, or asking for anything but plain data. In the last case nothing of it is run.
    """
    data = read_all(path, limit)
    stream = io.BytesIO(data)
    try:
        return _Refusing(stream).load()
    except MemoryError:
        raise UserError(
            f"{path}: pickle claims more memory than there is, near byte {stream.tell()}"
        ) from None
    except RecursionError:
        raise UserError(f"{path}: pickle is nested too deeply, near byte {stream.tell()}") from None
    except Exception as error:  # a hostile pickle may raise nearly anything out of the unpickler
        at, opcode = _first_call(data)
        if at is not None:
            raise UserError(
                f"{path}: pickle holds more than plain data ({opcode} at byte {at}: {_line(error)}); refused, not run"
            ) from None
        raise UserError(f"{path}: pickle is damaged near byte {stream.tell()}: {_line(error)}") from None


def _first_call(data: bytes) -> tuple[int | None, str]:
    """Offset and name of the first opcode that would need code."""
    try:
        for opcode, _, position in pickletools.genops(data):
            if opcode.name in _CALLS:
                return position, opcode.name
    except Exception:  # damaged before any
        pass
    return None, ""


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__
