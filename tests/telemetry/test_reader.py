"""Whatever state a file is in, its whole records are read and the rest is counted."""

from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trainsys.errors import UserError
from trainsys.telemetry import reader
from trainsys.telemetry.events import Message, RunStart, Step
from trainsys.telemetry.reader import read_events

START = RunStart(run_id="r", rank=0, world=1, t0_wall=1.0, t0_mono=2.0)
RECORDS = [START, *(Step(step=i, start_s=float(i), step_time_s=0.5, phases={"other": 0.5}) for i in range(4))]
LINES = [msgspec.json.encode(r) for r in RECORDS]
same_file = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


def test_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_bytes(b"\n".join(LINES) + b"\n")
    events, damage = read_events(path)
    assert events == RECORDS
    assert not damage
    assert str(damage).endswith("whole")


def test_cut_at_any_byte_costs_only_what_was_cut(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    data = b"\n".join(LINES[:3]) + b"\n"
    ends = [sum(len(line) + 1 for line in LINES[:i]) for i in range(4)]
    for cut in range(len(data) + 1):
        path.write_bytes(data[:cut])
        events, damage = read_events(path)
        # A record is whole once its last brace is there, its newline or not.
        whole = sum(cut >= end - 1 for end in ends[1:])
        assert events == RECORDS[:whole]
        assert damage.truncated == (cut not in ends and cut + 1 not in ends)
        assert damage.damaged == 0


@same_file
@given(st.lists(st.binary(max_size=60) | st.sampled_from(LINES), max_size=12))
def test_rubbish_never_hides_a_record(tmp_path: Path, lines: list[bytes]) -> None:
    lines = [line.replace(b"\n", b"x").replace(b"\r", b"x") for line in lines]
    path = tmp_path / "r.jsonl"
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    events, damage = read_events(path)
    good = [line for line in lines if line in LINES]
    assert len(events) >= len(good)
    assert len(events) + damage.damaged + damage.unknown == sum(1 for line in lines if line.strip())


@same_file
@given(st.integers(0, len(LINES[1]) - 1), st.integers(0, 255))
def test_a_changed_byte_harms_one_line_at_most(tmp_path: Path, at: int, value: int) -> None:
    path = tmp_path / "r.jsonl"
    broken = bytearray(LINES[1])
    broken[at] = value
    path.write_bytes(b"\n".join([LINES[0], bytes(broken), *LINES[2:]]) + b"\n")
    events, _ = read_events(path)
    assert events[0] == START
    assert events[-3:] == RECORDS[2:]


def test_newer_minor_version_is_read_without_what_is_new(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    newer = LINES[1].replace(b'"step":0', b'"step":0,"colour":"red","more":{"x":[1]}')
    path.write_bytes(b"\n".join([LINES[0], newer, b'{"event":"eclipse","t":3}', LINES[2]]) + b"\n")
    events, damage = read_events(path)
    assert events == RECORDS[:3]
    assert (damage.unknown, damage.damaged) == (1, 0)
    assert "1 record of a newer version skipped" in str(damage)


@pytest.mark.parametrize("schema", ["3.0", "17.3"])
@pytest.mark.parametrize("changed", [False, True])
def test_newer_major_version_is_refused_by_name(tmp_path: Path, schema: str, changed: bool) -> None:
    path = tmp_path / "r.jsonl"
    start = {"event": "run_start", "schema": schema, "rank": "zero" if changed else 0}
    if not changed:
        start |= {"run_id": "r", "world": 1, "t0_wall": 1.0, "t0_mono": 2.0}
    path.write_bytes(msgspec.json.encode(start) + b"\n" + LINES[1] + b"\n")
    with pytest.raises(UserError, match=f"event schema {schema}.* reads up to 2.0"):
        read_events(path)


def test_missing_file(tmp_path: Path) -> None:
    events, damage = read_events(tmp_path / "none.jsonl")
    assert events == []
    assert damage.missing
    assert damage


def test_an_endless_line_is_skipped_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "MAX_LINE", 1000)
    path = tmp_path / "r.jsonl"
    path.write_bytes(LINES[0] + b"\n" + b"x" * 5500 + b"\n" + LINES[1] + b"\n" + b"y" * 3000)
    events, damage = read_events(path)
    assert events == RECORDS[:2]
    assert damage.damaged == 1
    assert damage.truncated


def test_text_of_any_kind_survives(tmp_path: Path) -> None:
    message = Message(level="info", text='a "b"\n\u2028 \U0001f600 \x00', time_s=1.0)
    path = tmp_path / "r.jsonl"
    path.write_bytes(msgspec.json.encode(message) + b"\n")
    assert read_events(path)[0] == [message]
