"""Blame of a real fault in a real run, and of none: the short form of `profiling/blame_real.py`."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

PROFILING = Path(__file__).resolve().parents[1] / "profiling"


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(PROFILING))
    import real_run

    yield real_run
    for name in ("real_run", "real_faults"):
        del sys.modules[name]


@pytest.mark.timing
@pytest.mark.skipif(sys.platform != "linux", reason="what a kernel counts of a thread is read on Linux alone")
def test_a_rank_that_is_stopped_is_named_and_nobody_is_where_none_is(
    runs: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "LAYOUTS", {"ddp": runs.LAYOUTS["ddp"]})
    monkeypatch.setattr(runs, "WHEN", {"lasts": [(70, runs.STEPS)]})
    faulty = runs.train(1, "stopped 35%", busy=False)
    assert not faulty.problem
    (first, last), = faulty.steps  # fmt: skip
    assert 70 <= first < last == runs.STEPS - 1
    assert faulty.true_ms > 0.2 * faulty.step_ms
    for told in (faulty.live, faulty.after):
        assert told["named"], faulty.said
        assert not told["wrong"], faulty.said
        assert told["said cause"] == "stopped", faulty.said
    healthy = runs.train(2, "none", busy=False)
    assert not healthy.problem
    assert not healthy.live["wrong"], healthy.said
    assert not healthy.after["wrong"], healthy.said


def test_a_fault_that_nobody_knows_is_refused_in_a_line() -> None:
    command = [sys.executable, str(PROFILING / "blame_real.py"), "--only", "gremlins"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "gremlins" in done.stderr
    assert "Traceback" not in done.stderr


def test_runs_are_added_up_by_fault_and_a_failed_one_counts_for_nothing(
    runs: ModuleType, tmp_path: Path
) -> None:
    told = {"named": True, "wrong": 0, "cause": True, "onset": -12, "cost": 1.2, "end": None}
    missed = {"named": False, "wrong": 1, "run": False}
    lines = [
        runs.Seen(0, "hog", "tp", "ends", False, 1, 50.0, [(50, 140)], 20.0, missed, told),
        runs.Seen(
            1, "none", "tp", "ends", True, 1, live=missed, after={"named": False, "wrong": 0, "run": True}
        ),
        runs.Seen(
            2,
            "hog",
            "tp",
            "ends",
            True,
            1,
            50.0,
            [(70, 199)],
            20.0,
            problem="TimeoutError: step 70 was not reached",
        ),
    ]
    out = tmp_path / "out.json"
    out.with_suffix(".jsonl").write_text("".join(json.dumps(vars(line)) + "\n" for line in lines))
    command = [sys.executable, str(PROFILING / "blame_real.py"), "--runs", "2", "--healthy", "1", "--resume"]
    subprocess.run([*command, "--only", "hog", "--out", str(out)], check=True, capture_output=True)
    found = json.loads(out.read_text())
    assert (found["runs"], found["failed"]) == (3, 1)
    assert found["healthy"]["busy"] == {
        "runs": 1, "accused live": 1, "accused after": 0, "run called slow live": 0, "run called slow after": 1,
    }  # fmt: skip
    assert found["by fault"] == {"hog": found["faulty"]}
    assert found["faulty"]["live"]["named"] == [0, 1]
    after = found["faulty"]["after"]
    assert after["right cause"] == after["named"] == after["cost within 25%"] == [1, 1]
    assert after["onset within 10 steps"] == after["end within 10 steps"] == [0, 1]
