"""Nodes that are left out of a job's next attempt."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainsys.blame import BLAME_FILE, Blame, note, read, to_leave
from trainsys.launch.after import exclusion


def test_one_sure_finding_is_enough_and_others_must_come_twice() -> None:
    once = Blame("n1", "slow", False, 0)
    assert to_leave([once]) == {}
    assert to_leave([once, once]) == {}, "the same attempt"
    assert to_leave([once, Blame("n1", "slower", False, 3)]) == {"n1": "slower"}
    assert to_leave([once, Blame("n1", "slow", False, 0, task=3)]) == {"n1": "slow"}, "two tasks of an array"
    assert to_leave([once, Blame("n2", "wrong", True, 0)]) == {"n2": "wrong"}


def test_notes_of_a_job_are_read_back_and_damage_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "blamed.jsonl"
    note("n0", "no job", True)
    monkeypatch.setenv(BLAME_FILE, str(file))
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    note("n1", "slow", False)
    with file.open("a") as more:
        more.write('{"host": "n2", "rea')
    assert read(file) == [Blame("n1", "slow", False, 2)]
    assert read(tmp_path / "none") == []
    monkeypatch.setenv(BLAME_FILE, str(tmp_path / "no" / "folder"))
    note("n1", "slow", False)  # nowhere to write: the run goes on


def test_only_spare_nodes_are_left_out_and_the_surest_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "blamed.jsonl"
    monkeypatch.setenv(BLAME_FILE, str(file))
    for attempt in ("0", "1"):
        monkeypatch.setenv("SLURM_RESTART_COUNT", attempt)
        note("n1", "slow", False)
    note("n2", "wrong", True)
    assert exclusion(file, nodes=2, usable=4) == "exclude n2,n1: n2: wrong; n1: slow"
    exclude, keep = exclusion(file, nodes=2, usable=3).splitlines()
    assert exclude == "exclude n2: n2: wrong"
    assert keep.startswith("keep n1: blamed, but of 3 nodes that may be used the job needs 2")
    assert exclusion(file, nodes=2, usable=2).startswith("keep n2,n1")
    assert exclusion(tmp_path / "none", nodes=2, usable=4) == ""
