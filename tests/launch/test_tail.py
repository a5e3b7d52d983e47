"""A job's logs, merged: everything of a small job; of one of 16,384 ranks what matters, with few files opened."""

from __future__ import annotations

import io
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from trainsys.launch import tail as module
from trainsys.launch.tail import Tail

RANKS = 16384


def attempt(folder: Path, number: int = 0, task: int = 0) -> Path:
    path = folder / "logs" / f"task-{task}" / f"attempt-{number}"
    path.mkdir(parents=True, exist_ok=True)
    return path


def shown(tail: Tail) -> list[str]:
    out = io.StringIO()
    tail.out = out
    tail.show()
    return out.getvalue().splitlines()


@pytest.fixture
def touched(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often files were opened and folders listed."""
    counts: Counter[str] = Counter()
    open_, listdir = Path.open, os.listdir

    def counted_open(path: Path, *args: Any, **kwargs: Any) -> Any:
        counts["open"] += 1
        return open_(path, *args, **kwargs)

    def counted_list(path: Any) -> list[str]:
        counts["list"] += 1
        return listdir(path)

    monkeypatch.setattr(Path, "open", counted_open)
    monkeypatch.setattr(module.os, "listdir", counted_list)
    return counts


def settle(folder: Path) -> None:
    """As if nothing had been made in any folder for a minute."""
    for path in (folder / "logs").rglob("*"):
        if path.is_dir():
            os.utime(path, (1.0e9, 1.0e9 + 1))
    os.utime(folder / "logs", (1.0e9, 1.0e9 + 1))


def test_a_small_job_is_shown_whole_and_only_whole_lines(tmp_path: Path) -> None:
    first = attempt(tmp_path)
    (first / "preflight-00000.log").write_text("fit\n")
    (first / "train-00000.log").write_text("step 0\nhalf")
    (first / "train-00001.log").write_text("warning\n")
    (tmp_path / "logs" / "slurm-0.out").write_text("slurmstepd\n")
    tail = Tail(tmp_path)
    assert shown(tail) == ["fit", "step 0", "[rank 1] warning", "slurmstepd"]
    with (first / "train-00000.log").open("a") as file:
        file.write(" a line\n")
    (attempt(tmp_path, 1) / "train-00000.log").write_text("again\n")
    assert shown(tail) == ["half a line", "again"]
    assert shown(tail) == []


def test_a_long_file_is_shown_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK", 7)
    lines = [f"line {i} of it" for i in range(100)]
    (attempt(tmp_path) / "train-00000.log").write_text("\n".join(lines) + "\nrest")
    assert shown(Tail(tmp_path)) == lines


def test_tasks_of_an_array_are_told_apart(tmp_path: Path) -> None:
    for task in (0, 3):
        (attempt(tmp_path, task=task) / "train-00000.log").write_text("step\n")
    assert shown(Tail(tmp_path)) == ["[task 0] step", "[task 3] step"]


def test_16384_logs_cost_a_few_opens_a_poll(
    tmp_path: Path, touched: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    logs = attempt(tmp_path)
    for rank in (0, 1, 9000):
        (logs / f"train-{rank:05d}.log").write_text(f"of {rank}\n")
    # The other files are only listed: making them is all that this test would do for long.
    listed, listdir = [f"train-{rank:05d}.log" for rank in range(RANKS)], module.os.listdir
    monkeypatch.setattr(module.os, "listdir", lambda p: sorted({*listdir(p), *(listed if p == logs else ())}))
    settle(tmp_path)
    touched.clear()
    tail = Tail(tmp_path)
    told, *lines = shown(tail)
    assert told.startswith("trainsys: 16384 ranks log here; shown are rank 0's")
    assert lines == ["of 0"]
    assert touched == {"open": 1, "list": 3}
    touched.clear()
    for _ in range(20):
        assert shown(tail) == []
    assert touched == {}, "nothing changed: nothing is opened, nothing listed"

    (logs / "failure.json").write_text(json.dumps({"rank": 9000, "code": 1, "message": "boom"}))
    touched.clear()
    assert shown(tail) == ["[rank 9000] of 9000"]
    assert touched["open"] == 2, "what failed, and its log"


def test_one_rank_can_be_chosen_and_nothing_else_is_opened(tmp_path: Path, touched: Counter[str]) -> None:
    logs = attempt(tmp_path)
    for rank in range(100):
        (logs / f"train-{rank:05d}.log").write_text(f"of {rank}\n")
    (tmp_path / "logs" / "slurm-0.out").write_text("slurmstepd\n")
    touched.clear()
    assert shown(Tail(tmp_path, 77)) == ["[rank 77] of 77"]
    assert touched["open"] == 1
