"""Broken and hostile files: one line naming file and offset; never a traceback, a hang, or code that runs."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import re
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from trainsys.errors import UserError
from trainsys.profiler.safe_pickle import load_plain
from trainsys.profiler.trace import split
from trainsys.profiler.trace.main import run
from trainsys.profiler.trace.reader import read_trace
from trainsys.profiler.trace.source import Limits
from trainsys.profiler.trace.synthetic import Job, simulate, write_rank

pytestmark = pytest.mark.timing

SLOW = settings(max_examples=80, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    job = Job(ranks=2, steps=2, layers=2, fill=1)
    path = tmp_path_factory.mktemp("fuzz") / "rank00000.json"
    write_rank(job, simulate(job), 0, path)
    return path.read_bytes()


def attempt(path: Path) -> str | None:
    """The message if refused; None if read. Anything but a one-line UserError naming the file is a failure."""
    begin = time.perf_counter()
    try:
        run([path], workers=1)
        message = None
    except UserError as error:
        message = str(error)
        assert "\n" not in message
        assert str(path) in message
    assert time.perf_counter() - begin < 20
    return message


@SLOW
@given(st.floats(0, 1), st.booleans())
def test_cut_anywhere(tmp_path, sample, where, zipped):
    data = gzip.compress(sample, 1) if zipped else sample
    cut = int(where * (len(data) - 4))
    path = tmp_path / ("t.json.gz" if zipped else "t.json")
    path.write_bytes(data[:cut])
    message = attempt(path)
    if zipped:
        assert message is not None
    if message is not None:
        assert re.search(r"byte \d+", message)


@SLOW
@given(
    st.lists(st.tuples(st.floats(0, 0.999), st.binary(min_size=0, max_size=6)), min_size=1, max_size=6),
    st.booleans(),
)
def test_bytes_changed_anywhere(tmp_path, monkeypatch, sample, changes, zipped):
    monkeypatch.setattr(split, "CHUNK", 3000)
    data = bytearray(gzip.compress(sample, 1) if zipped else sample)
    for where, new in changes:
        at = int(where * len(data))
        data[at : at + len(new)] = new
    path = tmp_path / "t.json"
    path.write_bytes(bytes(data))
    attempt(path)


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
KEYS = ["ph", "cat", "name", "pid", "tid", "ts", "dur", "args"]
ARGS = [
    "correlation",
    "External id",
    "stream",
    "device",
    "bytes",
    "Collective name",
    "Process Group Name",
    "Process Group Ranks",
    "Group size",
    "In msg nelems",
    "Input Dims",
    "Input type",
    "dtype",
    "Seq",
    "graph node id",
]


@SLOW
@given(
    st.lists(st.tuples(st.sampled_from(KEYS + ARGS), values), min_size=1, max_size=8),
    st.dictionaries(
        st.sampled_from(["distributedInfo", "deviceProperties", "baseTimeNanoseconds", "host_name"]),
        values,
        max_size=3,
    ),
)
@example([("ts", -9223372036854776.0)], {})
@example([("ts", 9223372036854776.0)], {})  # a microsecond more than 64 bits of nanoseconds hold
def test_wrong_types_anywhere(tmp_path, changes, head):
    args = {
        "correlation": 1,
        "stream": 7,
        "device": 0,
        "Collective name": "allreduce",
        "Input Dims": [[2, 2], [2, 2]],
    }
    events = [
        {"ph": "X", "cat": c, "name": n, "pid": 0, "tid": 7, "ts": 5 * i, "dur": 3, "args": dict(args)}
        for i, (c, n) in enumerate(
            (
                ("kernel", "gemm"),
                ("kernel", "nccl"),
                ("cuda_runtime", "cudaLaunchKernel"),
                ("cpu_op", "aten::mm"),
                ("user_annotation", "ProfilerStep#1"),
            )
            * 2
        )
    ]
    for i, (key, value) in enumerate(changes):
        event = events[i % len(events)]
        (event if key in KEYS else event["args"] if isinstance(event.get("args"), dict) else {})[key] = value
    path = tmp_path / "t.json"
    path.write_text(json.dumps({**head, "traceEvents": events}))
    attempt(path)


@SLOW
@given(st.binary(max_size=400))
def test_anything_at_all(tmp_path, data):
    for name, head in (
        ("raw", b""),
        ("pickle", b"\x80\x04"),
        ("gz", b"\x1f\x8b\x08"),
        ("trace", b'{"traceEvents": ['),
    ):
        path = tmp_path / name
        path.write_bytes(head + data)
        attempt(path)


def test_deep_nesting(tmp_path):
    for i, text in enumerate(
        (b"[" * 200_000, b'{"traceEvents": [' + b'{"args":' * 100_000, b'{"a":' * 100_000)
    ):
        path = tmp_path / f"deep{i}.json"
        path.write_bytes(text)
        assert attempt(path) is not None


@pytest.mark.parametrize("limits", [Limits(free_bytes=1 << 20), Limits(total_bytes=4 << 20)])
@pytest.mark.parametrize(
    "filling", [b" ", b"[", b'{"ph":"X","cat":"kernel","name":"k","ts":1,"dur":1,"args":{}},']
)
def test_gzip_bombs(tmp_path, limits, filling):
    path = tmp_path / "bomb.json.gz"
    path.write_bytes(gzip.compress(b'{"traceEvents": [' + filling * (12_000_000 // len(filling))))
    with pytest.raises(UserError, match=r"bomb\.json\.gz.*byte \d+") as caught:
        read_trace(path, limits=limits)
    assert "\n" not in str(caught.value)


class Evil:
    def __init__(self, call):
        self.call = call

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("kind", ["entries", "segments"])
def test_hostile_pickles_run_nothing(tmp_path, protocol, kind):
    flag = tmp_path / "ran"
    for i, call in enumerate(
        (
            (os.system, (f"touch {flag}",)),
            (eval, (f"open({str(flag)!r}, 'w')",)),
            (Path, (str(flag),)),
            (list, ()),
        )
    ):
        path = tmp_path / f"evil{i}.pickle"
        path.write_bytes(
            pickle.dumps({kind: [Evil(call)], "pg_config": {}, "device_traces": []}, protocol=protocol)
        )
        message = attempt(path)
        assert message is not None
        if protocol >= 2:
            assert re.search(r"byte \d+", message)
        assert not flag.exists()
        with pytest.raises(UserError, match="more than plain data"):
            load_plain(path)


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x04cos\nsystem\n(S'true'\ntR.",
        b"\x80\x02\x8c\x05posix\x8c\x06system\x93.",
        b"\x80\x04P1\n.",
        b"\x80\x04\x82\x01.",
        b"\x80\x04]\x94a.",
        b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x7f",
        b"\x80\x04B\xff\xff\xff\x7f",
        b"\x80\x04j\xff\xff\xff\xff.",
        b"\x80\x04.",
    ],
)
def test_raw_pickle_opcodes(tmp_path, data):
    path = tmp_path / "p.pickle"
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"p\.pickle.*byte \d+"):
        load_plain(path)


@SLOW
@given(
    st.lists(st.tuples(st.floats(0, 0.999), st.binary(min_size=1, max_size=4)), min_size=1, max_size=5),
    st.floats(0.2, 1),
)
def test_damaged_pickles(tmp_path, changes, cut):
    content = {
        "version": "2.9",
        "pg_config": {"0": {"name": "0", "desc": "d", "ranks": "[0, 1]"}},
        "pg_status": {},
        "entries": [
            {
                "record_id": i,
                "process_group": ("0", "d"),
                "profiling_name": "nccl:all_reduce",
                "collective_seq_id": i,
                "p2p_seq_id": 0,
                "state": "scheduled",
                "pg_id": 0,
            }
            for i in range(5)
        ],
    }
    data = bytearray(pickle.dumps(content, protocol=2))
    for where, new in changes:
        at = int(where * len(data))
        data[at : at + len(new)] = new
    path = tmp_path / "dump_1"
    path.write_bytes(bytes(data[: int(len(data) * cut)]))
    attempt(path)
