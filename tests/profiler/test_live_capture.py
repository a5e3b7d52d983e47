"""A capture of one step on this CPU: its shares, its cost as a stall, and what it is left out of."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from trainsys.profiler.capture import StepCapture
from trainsys.profiler.explain import explain
from trainsys.profiler.run_steps import load_steps
from trainsys.telemetry.events import Message
from trainsys.telemetry.reader import event_file, read_events
from trainsys.telemetry.recorder import Recorder, here
from trainsys.telemetry.run_data import load_run

EVERY, STEPS = 8, 16  # captures steps 7 and 15


def train(folder: Path) -> None:
    recorder = Recorder(folder, here(run_id="captured", rank=0, world=1))
    capture = StepCapture(recorder, folder, EVERY)
    x = torch.randn(300, 300)
    recorder.begin()
    for step in range(STEPS):
        capture.before(step)
        with recorder.phase("forward"):
            for _ in range(20):
                torch.mm(x, x)
        with recorder.phase("backward"):
            for _ in range(40):
                torch.exp(x)
        capture.after(recorder.end_step(step))
    recorder.finish("done")


@pytest.mark.timing
def test_a_capture_tells_products_from_the_rest_and_counts_in_no_mean(tmp_path: Path) -> None:
    train(tmp_path)
    table = load_steps(tmp_path)
    assert [c.step for c in table.captures] == [7, 15]
    forward, backward = table.phases["forward"][7, 0], table.phases["backward"][7, 0]
    for c in table.captures:
        assert 0.2 < c.matmul < 1.0
        assert c.idle == 0.0  # on CPU there is no queue to run dry
    assert table.captures[0].matmul == pytest.approx(forward / (forward + backward), abs=0.25)
    assert not table.work[[7, 8, 15]].any()
    assert table.work[[6, 9, 14]].all()
    assert table.stalls["capture"][:, 0].sum() > 0
    assert len(list((tmp_path / "captures").glob("step_*_rank_00000.json.gz"))) == 2
    fall = explain(tmp_path).waterfall
    assert fall is not None
    assert fall.get("other_compute") > 0
    assert any("capture of step 15" in note for note in fall.notes)


def test_without_an_interval_nothing_is_captured(tmp_path: Path) -> None:
    recorder = Recorder(None, here(run_id="x", rank=0, world=1))
    capture = StepCapture(recorder, tmp_path, 0)
    assert not any(capture.due(step) for step in range(100))
    assert [step for step in range(100) if StepCapture(recorder, tmp_path, 40).due(step)] == [10, 50, 90]


def test_a_capture_that_fails_is_told_once_and_the_run_goes_on(tmp_path: Path) -> None:
    (tmp_path / "captures").write_text("a file where the folder should be")
    train(tmp_path)
    start = load_run(tmp_path)
    assert start.status == "done"
    assert load_steps(tmp_path).captures == []
    events, _ = read_events(event_file(tmp_path, 0))
    assert len([e for e in events if isinstance(e, Message) and "no more profiler captures" in e.text]) == 1
