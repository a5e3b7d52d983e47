"""TensorBoard, through its own writer: needs neither torch nor tensorflow."""

from __future__ import annotations

import time
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from trainsys.errors import UserError
from trainsys.telemetry.sinks.base import RunInfo


class TensorBoardSink:
    """Scalars under ``RUN/tensorboard``; raises ``UserError`` at once where the extra is missing."""

    name = "tensorboard"

    def __init__(self) -> None:
        try:
            events = import_module("tensorboard.compat.proto.event_pb2")
            summaries = import_module("tensorboard.compat.proto.summary_pb2")
            writers = import_module("tensorboard.summary.writer.event_file_writer")
        except ImportError:
            raise UserError(
                "telemetry.tensorboard=true needs tensorboard: pip install 'trainsys[tensorboard]'"
            ) from None
        self._event, self._summary = events.Event, summaries.Summary
        self._make_writer = writers.EventFileWriter
        self._writer: Any = None

    def start(self, info: RunInfo) -> None:
        self._writer = self._make_writer(str(info.run_dir / "tensorboard"), flush_secs=5)

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        value = self._summary.Value
        summary = self._summary(value=[value(tag=name, simple_value=v) for name, v in metrics.items()])
        self._writer.add_event(self._event(wall_time=time.time(), step=step, summary=summary))

    def message(self, level: str, text: str) -> None:
        """Messages are in the event file."""

    def finish(self, summary: Mapping[str, Any]) -> None:
        self._writer.close()
