"""Metrics as JSON lines: ``RUN/metrics.jsonl``, one object a step, for anything that reads text."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import msgspec

from trainsys.telemetry.events import Finding
from trainsys.telemetry.sinks.base import RunInfo


class JsonlSink:
    """Writes ``{"step": 1, "train/loss": ...}``; a value that JSON cannot hold becomes ``"nan"`` or
    ``"inf"``."""

    name = "metrics.jsonl"

    def __init__(self, path: str | Path | None = None) -> None:
        self._path = path
        self._file: IO[bytes] | None = None

    def start(self, info: RunInfo) -> None:
        path = self._path or info.run_dir / "metrics.jsonl"
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - open for the run's length

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        assert self._file is not None
        values = {name: v if math.isfinite(v) else str(v) for name, v in metrics.items()}
        self._file.write(msgspec.json.encode({"step": step, **values}) + b"\n")

    def finding(self, finding: Finding) -> None:
        """Findings are in the event file."""

    def message(self, level: str, text: str) -> None:
        """Messages are in the event file."""

    def finish(self, summary: Mapping[str, Any]) -> None:
        if self._file is not None:
            self._file.close()
