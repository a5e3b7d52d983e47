"""What a run tells while it trains: each line of metrics is of the step that it names."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from trainsys.config.loader import load_run
from trainsys.data.loader import StepData
from trainsys.data.packing import Batch, Counts
from trainsys.engines.base import StepResult
from trainsys.hardware.peak import Peak
from trainsys.layout import Layout
from trainsys.telemetry.flops_meter import FlopsMeter
from trainsys.telemetry.text import rate
from trainsys.train import report as reporting
from trainsys.train.desk_link import DeskLink
from trainsys.train.process import Process
from trainsys.train.report import Reporter

STEPS, TOKENS = 6, 4096


@pytest.mark.parametrize("log_every", [1, 2])
def test_each_line_is_of_its_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log_every: int) -> None:
    monkeypatch.setenv("TRAINSYS_CACHE", str(tmp_path / "cache"))
    cfg = load_run("train/demo", (
        f"telemetry.out={tmp_path}", f"train.steps={STEPS}", "telemetry.console=off", f"telemetry.log_every={log_every}",
        "parallel.dp_shard=1", "parallel.tp=1", "parallel.sequence_parallel=false",
    ))  # fmt: skip
    counts = Counts(TOKENS, TOKENS, 0, TOKENS * 128)
    empty = np.zeros((16, 256), np.int64)
    data = StepData(0, [Batch(empty, empty, empty, None, counts)], TOKENS, TOKENS, 0, counts.attn_pairs)
    proc, layout = Process(0, 1, 0, 1, torch.device("cpu")), Layout.resolve(cfg.parallel, 1)
    with Reporter(cfg, proc, layout, (time.perf_counter(), time.time()), {}) as reporter:
        reporter.begin()
        for step in range(STEPS):
            with reporter.recorder.phase("forward"):
                time.sleep(0.002)
            reporter.end_step(step, data, StepResult(torch.tensor([6.0 - step, 1.0]), 3e-4, torch.zeros(1)))
        reporter.done()
    lines = [json.loads(line) for line in (reporter.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(log_every - 1, STEPS, log_every))
    for line in lines:
        assert line["train/loss"] == 6.0 - line["step"]
        assert line["train/tokens"] == TOKENS * (line["step"] + 1)
        assert line["perf/tokens_per_s"] == pytest.approx(TOKENS / line["perf/step_time_s"])
        assert line["time/forward_s"] >= 0.002
    summary = json.loads((reporter.run_dir / "summary.json").read_text())
    assert (summary["status"], summary["steps"]) == ("done", STEPS)


@pytest.mark.parametrize(("slow_s", "ends"), [(0.4, "withdrawn"), (0.02, "peak")])
def test_a_step_above_the_peak_is_confirmed_or_withdrawn_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slow_s: float, ends: str
) -> None:
    """The peak is that of steps of 0.2 s. The first step takes nothing; whether it was right the others tell."""
    monkeypatch.setenv("TRAINSYS_CACHE", str(tmp_path / "cache"))
    cfg = load_run("train/demo", (
        f"telemetry.out={tmp_path}", "train.steps=5", "telemetry.console=off", "parallel.dp_shard=1", "parallel.tp=1",
        "parallel.sequence_parallel=false",
    ))  # fmt: skip
    told: list[str] = []
    monkeypatch.setattr(DeskLink, "message", lambda self, level, text: told.append(f"{level}: {text}"))
    peak = 1.0
    monkeypatch.setattr(reporting, "find_peak", lambda *_: Peak(peak, "measured on a busy machine", "measured"))
    empty = np.zeros((16, 256), np.int64)
    counts = Counts(TOKENS, TOKENS, 0, TOKENS * 128)
    data = StepData(0, [Batch(empty, empty, empty, None, counts)], TOKENS, TOKENS, 0, counts.attn_pairs)
    proc, layout = Process(0, 1, 0, 1, torch.device("cpu")), Layout.resolve(cfg.parallel, 1)
    flops = FlopsMeter(cfg.model, cfg.train.seq_len, cfg.recompute)(TOKENS, counts.attn_pairs, TOKENS).model
    peak = flops / 0.2
    with Reporter(cfg, proc, layout, (time.perf_counter(), time.time()), {}) as reporter:
        reporter.begin()
        for step in range(5):
            with reporter.recorder.phase("forward"):
                time.sleep(slow_s if step else 0.0)
            reporter.end_step(step, data, StepResult(torch.tensor([6.0 - step, 1.0]), 3e-4, torch.zeros(1)))
        reporter.done()
    summary = json.loads((reporter.run_dir / "summary.json").read_text())
    assert 0 < summary["mfu"] <= 1
    doubted, last = [text for text in told if "above 100%" in text or text.startswith("warning: peak")]
    assert doubted.startswith("warning: step 0 has an mfu above 100% of the peak (measured on a busy machine)")
    if ends == "withdrawn":
        assert last.startswith("info: withdrawn: the warning of an mfu above 100%; over the run it is ")
        assert f"{100 * summary['mfu']:.1f}%" in last
        assert (summary["peak_flops"], summary["peak_note"]) == (peak, "")
    else:
        assert summary["peak_flops"] > peak
        assert last == f"warning: peak: {rate(summary['peak_flops'])} {summary['peak_note']}; mfu is of it in report, " \
            "summary and sinks"
