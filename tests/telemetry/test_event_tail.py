"""A rank's file and its tail: whatever byte the writer was killed at, what it had written is there, once."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from trainsys.telemetry import tail, writer
from trainsys.telemetry.events import Event, RunEnd, RunStart, Step
from trainsys.telemetry.reader import Damage, iter_parts, read_events
from trainsys.telemetry.writer import EventWriter

START = RunStart(run_id="r", rank=0, world=1, t0_wall=1.0, t0_mono=2.0)


def step(i: int) -> Step:
    return Step(step=i, start_s=float(i), step_time_s=1.0, phases={"forward": 0.25, "other": 0.75})


def columns(path: Path) -> list[int]:
    """The numbers of all steps, as the readers of columns see them."""
    parts = (records for records, _ in iter_parts(path, Damage()))
    return [int(n) for records in parts for n in records.column("step", "step")[0][records.of("step")]]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "BLOCK", 8)
    monkeypatch.setattr(writer, "REST_S", 0.0)


def write(path: Path, events: list[Event]) -> list[tuple[bytes, bytes]]:
    """Writes events one flush each; (file, tail) as they were after each. Leaves both as a killed writer does."""
    w = EventWriter(path, flush_s=3600)
    seen = []
    for event in events:
        w.put(event)
        w.flush()
        left = tail.path_of(path)
        seen.append((path.read_bytes(), left.read_bytes() if left.exists() else b""))
    w._stop.set()
    os.close(w._fd)
    w._fd = -1
    return seen


@pytest.mark.usefixtures("small")
def test_killed_at_any_byte_it_leaves_what_was_written(tmp_path: Path) -> None:
    events = [START, *(step(i) for i in range(20))]
    path = tmp_path / "rank_00000.jsonl"
    seen = write(path, events)
    left = tail.path_of(path)
    assert read_events(path)[0] == events
    assert not read_events(path)[1]
    for n in range(1, len(events)):
        (file0, tail0), (file1, tail1) = seen[n - 1], seen[n]
        states = []
        if file1 == file0:  # a line more in the tail, any part of it
            states = [(file0, tail1[:cut]) for cut in range(len(tail0), len(tail1) + 1)]
        else:  # any part of the block, then the tail is emptied
            assert file1.startswith(file0)
            states = [(file1[:cut], tail0) for cut in range(len(file0), len(file1) + 1)] + [(file1, b"")]
        for file, rest in states:
            path.write_bytes(file)
            left.write_bytes(rest)
            found, damage = read_events(path)
            assert found in (events[:n], events[: n + 1]), f"after {n} records: {len(file)} and {len(rest)} bytes"
            assert damage.damaged == 0
            assert columns(path) == list(range(len(found) - 1))
            # And one that goes on there loses nothing of it, and repeats nothing.
            more = EventWriter(path, flush_s=3600)
            more.put(step(99))
            more.close()
            assert read_events(path)[0] == [*found, step(99)]
            assert not left.exists()


@pytest.mark.usefixtures("small")
def test_an_ended_run_is_one_file(tmp_path: Path) -> None:
    path = tmp_path / "rank_00000.jsonl"
    w = EventWriter(path)
    events = [START, *(step(i) for i in range(19)), RunEnd(status="done", time_s=20.0)]
    for event in events:
        w.put(event)
    w.close()
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    lines = path.read_bytes().split(b"\n")
    assert [line[:1] for line in lines] == [b"{", b"#", b"#", b"#", b"{", b""]
    assert read_events(path) == (events, Damage(path=str(path)))


@pytest.mark.usefixtures("small")
def test_a_reader_beside_the_writer_sees_each_record_once(tmp_path: Path) -> None:
    path = tmp_path / "rank_00000.jsonl"
    w = EventWriter(path, flush_s=0.001)
    for i in range(400):
        w.put(step(i))
        if i % 5 == 0:
            found = [e.step for e in read_events(path)[0] if isinstance(e, Step)]
            assert found == list(range(len(found)))
            time.sleep(0.001)
    w.close()
    assert columns(path) == list(range(400))


@pytest.mark.usefixtures("small")
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_disk_that_takes_no_block_keeps_the_tail(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rank_00000.jsonl"
    path.symlink_to("/dev/full")
    w = EventWriter(path, flush_s=3600)
    for i in range(20):
        w.put(step(i))
        w.flush()
    w.close()
    assert w.lost == 0
    left = tail.path_of(path)
    path.unlink()
    path.touch()
    assert [e.step for e in read_events(path)[0] if isinstance(e, Step)] == list(range(20))
    assert left.exists()
    assert capfd.readouterr().err.count("events are not being written") == 1


def test_a_part_read_again_is_the_same_when_the_tail_is_gone(tmp_path: Path) -> None:
    path = tmp_path / "rank_00000.jsonl"
    write(path, [START, *(step(i) for i in range(5))])
    parts = list(iter_parts(path, Damage()))
    tail.path_of(path).unlink()
    again = [place.read() for _, place in parts]
    assert [list(r.rows()) for r in again] == [list(r.rows()) for r, _ in parts]


def test_a_process_killed_at_random_leaves_all_but_the_last_moment(tmp_path: Path) -> None:
    path = tmp_path / "rank_00000.jsonl"
    code = f"""
import itertools, time
from trainsys.telemetry import writer
from trainsys.telemetry.events import Step
writer.BLOCK, writer.REST_S = 16, 0.0
w = writer.EventWriter({str(path)!r}, flush_s=0.005)
print("going", flush=True)
for i in itertools.count():
    w.put(Step(step=i, start_s=float(i), step_time_s=1.0, phases={{"other": 1.0}}))
    time.sleep(0.0005)
"""
    before = 0
    for _ in range(3):
        child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        assert child.stdout is not None
        child.stdout.readline()
        time.sleep(0.4)
        child.send_signal(signal.SIGKILL)
        child.wait()
        events, damage = read_events(path)
        assert damage.damaged == 0
        numbers = [e.step for e in events if isinstance(e, Step)]
        new = numbers[before:]
        assert new == list(range(len(new)))
        assert len(new) > 16
        before = len(numbers)
