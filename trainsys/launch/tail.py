"""The logs of a job's ranks and attempts, merged line by line as they grow."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TextIO

_RANK = re.compile(r"(?:train|preflight)-(\d+)\.log$")


class Tail:
    """Remembers how far each file has been shown; ``rank`` limits it to one."""

    def __init__(self, folder: Path, rank: int | None = None, out: TextIO | None = None) -> None:
        self.folder, self.rank, self.out = folder, rank, out or sys.stdout
        self._seen: dict[Path, int] = {}

    def show(self) -> None:
        """Print every whole line that is new. Those of ranks other than 0 carry their rank."""
        files = sorted(self.folder.glob("logs/*.out")) if self.rank is None else []
        for path in [*sorted(self.folder.glob("logs/task-*/attempt-*/*.log"), key=_order), *files]:
            found = _RANK.search(path.name)
            rank = int(found.group(1)) if found else None
            if self.rank is not None and rank != self.rank:
                continue
            prefix = f"[rank {rank}] " if rank else ""
            for line in self._new(path):
                self.out.write(f"{prefix}{line}\n")

    def _new(self, path: Path) -> list[str]:
        start = self._seen.get(path, 0)
        try:
            with path.open("rb") as file:
                file.seek(start)
                data = file.read()
        except OSError:
            return []
        whole = data[: data.rfind(b"\n") + 1]
        self._seen[path] = start + len(whole)
        return whole.decode("utf-8", errors="replace").splitlines()


def _order(path: Path) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", "/".join(path.parts[-3:])))
