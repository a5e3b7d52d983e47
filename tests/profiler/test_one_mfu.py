"""One run has one MFU, at most 100%, wherever it is quoted; a peak that the run beats is settled once, at the end."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Literal

import pytest
from rich.console import Console

from support.made_run import Run
from trainsys.launch.jobs import ls
from trainsys.layout import Layout
from trainsys.profiler.explain import Explanation, explain_run, summary_of, to_json
from trainsys.profiler.run_steps import RunSteps, read_run
from trainsys.profiler.terminal import print_explanation
from trainsys.sweep.store import measured
from trainsys.telemetry.reader import event_file, read_events
from trainsys.telemetry.report import final_report, summarize
from trainsys.telemetry.run_data import RunData

STEPS = range(488, 508)
"""With a checkpoint between two of them."""


def made(folder: Path, run: Run) -> tuple[RunData, RunSteps]:
    for rank in range(run.layout.world):
        for _ in run.record(folder, rank, STEPS):
            pass
    return read_run(folder)


def quoted(folder: Path, data: RunData, told: Explanation) -> dict[str, float]:
    """Every place's MFU in percent."""
    (folder / "config.yaml").touch()
    (folder / "summary.json").write_text(json.dumps({**summarize(data, told.use), **summary_of(told)}))
    file = io.StringIO()
    console = Console(file=file, width=110, color_system=None, highlight=False)
    final_report(data, told.use, console)
    print_explanation(told, console)
    text = file.getvalue()
    top = re.search(r"^  mfu +([\d.]+)%", text, re.MULTILINE)
    foot = re.search(r"^  step .*mfu ([\d.]+)%", text, re.MULTILINE)
    board = measured(folder.parent)
    assert top is not None, text
    assert foot is not None, text
    assert board is not None
    assert board.mfu is not None
    tree = json.loads(to_json(told))
    return {
        "report": float(top[1]), "waterfall": float(foot[1]), "sweep": 100 * board.mfu,
        "jobs ls": float(ls(folder.parent).splitlines()[-1].split()[-2].rstrip("%")),
        "explain --json": 100 * tree["waterfall"]["mfu"], "use": 100 * tree["use"]["mfu"],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("source", "device"), [("measured", False), ("measured", True), ("catalogue", False)]
)
@pytest.mark.parametrize("layout", [Layout(), Layout(pp=2)], ids=lambda x: f"{x.world}")
@pytest.mark.parametrize("times", [0.2, 0.8, 1.5])
def test_all_that_quote_it_agree_and_none_exceeds_the_peak(
    tmp_path: Path, layout: Layout, device: bool, source: Literal["measured", "catalogue"], times: float
) -> None:
    """``times``: the peak, in what the run reaches in forward and backward, which take about 21 ms a micro-batch."""
    run = Run(layout, device=device, source=source, seed=layout.world, micro=2)
    flops = (1.2e15 + 12288.0 * (1 << 25)) / layout.world
    run.peak = times * flops / (2 * 21e-3)
    folder = tmp_path / "runs/made"
    data, steps = made(folder, run)
    told = explain_run(data, steps)
    fall = told.waterfall
    assert fall is not None
    assert fall.mfu is not None
    places = quoted(folder, data, told)
    assert list(places.values()) == pytest.approx([100 * fall.mfu] * len(places), abs=0.051), places
    assert 0 < fall.mfu <= 1
    assert (told.use.hfu or 0.0) <= 1.0 + 1e-9
    # It is what it says: FLOPs over the step's time and the peak quoted beside it.
    assert fall.peak_flops == told.use.peak_flops == told.facts["peak_flops"]
    assert fall.peak_flops is not None
    assert fall.mfu == pytest.approx(flops / fall.step_s / fall.peak_flops)
    assert fall.get("useful") == pytest.approx(fall.mfu * fall.step_s)
    assert sum(t.seconds for t in fall.terms) == pytest.approx(fall.wall_s)
    assert all(t.seconds > -1e-9 for t in fall.terms)
    assert fall.wall_s > fall.step_s  # the checkpoint, which MFU does not count
    by_compute = source == "measured" and not device
    # What was multiplied counts against the peak with recomputation and padding.
    done = (1.6e15 + 16384.0 * (1 << 25)) / layout.world
    beaten = done / fall.step_s > run.peak or (by_compute and times < 1)
    assert (fall.peak_flops > run.peak) == beaten == bool(told.use.peak_note)
    if by_compute and times < 1:
        assert fall.get("compute_below_peak") > 0  # the fastest steps are the peak, the others are below it
    # Events keep what was known when they were written.
    first = next(e for e in read_events(event_file(folder, 0))[0] if e.__class__.__name__ == "Step")
    assert first.mfu == pytest.approx(first.flops.model / first.step_time_s / run.peak / layout.world, rel=1e-3)  # type: ignore[union-attr]
