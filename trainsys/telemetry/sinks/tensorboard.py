"""TensorBoard, through its own writer: needs neither torch nor tensorflow."""

from __future__ import annotations

import time
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from trainsys.telemetry.sinks.base import RunInfo


class TensorBoardSink:
    """Scalars under ``RUN/tensorboard``."""

    name = "tensorboard"

    def __init__(self) -> None:
        self._event: Any = None
        self._summary: Any = None
        self._writer: Any = None

    def start(self, info: RunInfo) -> None:
        self._event = import_module("tensorboard.compat.proto.event_pb2").Event
        self._summary = import_module("tensorboard.compat.proto.summary_pb2").Summary
        writers = import_module("tensorboard.summary.writer.event_file_writer")
        self._writer = writers.EventFileWriter(str(info.run_dir / "tensorboard"), flush_secs=5)

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        value = self._summary.Value
        summary = self._summary(value=[value(tag=name, simple_value=v) for name, v in metrics.items()])
        self._writer.add_event(self._event(wall_time=time.time(), step=step, summary=summary))

    def message(self, level: str, text: str) -> None:
        """Messages are in the event file."""

    def finish(self, summary: Mapping[str, Any]) -> None:
        self._writer.close()
