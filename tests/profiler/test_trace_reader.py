"""The reader: exact times, any layout, repairs that are counted, flat limits."""

from __future__ import annotations

import gzip
import json
import random
import tracemalloc
from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainsys.errors import UserError
from trainsys.profiler.trace import decode, source, split
from trainsys.profiler.trace.kernel_names import LONGEST
from trainsys.profiler.trace.kinds import kind_of, sort_inputs
from trainsys.profiler.trace.reader import read_trace
from trainsys.profiler.trace.source import Limits


def kernel(ts, dur, i=0, **extra):
    return {
        "ph": "X",
        "cat": "kernel",
        "name": f"k{i % 3}",
        "pid": 0,
        "tid": 7,
        "ts": ts,
        "dur": dur,
        "args": {"device": 0, "stream": 7, "correlation": i, "External id": i},
        **extra,
    }


def write(path: Path, text: str | bytes) -> Path:
    data = text.encode() if isinstance(text, str) else text
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def us(ns: int) -> str:
    return f"{ns // 1000}.{ns % 1000:03d}"


def with_times(times, base=0):
    events = ",".join(
        json.dumps(kernel("TS", "DUR", i)).replace('"TS"', us(t)).replace('"DUR"', us(d))
        for i, (t, d) in enumerate(times)
    )
    return f'{{"baseTimeNanoseconds": {base}, "traceEvents": [{events}]}}'


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 6 * 86_400 * 10**9), st.integers(0, 10**10)), min_size=1, max_size=30),
    st.sampled_from([0, 1_790_857_026_000_000_000]),
)
def test_relative_times_are_exact_to_the_nanosecond(tmp_path_factory, times, base):
    path = write(tmp_path_factory.mktemp("t") / "a.json", with_times(times, base))
    trace = read_trace(path)
    got = sorted(zip(trace.device.start.tolist(), trace.device.end.tolist(), strict=True))
    assert got == sorted((base + t, base + t + d) for t, d in times)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1_790_000_000 * 10**9, 1_790_500_000 * 10**9), st.integers(0, 10**9)),
        min_size=1,
        max_size=20,
    )
)
def test_epoch_times_with_decimals_are_exact_too(tmp_path_factory, times):
    """A double holds only quarter microseconds there: these must be decoded as decimals."""
    trace = read_trace(write(tmp_path_factory.mktemp("t") / "a.json", with_times(times)))
    got = sorted(zip(trace.device.start.tolist(), trace.device.end.tolist(), strict=True))
    assert got == sorted((t, t + d) for t, d in times)


def test_nanosecond_timestamps_are_recognised_and_said(tmp_path):
    t = 1_790_000_000_123_456_789
    trace = read_trace(write(tmp_path / "a.json", json.dumps({"traceEvents": [kernel(t, 1234)]})))
    assert trace.device.start.tolist() == [t]
    assert trace.device.end.tolist() == [t + 1234]
    assert any("nanoseconds" in k for k in trace.said)


def test_whole_microseconds(tmp_path):
    trace = read_trace(
        write(tmp_path / "a.json", json.dumps({"traceEvents": [kernel(1694128201429795, 17)]}))
    )
    assert trace.device.start.tolist() == [1694128201429795000]
    assert trace.device.end.tolist() == [1694128201429812000]


HEAD = {
    "schemaVersion": 1,
    "distributedInfo": {"rank": 5, "world_size": 8, "backend": "nccl"},
    "deviceProperties": [{"id": 0, "name": "NVIDIA H100", "totalGlobalMem": 85}],
    "host_name": "n1",
}


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("suffix", [".json", ".json.gz"])
@pytest.mark.parametrize("where", ["first", "last", "middle"])
def test_any_key_order_and_layout(tmp_path, monkeypatch, indent, suffix, where):
    monkeypatch.setattr(split, "CHUNK", 700)
    rng = random.Random(1)
    events = []
    for i in range(60):
        event = kernel(i * 10.5, 3.25, i)
        event["args"]["nested"] = [{"a": {"b": "}, {"}}, {"c": '"},{"'}]
        items = list(event.items())
        rng.shuffle(items)
        events.append(dict(items))
    items = list(HEAD.items())
    items.insert({"first": 0, "last": len(items), "middle": 2}[where], ("traceEvents", events))
    trace = read_trace(write(tmp_path / f"a{suffix}", json.dumps(dict(items), indent=indent)))
    assert len(trace.device) == 60
    assert (trace.rank, trace.world, trace.device_name, trace.host) == (5, 8, "NVIDIA H100", "n1")
    assert trace.device.start.tolist() == [i * 10500 for i in range(60)]
    assert not trace.said


def test_traceevents_inside_metadata_is_not_the_array(tmp_path):
    text = (
        '{"metadata": {"traceEvents": [1, 2], "note": "\\"traceEvents\\": ["}, '
        + json.dumps({"traceEvents": [kernel(1, 2)]})[1:]
    )
    assert len(read_trace(write(tmp_path / "a.json", text)).device) == 1


def test_bare_array_closed_and_unclosed(tmp_path):
    text = json.dumps([kernel(i, 1, i) for i in range(5)])
    assert len(read_trace(write(tmp_path / "a.json", text)).device) == 5
    assert len(read_trace(write(tmp_path / "b.json", text[:-1])).device) == 5


@pytest.mark.parametrize(
    ("bad", "what"),
    [
        ('"Process Group Description": ,', "missing value"),
        ('"x": NaN,', "NaN or Infinity"),
        ('"x": -Infinity,', "NaN or Infinity"),
        ('"x": [1, 2, ],', "trailing comma"),
        ('"x": "C:\\qath\\zzz",', "bad escape"),
        ('"x": "a\x01b",', "control character"),
        ('"dtype": "caf\udcff",', "invalid UTF-8"),
    ],
)
def test_invalid_json_is_repaired_and_counted(tmp_path, monkeypatch, bad, what):
    monkeypatch.setattr(split, "CHUNK", 2000)
    events = [json.dumps(kernel(i, 1, i)) for i in range(40)]
    for i in (3, 30):
        events[i] = events[i].replace('"args": {', '"args": {' + bad)
    text = '{"traceEvents": [' + ",".join(events) + '], "traceName": "x"}'
    trace = read_trace(write(tmp_path / "a.json", text.encode("utf-8", "surrogateescape")))
    assert len(trace.device) == 40
    assert sum(n for k, n in trace.said.items() if what in k) >= 1


def test_missing_comma_and_lost_quote_lose_little(tmp_path, monkeypatch):
    monkeypatch.setattr(split, "CHUNK", 2000)
    events = [json.dumps(kernel(i, 1, i)) for i in range(200)]
    events[50] = events[50].replace('"name": "k2"', '"name": "k2')
    text = '{"traceEvents": [' + ",".join(events) + "]}"
    trace = read_trace(write(tmp_path / "a.json", text))
    assert len(trace.device) >= 180
    assert any(k.startswith("dropped") for k in trace.said)


def test_wrong_types_are_dropped_and_counted(tmp_path):
    events = [kernel(i, 1, i) for i in range(20)]
    events[3]["name"] = {"no": "name"}
    events[4]["ts"] = "4.5"
    events[5]["args"] = "none"
    events[6]["dur"] = None
    trace = read_trace(write(tmp_path / "a.json", json.dumps({"traceEvents": events})))
    assert len(trace.device) == 18
    assert 4500 in trace.device.start.tolist()
    assert trace.said["dropped: event with a field of the wrong type"] == 2
    assert trace.said["dropped: arguments of an event, of the wrong type"] == 1


def mixed(rng, i):
    """An event as the reader wants it, or of a kind it must leave, skip, mend or drop."""
    event = kernel(
        i * 10, 7, i, cat=rng.choice(["kernel", "gpu_memcpy", "cuda_runtime", "cpu_op", "user_annotation"])
    )
    odd = rng.randrange(12)
    if odd == 0:
        event = {
            "ph": "f",
            "cat": f"flow {rng.randrange(70)}",
            "id": i,
            "pid": 1,
            "tid": 2,
            "ts": i,
            "name": "x",
        }
    elif odd == 1:
        event = {"ph": "M", "name": "process_name", "pid": 1, "args": {"name": "python"}}
    elif odd == 2:
        event["args"] = rng.choice(["none", {"correlation": "17", "stream": "7"}, {}])
    elif odd == 3:
        event.pop(rng.choice(["args", "dur", "tid", "cat"]))
    elif odd == 4:
        event["name"] = "aten::mm"
        event["args"]["Input Dims"] = [[2, 3], [3, 4]]
    return event


@pytest.mark.parametrize("seed", range(4))
def test_categories_as_types_give_what_plain_events_give(tmp_path, monkeypatch, seed):
    monkeypatch.setattr(split, "CHUNK", 3000)
    rng = random.Random(seed)
    path = write(tmp_path / "a.json", json.dumps({"traceEvents": [mixed(rng, i) for i in range(400)]}))
    typed = read_trace(path)
    monkeypatch.setattr(decode, "by_category", lambda categories: None)
    plain = read_trace(path)
    for part in ("device", "runtime", "notes", "ops"):
        one, other = getattr(typed, part), getattr(plain, part)
        assert all((getattr(one, f.name) == getattr(other, f.name)).all() for f in fields(one)), part
    assert len(typed.device) > 50
    assert len(typed.ops) > 0
    assert (typed.said, typed.names, typed.op_shapes) == (plain.said, plain.names, plain.op_shapes)
    assert (typed.span, typed.n_events) == (plain.span, plain.n_events)


def test_events_without_a_category_are_not_taken_for_the_only_one(tmp_path, monkeypatch):
    """Kineto of 2021 wrote its memory instants so, in stretches of operators alone."""
    monkeypatch.setattr(split, "CHUNK", 1000)
    monkeypatch.setattr(source, "PIECE", 500)
    instant = {"ph": "i", "s": "t", "name": "[memory]", "pid": 1, "tid": 1, "ts": 5, "args": {"Bytes": 4}}
    operators = [kernel(i, 1, i, cat="cpu_op", name="aten::mm") for i in range(20)]
    events = operators + [event for i in range(20) for event in (kernel(30 + i, 1, i, cat="cpu_op"), instant)]
    trace = read_trace(write(tmp_path / "rank0.json", json.dumps({"traceEvents": events})))
    assert trace.n_events == 60
    assert not any(said.startswith("dropped") for said in trace.said)


def test_old_categories_and_rank_from_the_name(tmp_path):
    old = kernel(10, 5)
    old.update(cat="Kernel", tid="stream 9", args={"correlation": 4, "external id": 2})
    call = {
        "ph": "X",
        "cat": "Runtime",
        "name": "cudaLaunchKernel",
        "pid": 1,
        "tid": "1",
        "ts": 4,
        "dur": 2,
        "args": {"correlation": 4},
    }
    trace = read_trace(write(tmp_path / "job_worker3.json", json.dumps({"traceEvents": [old, call]})))
    assert trace.rank == 3
    assert any("rank" in k for k in trace.said)
    assert trace.device.stream.tolist() == [9]
    assert trace.device.correlation.tolist() == trace.runtime.correlation.tolist() == [4]


def test_truncated_is_refused_or_kept_on_request(tmp_path):
    text = json.dumps({"traceEvents": [kernel(i, 1, i) for i in range(100)]})
    path = write(tmp_path / "a.json", text[: len(text) // 2])
    with pytest.raises(UserError, match=r"a\.json.*cut off.*byte \d+"):
        read_trace(path)
    trace = read_trace(path, keep_truncated=True)
    assert 40 < len(trace.device) < 60
    assert any("truncated" in k for k in trace.said)


def test_truncated_gzip(tmp_path):
    whole = gzip.compress(json.dumps({"traceEvents": [kernel(i, i % 7, i) for i in range(5000)]}).encode())
    path = tmp_path / "a.json.gz"
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"a\.json\.gz.*gzip.*byte \d+"):
        read_trace(path)
    assert len(read_trace(path, keep_truncated=True).device) > 500


def test_gzip_bomb_and_size_limit_are_refused(tmp_path):
    path = tmp_path / "bomb.json.gz"
    path.write_bytes(gzip.compress(b'{"traceEvents": [' + b" " * 10_000_000))
    with pytest.raises(UserError, match="gzip bomb"):
        read_trace(path, limits=Limits(free_bytes=1 << 20))
    giant = write(tmp_path / "giant.json.gz", b'{"traceEvents": [{"name": "' + b"x" * 5_000_000)
    with pytest.raises(UserError, match="larger than"):
        read_trace(giant, limits=Limits(unit_bytes=1 << 20))
    with pytest.raises(UserError, match="more than 5000000 bytes"):
        read_trace(path, limits=Limits(total_bytes=5_000_000))


def test_kinds_by_content(tmp_path):
    assert kind_of(write(tmp_path / "a.txt", '{"schemaVersion": 1, "traceEvents": []}')) == "trace"
    assert kind_of(write(tmp_path / "b.bin.gz", '{"schemaVersion": 1, "traceEvents": []}')) == "trace"
    write(tmp_path / "notes.md", "hello")
    inputs = sort_inputs([tmp_path])
    assert len(inputs.traces) == 2
    assert [p.name for p, _ in inputs.unread] == ["notes.md"]
    for name, data in (("z.zip", b"PK\3\4"), ("e", b""), ("t", b"hello")):
        with pytest.raises(UserError, match=name):
            kind_of(write(tmp_path / name, data))
    with pytest.raises(UserError, match="no such file"):
        sort_inputs([tmp_path / "absent"])


def test_shared_traces_read_without_loss(shared):
    qwen = read_trace(shared / "tracelens/Qwen_Qwen1.5-0.5B-Chat__1016005.json.gz")
    assert not any(k.startswith(("dropped", "repaired")) for k in qwen.said)
    hta = read_trace(shared / "hta/df_index_resolver/df_index_resolver.json.gz")
    assert (len(hta.device), hta.rank, hta.world) == (22290, 1, 2)
    assert sum("nccl" in hta.names[i] for i in hta.device.name) == 2020


def test_a_huge_name_costs_little_more_than_its_bytes_and_is_cut(tmp_path):
    """Each escaped quote in a string cut at a chunk's end used to be tried as a string of its own: quadratic."""
    name = '\\"' * 2_000_000
    plain = json.dumps({"traceEvents": [kernel(i, 1, i) for i in range(3)]})
    path = write(tmp_path / "rank0.json", plain.replace("k1", name, 1))
    tracemalloc.start()
    try:
        trace = read_trace(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert sorted(len(n) for n in trace.names) == [2, 2, LONGEST]
    assert peak < 12 * len(name)
