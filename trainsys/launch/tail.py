"""The logs of a job's ranks and attempts, merged line by line as they grow.

A job of 16,384 ranks has as many files. Of a large one rank 0's are shown and those of the rank that failed; each poll
stats those few, opens the ones that grew one at a time, and lists a folder only after something was made in it.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from trainsys.failure import read_failure

ALL_RANKS = 32
"""A job of up to so many ranks is shown whole."""
_SETTLED_NS = 10 * 10**9
"""A folder that changed later than this before its listing is listed again: clocks tick coarsely, and differ."""
_CHUNK = 1 << 20
_RANK = re.compile(r"(train|preflight)-(\d+)\.log$")


class _Folder:
    """A folder as last listed. Appending to a file does not change its time, making one does."""

    def __init__(self) -> None:
        self.changed = -1
        self.names: list[str] = []
        self.ranks: set[int] = set()
        """that log here"""
        self.failed: set[int] = set()
        """the one that failed first, where one has: others end because of it"""

    def list(self, path: Path) -> _Folder:
        """This, up to date."""
        try:
            changed = path.stat().st_mtime_ns
            if changed != self.changed:
                self.names = sorted(os.listdir(path))
                self.ranks = {int(found[2]) for name in self.names if (found := _RANK.fullmatch(name))}
                self.failed = set()
                if any(name.startswith("failure.json") for name in self.names):
                    failure = read_failure(path / "failure.json")
                    self.failed = set() if failure is None else {failure.rank}
                self.changed = changed if time.time_ns() - changed > _SETTLED_NS else -1
        except OSError:
            self.names = []
        return self


class Tail:
    """Remembers how far each file has been shown; ``rank`` limits it to one."""

    def __init__(self, folder: Path, rank: int | None = None, out: TextIO | None = None) -> None:
        self.folder, self.rank, self.out = folder, rank, out or sys.stdout
        self._seen: dict[Path, int] = {}
        self._folders: defaultdict[Path, _Folder] = defaultdict(_Folder)
        self._said: set[Path] = set()

    def show(self) -> None:
        """Print every whole line that is new. Those of ranks other than 0 carry their rank, those of an array's
        tasks their task."""
        logs = self.folder / "logs"
        tasks = [name for name in self._list(logs).names if name.startswith("task-")]
        for task in sorted(tasks, key=_number):
            told = f"[task {_number(task)}] " if len(tasks) > 1 else ""
            attempts = [name for name in self._list(logs / task).names if name.startswith("attempt-")]
            for attempt in sorted(attempts, key=_number):
                for rank, path in self._followed(logs / task / attempt):
                    self._print(path, told + (f"[rank {rank}] " if rank else ""))
        if self.rank is None:
            for name in self._list(logs).names:
                if name.endswith(".out"):
                    self._print(logs / name, "")

    def _followed(self, attempt: Path) -> Iterator[tuple[int, Path]]:
        """(rank, file) of an attempt, pre-flight before training, each by rank."""
        if self.rank is not None:
            wanted = {self.rank}
        else:
            listed = self._list(attempt)
            ranks = listed.ranks
            wanted = ranks if len(ranks) <= ALL_RANKS else {0} | listed.failed
            if len(wanted) < len(ranks) and attempt not in self._said:
                self._said.add(attempt)
                self.out.write(
                    f"trainsys: {len(ranks)} ranks log here; shown are rank 0's and those of a rank that fails, "
                    "others by trainsys jobs logs JOB --rank N\n"
                )
        for kind in ("preflight", "train"):
            for rank in sorted(wanted):
                # As srun writes it: five digits, more where they do not suffice.
                yield rank, attempt / f"{kind}-{rank:05d}.log"

    def _list(self, path: Path) -> _Folder:
        return self._folders[path].list(path)

    def _print(self, path: Path, prefix: str) -> None:
        start = self._seen.get(path, 0)
        try:
            if path.stat().st_size == start:
                return
            with path.open("rb") as file:
                file.seek(start)
                rest = b""
                while data := file.read(_CHUNK):
                    whole, newline, rest = (rest + data).rpartition(b"\n")
                    for line in whole.decode("utf-8", errors="replace").splitlines() if newline else ():
                        self.out.write(f"{prefix}{line}\n")
                self._seen[path] = file.tell() - len(rest)
        except OSError:
            return


def _number(name: str) -> int:
    found = re.search(r"\d+", name)
    return int(found[0]) if found else 0
