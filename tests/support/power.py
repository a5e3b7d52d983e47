"""A file system that forgets what was not synced: the states in which a power cut could leave a folder, at every moment.

While it records, the real work goes on below ``root``. What POSIX promises is modelled from what the work calls: a
file's bytes are durable once it is synced, a name once its folder is. Of changes to a folder that were not yet synced,
any may have reached the disk and any other not; a file that was not synced may be whole, or empty.
"""

from __future__ import annotations

import itertools
import os
import stat
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

CHANGES = ("mkdir", "rename", "replace", "unlink", "rmdir", "link")
ALL_WAYS = 3
"""So many changes to one folder are combined in every way; of more, each is missing alone, and each is there alone."""


@dataclass
class _Node:
    """A file or a folder, by what is durable of it."""

    folder: bool
    holds: int
    """Open, so that its number is not used again."""
    data: bytes | None = None
    names: dict[str, int] = field(default_factory=dict)
    pending: list[dict[str, int | None]] = field(default_factory=list)
    """Changes since the folder was last synced: what each did to which names."""
    seen: dict[str, int] = field(default_factory=dict)


@dataclass
class Cut:
    """A moment, and what the disk may hold after a power cut in it."""

    moment: str
    write: Callable[[Path], None]


class Power:
    """While ``on``, records all that happens below ``root``; ``cuts`` gives each state a power cut could have left."""

    def __init__(self, root: Path, patch: pytest.MonkeyPatch) -> None:
        self.root, self.on = root, True
        self._nodes: dict[int, _Node] = {}
        self._lock = threading.RLock()
        self._states: dict[Any, str] = {}
        """Each different state once, with the first moment that could leave it."""
        self._real = {name: getattr(os, name) for name in (*CHANGES, "fsync")}
        self._top = root.stat().st_ino
        self._scan()
        self._settle()
        for name in CHANGES:
            patch.setattr(os, name, self._change(name))
        patch.setattr(os, "fsync", self._fsync)

    def cuts(self) -> Iterator[Cut]:
        self.on = False
        for tree, moment in self._states.items():
            yield Cut(moment, lambda where, tree=tree: _write(tree, where))

    def forget(self) -> None:
        """Count only what comes from now on, and what is durable now."""
        with self._lock:
            self.on = True
            self._states.clear()
            self._note("begin")

    # ---- what the work calls ----

    def _change(self, name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if not self.on:
                return self._real[name](*args, **kwargs)
            with self._lock:
                self._scan()
                self._note(f"before {name}")
                result = self._real[name](*args, **kwargs)
                self._scan()
                self._note(f"after {name} {os.path.basename(str(args[0]))}")
                return result

        return call

    def _fsync(self, file: Any) -> None:
        if not self.on:
            return self._real["fsync"](file)
        with self._lock:
            self._scan()
            self._note("before fsync")
            self._real["fsync"](file)
            number = os.fstat(file if isinstance(file, int) else file.fileno()).st_ino
            if (node := self._nodes.get(number)) is not None:
                if node.folder:
                    node.names, node.pending = dict(node.seen), []
                else:
                    node.data = _bytes(node)
            self._note("after fsync")

    # ---- the model ----

    def _scan(self) -> None:
        """Find out what became of names since the last look."""
        with self._lock:
            self._look(self.root)

    def _look(self, path: Path) -> None:
        status = path.stat()
        node = self._nodes.get(status.st_ino)
        if node is None:
            flags = os.O_RDONLY | (os.O_DIRECTORY if stat.S_ISDIR(status.st_mode) else 0)
            node = self._nodes[status.st_ino] = _Node(stat.S_ISDIR(status.st_mode), os.open(path, flags))
        if not node.folder:
            return
        now = {}
        for entry in os.scandir(path):
            now[entry.name] = entry.inode()
            self._look(Path(entry.path))
        changed: dict[str, int | None] = {
            name: now.get(name) for name in node.seen.keys() | now.keys() if node.seen.get(name) != now.get(name)
        }
        if changed:
            node.pending.append(changed)
        node.seen = now

    def _settle(self) -> None:
        """What is there at the beginning has been there for long."""
        for node in self._nodes.values():
            node.names, node.pending = dict(node.seen), []
            if not node.folder:
                node.data = _bytes(node)

    def _note(self, moment: str) -> None:
        """Remember every state that a power cut could leave now."""
        for everything_written in (False, True):
            for tree in self._trees(self._top, everything_written):
                self._states.setdefault(tree, moment)

    def _trees(self, number: int, written: bool) -> Iterator[Any]:
        """Folders as sorted tuples of (name, tree), files as bytes."""
        node = self._nodes[number]
        if not node.folder:
            yield _bytes(node) if written else (node.data if node.data is not None else b"")
            return
        for names in _outcomes(node):
            parts = [[(name, tree) for tree in self._trees(child, written)] for name, child in sorted(names.items())]
            for combined in itertools.product(*parts):
                yield tuple(combined)


def _outcomes(node: _Node) -> list[dict[str, int]]:
    """What a folder may list: any of the changes that are not durable may be missing."""
    n = len(node.pending)
    ways = list(itertools.product((False, True), repeat=n)) if n <= ALL_WAYS else [
        tuple((i == one) is there for i in range(n)) for one in range(n + 1) for there in (False, True)
    ]
    found: list[dict[str, int]] = []
    for took in ways:
        names: dict[str, int | None] = dict(node.names)
        for change, done in zip(node.pending, took, strict=True):
            names.update(change if done else {})
        kept = {name: child for name, child in names.items() if child is not None}
        if kept not in found:
            found.append(kept)
    return found


def _bytes(node: _Node) -> bytes:
    return os.pread(node.holds, os.fstat(node.holds).st_size, 0)


def _write(tree: Any, where: Path) -> None:
    where.mkdir()
    for name, inner in tree:
        if isinstance(inner, bytes):
            (where / name).write_bytes(inner)
        else:
            _write(inner, where / name)
