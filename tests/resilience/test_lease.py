"""One live run to a checkpoint folder: who is refused, who takes over and how soon, and what the loser does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest

from support.toy import ToyEngine, ToyRun, toy_config
from trainsys.checkpoint.folder import Folder
from trainsys.errors import MachineFault, UserError
from trainsys.resilience import lease as leases
from trainsys.resilience.lease import NAME, Lease, Owner

FAST: dict[str, Any] = {"beat_s": 0.05, "stale_s": 1.0}


@pytest.fixture(autouse=True)
def no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_ID", "JOB_COMPLETION_INDEX", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)


def write(root: Path, **fields: Any) -> Owner:
    """A lease that somebody else has left in ``root``."""
    owner = msgspec.structs.replace(Owner.here(0), token="other", **fields)
    root.mkdir(parents=True, exist_ok=True)
    (root / NAME).write_bytes(msgspec.json.encode(owner))
    return owner


def read(root: Path) -> dict[str, Any]:
    return json.loads((root / NAME).read_text())


def test_a_second_run_is_refused_in_one_line_that_names_the_first(tmp_path: Path) -> None:
    with Lease(tmp_path / "run", **FAST) as first:
        first.named("demo-20260101")
        began = time.monotonic()
        with pytest.raises(UserError, match="is in use since") as refused, Lease(tmp_path / "run", stale_s=60):
            pass
        assert time.monotonic() - began < 30, "as soon as it is seen alive, not after the time to be stale"
        said = str(refused.value)
        assert "\n" not in said
        for word in ("demo-20260101", f"process {os.getpid()}", os.uname().nodename, "s ago", "checkpoint.folder"):
            assert word in said, said
        first.check()
    assert not (tmp_path / "run").exists(), "given back, with the folder that nothing was saved in"
    with Lease(tmp_path / "run", **FAST) as again:
        assert again.notes == []


def test_a_process_that_is_gone_holds_nothing(tmp_path: Path) -> None:
    """Killed a moment ago on this machine: no waiting. Its number may be another process's by now."""
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    write(tmp_path, pid=dead.pid, started="12345")
    with Lease(tmp_path, stale_s=1e6) as mine:
        assert "that process is gone" in mine.notes[0]
    write(tmp_path, started="1")  # this very pid, in an earlier life
    with Lease(tmp_path, stale_s=1e6) as mine:
        assert f"process {os.getpid()}" in mine.notes[0]


def test_a_process_number_of_another_machine_says_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nor one of another container, or of this machine before its last boot. It is watched, and taken when stale."""
    write(tmp_path, kernel="another", host="n17", pid=4_000_000, started="1")
    with Lease(tmp_path, **FAST) as mine:
        assert "was not renewed for 1 s" in mine.notes[0]
        assert "n17" in mine.notes[0]
    assert "watching for 1 s" in capsys.readouterr().err


@pytest.mark.parametrize("skew_s", [-1e6, 1e6])
def test_clocks_that_differ_change_nothing(tmp_path: Path, skew_s: float) -> None:
    """Neither a live run looks stale nor a dead one alive, whatever the time of the host that wrote the lease."""
    owner = write(tmp_path, kernel="another", since_s=time.time() + skew_s)
    over = threading.Event()

    def live() -> None:
        beat = 0
        while not over.wait(0.05):
            beat += 1
            beside = tmp_path / "beside"
            beside.write_bytes(msgspec.json.encode(msgspec.structs.replace(owner, beat=beat)))
            os.utime(beside, (time.time() + skew_s,) * 2)
            os.replace(beside, tmp_path / NAME)

    thread = threading.Thread(target=live)
    thread.start()
    try:
        with pytest.raises(UserError, match="is in use"), Lease(tmp_path, stale_s=30):
            pass
    finally:
        over.set()
        thread.join()
    with Lease(tmp_path, **FAST) as mine:
        assert "was not renewed" in mine.notes[0]


@pytest.mark.parametrize("job", [{"SLURM_JOB_ID": "71"}, {"TORCHELASTIC_RUN_ID": "abc"},
                                 {"JOB_COMPLETION_INDEX": "0", "PET_MASTER_ADDR": "x-node-0-0.x"}])  # fmt: skip
def test_the_next_attempt_of_a_job_takes_over_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, job: dict[str, str]
) -> None:
    """On another node, the one before still in its lease. Two tasks of one attempt are two runs, though."""
    for name, value in job.items():
        monkeypatch.setenv(name, value)
    write(tmp_path, kernel="another")
    with Lease(tmp_path, attempt=1, stale_s=1e6) as mine:
        assert "an earlier attempt of this job" in mine.notes[0]
    again = Lease(tmp_path, attempt=0, stale_s=60)
    with Lease(tmp_path, attempt=0, **FAST), pytest.raises(UserError, match="is in use"), again:
        pass


def test_of_two_that_start_together_one_gets_it(tmp_path: Path) -> None:
    got, refused, gate = [], [], threading.Barrier(4)

    def start() -> None:
        gate.wait()
        try:
            with Lease(tmp_path, beat_s=0.05, stale_s=60):
                got.append(1)
                while len(refused) < 3:
                    time.sleep(0.01)
        except UserError as error:
            refused.append(error)

    threads = [threading.Thread(target=start) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert (len(got), len(refused)) == (1, 3)


def test_a_run_whose_lease_was_taken_stops_saving_and_deletes_nothing(tmp_path: Path) -> None:
    cfg = toy_config(tmp_path, 20, checkpoint={"keep_last": 1, "mode": "sync"})
    root = Path(cfg.checkpoint_folder)
    run, listed = ToyRun(cfg, ToyEngine()), list[str]()

    def taken(session: Any) -> bool:
        if session.step == 4:
            session._saver.wait()
            write(root, run="the-other", host="n17", kernel="another")
            listed.extend(Folder(root).names())
        return False

    with pytest.raises(UserError, match=r"was taken over by run the-other, process \d+ on n17") as lost:
        run.go(until=taken)
    assert "checkpoint of step 6 was not written" in str(lost.value)
    assert Folder(root).names() == listed
    assert read(root)["run"] == "the-other", "nor does it take the lease along"
    assert listed == ["step_0000000002", "step_0000000004"]
    assert any("healthy was not written down: " in line for line in run.said), "though step 5 has proven step 4"


def test_the_thread_notices_and_writes_no_more(tmp_path: Path) -> None:
    with Lease(tmp_path, **FAST) as mine:
        beats = read(tmp_path)["beat"]
        wait_for(lambda: read(tmp_path)["beat"] > beats)
        write(tmp_path, run="the-other", kernel="another")
        time.sleep(0.3)
        assert read(tmp_path)["run"] == "the-other"
        with pytest.raises(UserError, match="taken over by run the-other"):
            mine.check()


def test_a_folder_that_cannot_be_one_and_a_disk_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=r"checkpoint folder .*set checkpoint\.folder"), Lease(folder):
            pass

    def full(self: Lease, owner: Owner) -> bool:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Lease, "_create", full)
    with pytest.raises(MachineFault, match="No space left"), Lease(tmp_path / "run"):
        pass


def test_a_torn_lease_is_watched_too(tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(b"")
    with Lease(tmp_path, **FAST) as mine:
        assert "unreadable" in mine.notes[0]


def test_the_beat_is_far_shorter_than_what_makes_a_lease_stale() -> None:
    assert leases.BEAT_S * 5 < leases.STALE_S <= 60


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
