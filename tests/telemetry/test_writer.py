"""What is on disk after a kill, after a torn predecessor, and when the disk is full."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from trainsys.telemetry.events import Event, Message
from trainsys.telemetry.reader import read_events
from trainsys.telemetry.writer import EventWriter


def note(i: int) -> Message:
    return Message(level="info", text=f"note {i}", time_s=float(i))


@pytest.mark.timing
def test_records_reach_the_disk_by_themselves(tmp_path: Path) -> None:
    writer = EventWriter(tmp_path / "e.jsonl", flush_s=0.01)
    writer.put(note(1))
    deadline = time.monotonic() + 5
    while not read_events(writer.path)[0] and time.monotonic() < deadline:
        time.sleep(0.01)
    assert read_events(writer.path)[0] == [note(1)]
    writer.put(note(2))
    writer.close()
    writer.close()
    assert read_events(writer.path)[0] == [note(1), note(2)]


@pytest.mark.timing
def test_a_killed_process_leaves_whole_records(tmp_path: Path) -> None:
    code = f"""
import itertools, time
from trainsys.telemetry.writer import EventWriter
from trainsys.telemetry.events import Event, Message
w = EventWriter({str(tmp_path / "e.jsonl")!r}, flush_s=0.02)
for i in itertools.count():
    w.put(Message(level="info", text="x" * 300, time_s=float(i)))
    if i % 50 == 0:
        time.sleep(0.001)
    if i == 500:
        print("going", flush=True)
"""
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    deadline = time.monotonic() + 10
    while not (tmp_path / "e.jsonl").stat().st_size and time.monotonic() < deadline:
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    events, damage = read_events(tmp_path / "e.jsonl")
    assert len(events) > 10
    assert damage.damaged == 0
    assert [e.time_s for e in events if isinstance(e, Message)] == [float(i) for i in range(len(events))]


def test_the_interpreters_end_flushes(tmp_path: Path) -> None:
    code = f"""
from trainsys.telemetry.writer import EventWriter
from trainsys.telemetry.events import Event, Message
EventWriter({str(tmp_path / "e.jsonl")!r}, flush_s=60).put(Message(level="error", text="last", time_s=1.0))
raise RuntimeError("out")
"""
    subprocess.run([sys.executable, "-c", code], stderr=subprocess.DEVNULL, check=False)
    assert len(read_events(tmp_path / "e.jsonl")[0]) == 1


def test_a_torn_line_of_a_predecessor_is_closed_first(tmp_path: Path) -> None:
    path = tmp_path / "e.jsonl"
    path.write_bytes(b'{"event":"message","lev')
    writer = EventWriter(path)
    writer.put(note(1))
    writer.put(note(2))
    writer.close()
    events, damage = read_events(path)
    assert events == [note(1), note(2)]
    assert damage.damaged == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_costs_records_not_the_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "e.jsonl"
    path.symlink_to("/dev/full")
    writer = EventWriter(path, flush_s=60)
    (tmp_path / "e.tail").symlink_to("/dev/full")
    for i in range(3):
        writer.put(note(i))
        writer.flush()
    writer.close()
    assert writer.lost == 3
    assert capfd.readouterr().err.count("events are not being written") == 1


def test_a_stuck_disk_does_not_fill_memory(tmp_path: Path) -> None:
    writer = EventWriter(tmp_path / "e.jsonl", flush_s=60, max_pending=10)
    for i in range(25):
        writer.put(note(i))
    assert writer.lost == 15
    writer.close()
    assert len(read_events(writer.path)[0]) == 10


def test_a_slow_machine_is_waited_for_and_a_stuck_one_is_not(tmp_path: Path) -> None:
    stuck = threading.Event()

    def kept(event: Event) -> Event:
        if stuck.is_set():
            time.sleep(60)
        time.sleep(0.02)
        return event

    writer = EventWriter(tmp_path / "slow.jsonl", kept=kept, flush_s=60)
    for i in range(20):
        writer.put(note(i))
    writer.close(timeout_s=0.2)
    assert len(read_events(writer.path)[0]) == 20
    assert [p.name for p in tmp_path.iterdir()] == ["slow.jsonl"], "its tail is in a block"
    stuck.set()
    writer = EventWriter(tmp_path / "stuck.jsonl", kept=kept, flush_s=60)
    writer.put(note(0))
    began = time.monotonic()
    writer.close(timeout_s=0.2)
    assert time.monotonic() - began < 30


def test_an_event_that_json_cannot_hold_is_lost_alone(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    writer = EventWriter(tmp_path / "e.jsonl", flush_s=60)
    writer.put(note(1))
    writer.put(Message(level="info", text="of no type", time_s=object()))  # type: ignore[arg-type]
    writer.put(note(2))
    writer.close()
    assert writer.lost == 1
    events, damage = read_events(writer.path)
    assert events == [note(1), note(2)]
    assert not damage
    assert "events are not being written" in capfd.readouterr().err
