"""A rank that stops: the watchdog of the others names it, from files alone and in real processes."""

from __future__ import annotations

import json
import os
import resource
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from trainsys.comm.ledger import Ledger
from trainsys.resilience.watchdog import EXIT_HUNG, RankState, Watchdog, explain, read_states
from trainsys.telemetry.recorder import Recorder, here


def test_explain_names_the_collective_and_who_is_missing() -> None:
    stuck = {r: RankState(r, 4, 60.0, doing="all_reduce on tp", counts={"tp": 7}) for r in (0, 1, 3)}
    text = explain(stuck, 4)
    assert "step 5 has not ended after 60 s" in text
    assert "ranks 0, 1, 3 are in all_reduce on tp" in text
    assert "rank 2 is missing: no word" in text
    stuck[2] = RankState(2, 4, 60.0, last="all_gather on fsdp", where="data.py:3 in read")
    text = explain(stuck, 4)
    assert "rank 2 is missing: in no collective, after all_gather on fsdp, at data.py:3 in read" in text


def test_explain_finds_who_is_behind_where_all_wait() -> None:
    states = {r: RankState(r, 0, 9.0, doing="all_reduce on world", counts={"world": 3}) for r in range(3)}
    states[1].counts, states[1].doing = {"world": 2}, "broadcast on world"
    text = explain(states, 3)
    assert "rank 1 is behind: 2 collectives where others have 3" in text


def hang(folder: Path, rank: int) -> int:
    """A process of its own that stops in its fourth step, rank 0 in a collective and rank 1 before it; its pid."""
    pid = os.fork()
    if pid:
        return pid
    try:
        recorder = Recorder(None, here(run_id="t", rank=rank, world=2), watch_gc=False)
        dog = Watchdog(folder, rank, 2, timeout_s=1.0, setup_s=1.5)
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


@pytest.mark.timing
def test_a_rank_that_never_comes_is_named_and_all_abort(tmp_path: Path, capfd: Any) -> None:
    pids = [hang(tmp_path, rank) for rank in range(2)]
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids] == [EXIT_HUNG, EXIT_HUNG]
    states = read_states(tmp_path, {})
    assert states[0].doing == "all_reduce on dp_replicate"
    assert states[1].doing == ""
    assert "in forgotten" in states[1].where
    assert states[0].step == states[1].step == 2
    report = (tmp_path / "report.txt").read_text()
    assert "rank 0 is in all_reduce on dp_replicate" in report
    assert "rank 1 is missing: in no collective, after all_reduce on dp_replicate" in report
    assert "forgotten" in (tmp_path / "rank_00001.stacks.txt").read_text()
    assert (tmp_path / "rank_00000.flight.pickle").exists()


@pytest.mark.timing
def test_beats_and_patience_keep_it_quiet(tmp_path: Path) -> None:
    dog = Watchdog(tmp_path, 0, 1, timeout_s=0.4, setup_s=0.4)
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


WORLD = 16_384


@pytest.mark.parametrize(
    ("culprits", "names"),
    [
        ({77: None}, "rank 77 is missing: no word"),
        ({4000: RankState(4000, 9, 60.0, last="all_gather on fsdp", where="data.py:3 in read")},
         "rank 4000 is missing: in no collective, after all_gather on fsdp, at data.py:3 in read"),
        ({r: RankState(r, 9, 60.0, where=f"moe.py:{r} in expert") for r in range(0, WORLD, 2)},
         "rank 0 is missing: in no collective, at moe.py:0 in expert"),
        (dict.fromkeys(range(0, WORLD, 3)), "ranks 0, 3, 6, 9, 12, 15, 18, 21 and 5,454 more are missing: no word"),
        ({12: RankState(12, 9, 60.0, doing="all_reduce on tp", counts={"tp": 6})},
         "rank 12 is behind: 6 collectives where others have 7"),
    ],
    ids=["one silent", "one elsewhere", "each elsewhere", "many silent", "one behind"],
)  # fmt: skip
def test_at_16384_ranks_the_line_is_short_and_names_the_culprit(
    culprits: dict[int, RankState | None], names: str
) -> None:
    axes = ("tp", "fsdp", "pp", "cp", "dp_replicate", "world")
    states = {
        r: RankState(r, 9, 60.0, doing=f"all_reduce on {axes[r % 6]}", counts={"tp": 7}) for r in range(WORLD)
    }
    for rank, state in culprits.items():
        states.pop(rank)
        if state:
            states[rank] = state
    text = explain(states, WORLD)
    assert names in text
    assert len(text) < 1500, len(text)


class Ended(Exception):
    """In place of the process's end."""


def test_of_16384_ranks_one_reads_and_each_file_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 3 never wrote: the reader waits for it as long as it may, and still reads what is there only once."""
    files = {
        f"rank_{rank:05d}.json": json.dumps(asdict(RankState(rank, 4, 60.0, doing="all_reduce on tp")))
        for rank in range(WORLD)
        if rank != 3
    }
    reads: Counter[str] = Counter()
    listings, sleeps = [], []
    report, real = tmp_path / "report.txt", os.listdir

    def read_text(path: Path, encoding: str) -> str:
        reads[path.name] += 1
        return files[path.name]

    def listed(folder: Path) -> list[str]:
        if folder != tmp_path:
            return real(folder)
        listings.append(folder)
        return list(files)

    def end(code: int) -> None:
        raise Ended(code)

    now = [0.0]

    def sleep(seconds: float) -> None:
        sleeps.append(seconds)
        now[0] += seconds

    monkeypatch.setattr(Path, "read_text", read_text)
    monkeypatch.setattr("os.listdir", listed)
    monkeypatch.setattr("os._exit", end)
    monkeypatch.setattr(Watchdog, "_dump_collectives", lambda self: None)  # imports torch
    monkeypatch.setattr("trainsys.resilience.watchdog.time.sleep", sleep)
    monkeypatch.setattr("trainsys.resilience.watchdog.time.monotonic", lambda: now[0])
    for rank in (0, 1, 2):  # 0 comes first
        with pytest.raises(Ended, match=str(EXIT_HUNG)):
            Watchdog(tmp_path, rank, WORLD, timeout_s=60.0, setup_s=60.0)._abort(60.0)
        if rank == 0:
            assert b"rank 3 is missing" in report.read_bytes()
            assert sum(sleeps) < 5.0
            assert len(listings) <= 21
            assert reads == Counter(dict.fromkeys(files.keys() - {"rank_00000.json"}, 1))
            reads.clear()
            listings.clear()
    assert not reads, "only the first rank reads"
    assert not listings


def child(work: Callable[[], None], log: Path) -> int:
    """``work`` in a process of its own, which prints to ``log``; its exit code."""
    pid = os.fork()
    if not pid:
        try:
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), 2)
            work()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def eat_memory() -> None:
    """All that this process may have, to the last byte, and keep it."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + (96 << 20), -1))
    held: list[Any] = []
    for size in (1 << 20, 1 << 12, 64):
        with suppress(MemoryError):
            while True:
                held.append(bytearray(size))
    time.sleep(60)


@pytest.mark.timing
def test_it_ends_a_rank_that_has_no_memory_left(tmp_path: Path) -> None:
    def rank() -> None:
        Watchdog(tmp_path / "hang", 0, 1, timeout_s=1.0, setup_s=1.0).start()
        time.sleep(0.2)
        eat_memory()

    began = time.monotonic()
    assert child(rank, tmp_path / "log") == EXIT_HUNG
    assert time.monotonic() - began < 30
    assert "hang: " in (tmp_path / "log").read_text()


@pytest.mark.parametrize("part", ["_dump_stacks", "_tell_state", "_dump_collectives", "_report"])
def test_a_report_that_fails_for_memory_still_ends_the_rank(tmp_path: Path, part: str) -> None:
    def fail() -> None:
        raise MemoryError

    def rank() -> None:
        dog = Watchdog(tmp_path / "hang", 5, 8, timeout_s=0.2, setup_s=0.2)
        setattr(dog, part, fail)
        dog.world = 1
        dog.start()
        time.sleep(60)

    assert child(rank, tmp_path / "log") == EXIT_HUNG
    told = (tmp_path / "log").read_text()
    assert "step 0 has not ended" in told or "rank 5 has not ended its step in time" in told
