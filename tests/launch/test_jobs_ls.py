"""`trainsys jobs ls`: one line a run, whatever the number of its attempts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trainsys.launch.job import RECORD
from trainsys.launch.jobs import ls


def attempt(out: Path, name: str, lineage: str, first_step: int, summary: dict[str, Any] | None, shown: int = 0) -> None:
    run = out / name
    (run / "events").mkdir(parents=True)
    (run / "events" / "rank_00000.jsonl").touch()
    (run / "config.yaml").touch()
    facts = {"lineage": lineage, "first_step": first_step, "steps": 300}
    (run / "environment.json").write_text(json.dumps({"run": facts}))
    if summary is not None:
        (run / "summary.json").write_text(json.dumps(summary))
    lines = [json.dumps({"step": step}) for step in range(first_step, shown)]
    (run / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 9']))


def rows(out: Path) -> list[list[str]]:
    return [line.split() for line in ls(out).splitlines()]


def test_attempts_of_a_run_are_one_line_with_the_step_it_has_reached(tmp_path: Path) -> None:
    killed = {"steps": 210, "last_step": 210, "mfu": 0.4, "status": "killed"}
    attempt(tmp_path, "a-20250101-000000-aaaa", "one", 0, killed)
    attempt(tmp_path, "a-20250102-000000-bbbb", "one", 200, None, shown=230)
    attempt(tmp_path, "b-20250101-000000-cccc", "", 0, {"steps": 20, "last_step": 20, "mfu": 0.5, "status": "done"})
    attempt(tmp_path, "b-20250102-000000-dddd", "two", 40, {"steps": 20, "last_step": 60, "mfu": None, "status": "done"})
    head, *found = rows(tmp_path)
    assert head == ["job", "on", "name", "ranks", "state", "attempts", "step", "mfu", "folder"]
    assert [row[2:-1] for row in found] == [
        ["a-20250102-000000-bbbb", "1", "running", "2", "230/300", "40.0%"],
        ["b-20250101-000000-cccc", "1", "done", "1", "20/300", "50.0%"],
        ["b-20250102-000000-dddd", "1", "done", "1", "60/300", "-"],
    ]


def test_an_attempt_that_has_done_nothing_yet_is_where_it_began(tmp_path: Path) -> None:
    attempt(tmp_path, "a-20250101-000000-aaaa", "one", 200, {"steps": 0, "last_step": 0, "status": "failed"})
    (tmp_path / "a-20250101-000000-aaaa/metrics.jsonl").unlink()
    assert rows(tmp_path)[1][4:7] == ["failed", "1", "200/300"]


def test_a_job_that_is_over_has_the_mfu_of_its_report(tmp_path: Path) -> None:
    logs = tmp_path / "jobs/one/logs/task-0/attempt-1"
    logs.mkdir(parents=True)
    record = {"id": 7, "on": "kubernetes", "kind": "job", "namespace": "n", "name": "demo", "ranks": 2}
    (tmp_path / "jobs/one" / RECORD).write_text(json.dumps({**record, "submitted_s": 1.0}))
    line = "step 150/150  loss 2.39  3,153 tok/s  325 ms/step  mfu >100% (of measured here)  mem 1 GiB  eta 0:00"
    log = logs / "train-00000.log"
    log.write_text(f"step   1/150  mfu 23.0% (of x)\n{line}\n")
    assert " 150/150  >100%  " in ls(tmp_path)
    log.write_text(f"{line}\n  throughput  1,719 tokens/s\n  mfu         57.9%             of 57.4 GFLOP/s a rank\n")
    assert " 150/150  57.9%  " in ls(tmp_path)
