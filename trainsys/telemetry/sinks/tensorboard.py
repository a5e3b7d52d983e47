"""TensorBoard, through its own writer: needs neither torch nor tensorflow."""

from __future__ import annotations

import time
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from trainsys.telemetry.events import Finding
from trainsys.telemetry.metrics import finding_metrics
from trainsys.telemetry.sinks.base import RunInfo


class TensorBoardSink:
    """Scalars under ``OUT/tensorboard/LINEAGE``, beside the run's folder: one curve over all attempts."""

    name = "tensorboard"

    def __init__(self) -> None:
        self._event: Any = None
        self._summary: Any = None
        self._writer: Any = None

    def start(self, info: RunInfo) -> None:
        self._event = import_module("tensorboard.compat.proto.event_pb2").Event
        self._summary = import_module("tensorboard.compat.proto.summary_pb2").Summary
        writers = import_module("tensorboard.summary.writer.event_file_writer")
        folder = info.run_dir.parent / "tensorboard" / (info.lineage or info.run_id)
        self._writer = writers.EventFileWriter(str(folder), flush_secs=5)
        # Readers leave out what an earlier attempt wrote of the steps that follow: they are trained again.
        log = import_module("tensorboard.compat.proto.event_pb2").SessionLog
        begin = self._event(wall_time=time.time(), step=info.first_step, session_log=log(status=log.START))
        self._writer.add_event(begin)

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        value = self._summary.Value
        summary = self._summary(value=[value(tag=name, simple_value=v) for name, v in metrics.items()])
        self._writer.add_event(self._event(wall_time=time.time(), step=step, summary=summary))

    def finding(self, finding: Finding) -> None:
        """A text, and a curve of what it costs, which ends at 0."""
        text = import_module("tensorboard.plugins.text.summary_v2").text_pb(
            "blame", f"{finding.news}: {finding.title}; {1e3 * finding.cost_s:.1f} ms per step. {finding.evidence}."
            f" {finding.advice}"
        )  # fmt: skip
        self._writer.add_event(self._event(wall_time=time.time(), step=finding.step, summary=text))
        self.step(finding.step, finding_metrics(finding))

    def message(self, level: str, text: str) -> None:
        """Messages are in the event file."""

    def finish(self, summary: Mapping[str, Any]) -> None:
        self._writer.close()
