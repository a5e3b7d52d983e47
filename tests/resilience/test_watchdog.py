"""A rank that stops: the watchdog of the others names it, from files alone and in real processes."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from trainsys.comm.ledger import Ledger
from trainsys.resilience.watchdog import EXIT_HUNG, RankState, Watchdog, explain, read_states
from trainsys.telemetry.recorder import Recorder, here


def test_explain_names_the_collective_and_who_is_missing() -> None:
    stuck = {r: RankState(r, 4, 60.0, doing="all_reduce on tp", counts={"tp": 7}) for r in (0, 1, 3)}
    text = explain(stuck, 4, {})
    assert "step 5 has not ended after 60 s" in text
    assert "ranks 0, 1, 3 are in all_reduce on tp" in text
    assert "rank 2 is missing: no word" in text
    stuck[2] = RankState(2, 4, 60.0, last="all_gather on fsdp", where="data.py:3 in read")
    text = explain(stuck, 4, {})
    assert "rank 2 is missing: in no collective, after all_gather on fsdp, at data.py:3 in read" in text


def test_explain_finds_who_is_behind_where_all_wait() -> None:
    states = {r: RankState(r, 0, 9.0, doing="all_reduce on world", counts={"world": 3}) for r in range(3)}
    states[1].counts, states[1].doing = {"world": 2}, "broadcast on world"
    text = explain(states, 3, {})
    assert "rank 1 is behind: 2 collectives where others have 3" in text


def hang(folder: Path, rank: int) -> int:
    """A process of its own that stops in its fourth step, rank 0 in a collective and rank 1 before it; its pid."""
    pid = os.fork()
    if pid:
        return pid
    try:
        recorder = Recorder(None, here(run_id="t", rank=rank, world=2), watch_gc=False)
        dog = Watchdog(folder, rank, 2, {"dp_replicate": (0, 1)}, timeout_s=1.0, setup_s=1.5)
        ledger = Ledger()
        ledger.recorder = dog.watch(recorder)
        dog.start()
        for step in range(3):
            with ledger.span("dp_replicate", "all_reduce", 16):
                pass
            dog.beat(step)
        if rank == 1:
            forgotten()
        with ledger.span("dp_replicate", "all_reduce", 16):
            time.sleep(60)
    finally:
        os._exit(0)


def forgotten() -> None:
    time.sleep(60)


def test_a_rank_that_never_comes_is_named_and_all_abort(tmp_path: Path, capfd: Any) -> None:
    pids = [hang(tmp_path, rank) for rank in range(2)]
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids] == [EXIT_HUNG, EXIT_HUNG]
    states = read_states(tmp_path)
    assert states[0].doing == "all_reduce on dp_replicate"
    assert states[1].doing == ""
    assert "in forgotten" in states[1].where
    assert states[0].step == states[1].step == 2
    report = (tmp_path / "report.txt").read_text()
    assert "rank 0 is in all_reduce on dp_replicate" in report
    assert "rank 1 is missing: in no collective, after all_reduce on dp_replicate" in report
    assert "forgotten" in (tmp_path / "rank_00001.stacks.txt").read_text()
    assert (tmp_path / "rank_00000.flight.pickle").exists()


def test_beats_and_patience_keep_it_quiet(tmp_path: Path) -> None:
    dog = Watchdog(tmp_path, 0, 1, {}, timeout_s=0.4, setup_s=0.4)
    dog._abort = lambda silent: (tmp_path / "aborted").touch()  # type: ignore[method-assign]
    dog.start()
    for step in range(4):
        time.sleep(0.2)
        dog.beat(step)
    with dog.patient(30.0):
        time.sleep(0.9)
    assert not (tmp_path / "aborted").exists()
    time.sleep(0.9)
    assert (tmp_path / "aborted").exists()
    dog.stop()
