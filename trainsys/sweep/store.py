"""A sweep's folder: one folder a candidate, with its runs and, once it is over, ``result.json``."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Literal

import msgspec

from trainsys.errors import UserError
from trainsys.sweep.points import Candidate

Status = Literal["done", "oom", "failed", "refused", "timeout", "pending"]

_OOM = re.compile(
    r"out ?of ?memory|can't allocate memory|cannot allocate memory|bad_alloc|MemoryError|killed by SIGKILL",
    re.I,
)


class Result(msgspec.Struct, omit_defaults=True, frozen=True):
    """How a candidate ended. Seconds, bytes, shares of 1."""

    status: Status
    reason: str = ""
    run_dir: str = ""
    world: int = 0
    step_time_s: float | None = None
    tokens_per_s: float | None = None
    mfu: float | None = None
    memory_peak_bytes: int | None = None
    loss_last: float | None = None


class Store:
    """Candidates by number and key, so that a sweep whose points are reordered finds what it has run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"{folder}: cannot be made: {error.strerror}; set out: to a folder you may write"
            ) from None

    def of(self, candidate: Candidate) -> Path:
        """The candidate's folder."""
        found = sorted(self.folder.glob(f"*-{candidate.key}"))
        path = found[0] if found else self.folder / candidate.slug
        path.mkdir(exist_ok=True)
        return path

    def result(self, candidate: Candidate) -> Result | None:
        """None: it has not ended."""
        try:
            return msgspec.json.decode((self.of(candidate) / "result.json").read_bytes(), type=Result)
        except (OSError, msgspec.DecodeError):
            return None

    def write(self, candidate: Candidate, result: Result) -> None:
        """Whole or not at all."""
        path = self.of(candidate) / "result.json"
        beside = path.with_suffix(".new")
        beside.write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=1))
        beside.replace(path)


def measured(runs: Path) -> Result | None:
    """What the newest finished run in a candidate's ``runs`` says of itself; None: none has finished."""
    for summary in sorted(runs.glob("*/summary.json"), key=lambda p: p.stat().st_mtime, reverse=True):
        try:
            found = json.loads(summary.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if found.get("status") == "done":
            return Result(
                "done",
                run_dir=str(summary.parent),
                world=found.get("world", 0),
                step_time_s=found.get("step_time_s"),
                tokens_per_s=found.get("tokens_per_s"),
                mfu=found.get("mfu"),
                memory_peak_bytes=found.get("memory_peak_bytes") or None,
                loss_last=found.get("loss_last"),
            )
    return None


def ended_badly(code: int, said: str) -> Result:
    """From an exit code and what was printed."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    oom = next((line for line in lines if _OOM.search(line)), None)
    if oom is not None:
        return Result("oom", reason=oom[:300])
    if code == 2:
        told = [
            line.removeprefix("trainsys: error: ") for line in lines if line.startswith("trainsys: error:")
        ]
        return Result("refused", reason="; ".join(told) or "refused")
    return Result("failed", reason=(lines[-1] if lines else f"exit code {code}")[:300])
