"""Files that are there whole after a power cut, or not at all. No torch here."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError that names no file, as those of a write to an open one, names ``path``."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def sync_dir(path: Path) -> None:
    """Make the names in a folder durable (POSIX: a new name is only so once its folder is synced)."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_dir(path: Path) -> None:
    """Make a folder, its parents too, so that all of these names are durable; nothing where it is there."""
    if path.is_dir():
        return
    make_dir(path.parent)
    path.mkdir(exist_ok=True)
    sync_dir(path.parent)


def write_durable(path: Path, data: bytes) -> None:
    """Replace ``path`` by ``data`` in one step: written beside it, made durable, moved over, folder synced."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with naming(path), open(beside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    sync_dir(path.parent)
