"""Nodes that a job blames: its ranks note them, its script leaves out those where that is sure or was repeated.

The job names one file for all of its attempts, ``TRAINSYS_BLAME_FILE``; outside of a job nothing is noted.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

BLAME_FILE = "TRAINSYS_BLAME_FILE"
ATTEMPTS = 2
"""Blamed in so many attempts, a node is left out; at once where the blame is sure."""


@dataclass(frozen=True)
class Blame:
    """``sure``: one finding is enough, like a product that came out wrong."""

    host: str
    reason: str
    sure: bool
    attempt: int
    task: int = 0
    """Index in a job array, whose tasks share the file."""


def this_node() -> str:
    """The scheduler's name for this node, which may differ from the host's own."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def note(host: str, reason: str, sure: bool) -> None:
    """Blame a node for the attempts to come. A disk that is full must not end the run that says so."""
    named = os.environ.get(BLAME_FILE)
    if not named:
        return
    attempt = int(os.environ.get("SLURM_RESTART_COUNT", 0))
    task = int(os.environ.get("TRAINSYS_TASK", 0))
    line = json.dumps(asdict(Blame(host, reason, sure, attempt, task)))
    with suppress(OSError), open(named, "a", encoding="utf-8") as file:
        file.write(line + "\n")


def read(file: Path) -> list[Blame]:
    """All that was noted; lines that cannot be read are of a write that was cut off."""
    found = []
    with suppress(OSError):
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            with suppress(ValueError, TypeError):
                found.append(Blame(**json.loads(line)))
    return found


def to_leave(blames: Sequence[Blame]) -> dict[str, str]:
    """Nodes to leave out, with the last reason of each, the surest first."""
    sure = {b.host: b.reason for b in blames if b.sure}
    attempts: dict[str, set[tuple[int, int]]] = {}
    for b in blames:
        attempts.setdefault(b.host, set()).add((b.task, b.attempt))
    repeated = {b.host: b.reason for b in blames if len(attempts[b.host]) >= ATTEMPTS}
    return {**sure, **{host: reason for host, reason in repeated.items() if host not in sure}}
