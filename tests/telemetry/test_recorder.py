"""Time is given to the innermost phase, and every step adds up."""

import contextlib
import gc
import math
import mmap
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainsys.comm.ledger import MAX_CACHED, Ledger
from trainsys.telemetry import recorder as module
from trainsys.telemetry.events import (
    DeviceStep,
    Flops,
    Memory,
    Message,
    Metrics,
    RunEnd,
    RunStart,
    Stall,
    Step,
)
from trainsys.telemetry.reader import event_file, read_events
from trainsys.telemetry.recorder import Recorder, here, host_memory
from trainsys.telemetry.spans import MAX_SAMPLES


class Clock:
    """Nanoseconds that pass only when told to."""

    def __init__(self) -> None:
        self.ns = 10_000_000_000

    def __call__(self) -> int:
        return self.ns

    def work(self, ms: float) -> None:
        self.ns += round(ms * 1e6)


def make(clock: Clock, run_dir: Path | None = None, **info: object) -> Recorder:
    fields = {"run_id": "r", "rank": 0, "world": 1, "t0_wall": 1000.0, "t0_mono": 10.0, **info}
    return Recorder(run_dir, RunStart(**fields), clock=clock, watch_gc=False)  # type: ignore[arg-type]


def test_nested_phases_are_exclusive() -> None:
    clock = Clock()
    rec = make(clock)
    rec.begin()
    with rec.phase("forward"):
        clock.work(10)
        with rec.phase("data"):
            clock.work(3)
        clock.work(5)
    clock.work(2)
    step = rec.end_step(0)
    assert step.phases == {"forward": 0.015, "data": 0.003, "other": 0.002}
    assert step.step_time_s == 0.020
    assert step.start_s == 1000.0


def test_steps_leave_no_gap_and_a_phase_may_span_two() -> None:
    clock = Clock()
    rec = make(clock)
    rec.begin()
    with rec.phase("data"):
        clock.work(4)
        first = rec.end_step(0)
        clock.work(6)
    clock.work(1)
    second = rec.end_step(1)
    assert first.phases == {"data": 0.004, "other": 0.0}
    assert second.phases == {"data": 0.006, "other": 0.001}
    assert second.start_s == pytest.approx(first.start_s + first.step_time_s)


def test_collectives_leave_their_phase_both_ways() -> None:
    clock = Clock()
    rec = make(clock)
    rec.begin()
    with rec.phase("backward"):
        clock.work(10)
        with rec.collective_span("tp", "all_reduce", 100):
            clock.work(4)
        clock.work(6)
        rec.collective("fsdp", "all_gather", 50, 0.005)
        rec.collective("fsdp", "all_gather", 50, 0.0)
    step = rec.end_step(0)
    assert step.phases == {"backward": 0.011, "comm/tp": 0.004, "comm/fsdp": 0.005, "other": 0.0}
    assert step.comm["tp"]["all_reduce"].calls == 1
    gathered = step.comm["fsdp"]["all_gather"]
    assert (gathered.calls, gathered.bytes, gathered.blocked_s) == (2, 100, 0.005)
    assert step.comm_s == pytest.approx(0.009)


def test_a_collective_cannot_take_more_than_its_phase_had() -> None:
    clock = Clock()
    rec = make(clock)
    rec.begin()
    clock.work(5)
    with rec.phase("forward"):
        clock.work(2)
        rec.collective("tp", "all_reduce", 8, 1.0)
    step = rec.end_step(0)
    assert step.phases == {"comm/tp": 0.002, "other": 0.005}
    assert step.comm["tp"]["all_reduce"].blocked_s == 0.002


actions = st.recursive(
    st.tuples(st.just("work"), st.integers(0, 10**9)),
    lambda inner: st.tuples(
        st.sampled_from(["forward", "data", "stall", "span", "told"]), st.lists(inner, max_size=4)
    ),
    max_leaves=20,
)


def play(rec: Recorder, clock: Clock, action: tuple[str, object], in_comm: bool = False) -> None:
    what, inner = action
    if what == "work":
        assert isinstance(inner, int)
        clock.ns += inner
        return
    assert isinstance(inner, list)
    spans = {
        "stall": lambda: rec.stall("checkpoint"),
        "span": lambda: contextlib.nullcontext() if in_comm else rec.collective_span("tp", "all_reduce", 1),
        "told": contextlib.nullcontext,
    }
    with spans.get(what, lambda: rec.phase(what))():
        for a in inner:
            play(rec, clock, a, in_comm or what == "span")
        if what == "told" and not in_comm:
            rec.collective("fsdp", "all_gather", 1, 0.1)


@given(st.lists(st.lists(actions, max_size=4), min_size=1, max_size=4))
def test_everything_adds_up_whatever_happens(steps: list[list[tuple[str, object]]]) -> None:
    clock = Clock()
    rec = make(clock)
    rec.begin()
    began = clock.ns
    records = []
    for i, actions_of_step in enumerate(steps):
        for action in actions_of_step:
            play(rec, clock, action)
        records.append(rec.end_step(i))
    for step in records:
        assert math.isclose(sum(step.phases.values()), step.step_time_s, abs_tol=1e-9)
        assert all(s >= 0 for s in step.phases.values())
        for axis, ops in step.comm.items():
            blocked = sum(c.blocked_s for c in ops.values())
            assert math.isclose(blocked, step.phases.get(f"comm/{axis}", 0.0), abs_tol=1e-9)
    wall = sum(s.step_time_s + sum(s.stalls.values()) for s in records)
    assert math.isclose(wall, (clock.ns - began) / 1e9, abs_tol=1e-8)


def test_a_stall_is_no_part_of_the_step(tmp_path: Path) -> None:
    clock = Clock()
    rec = make(clock, tmp_path)
    clock.work(700)
    rec.begin()
    with rec.phase("forward"):
        clock.work(5)
    with rec.stall("eval", "100 batches"):
        with rec.phase("forward"), rec.collective_span("tp", "all_reduce", 10):
            clock.work(40)
        rec.collective("tp", "all_reduce", 10, 0.03)
        with rec.stall("checkpoint"):
            clock.work(2)
    step = rec.end_step(0)
    assert step.step_time_s == 0.005
    assert step.phases == {"forward": 0.005, "other": 0.0}
    assert step.stalls == {"eval": 0.042}
    assert step.comm == {}
    rec.finish("done")
    stalls = [e for e in read_events(event_file(tmp_path, 0))[0] if isinstance(e, Stall)]
    assert [(s.kind, s.seconds, s.detail, s.step) for s in stalls] == [
        ("setup", 0.7, "", 0),
        ("eval", 0.042, "100 batches", 0),
    ]
    assert stalls[1].start_s == pytest.approx(1000.705)


def test_micro_batches_are_told_apart() -> None:
    clock = Clock()
    rec = make(clock)
    rec.begin()
    for ms in (5, 7):
        with rec.phase("forward"):
            clock.work(ms)
            rec.collective("tp", "all_reduce", 1, 0.001)
        with rec.phase("optimizer"):
            clock.work(1)
    assert rec.end_step(0).micro_us == {"forward": [4000, 6000]}
    with rec.phase("forward"):
        clock.work(1)
    assert rec.end_step(1).micro_us == {}
    for _ in range(MAX_SAMPLES + 5):
        with rec.phase("backward"):
            clock.work(1)
    assert len(rec.end_step(2).micro_us["backward"]) == MAX_SAMPLES


def test_mfu_needs_a_peak_and_counts_every_rank() -> None:
    clock = Clock()
    flops = Flops(model=4e9, palm=5e9, hardware=6e9)
    rec = make(clock, world=2, peak_flops=1e10)
    rec.begin()
    clock.work(1000)
    step = rec.end_step(0, flops=flops)
    assert (step.mfu, step.mfu_palm, step.hfu) == (0.2, 0.25, 0.3)
    clock.work(1000)
    assert rec.end_step(1).mfu is None
    unknown = make(clock)
    unknown.begin()
    clock.work(1000)
    assert unknown.end_step(0, flops=flops).mfu is None


def test_garbage_collection_is_a_phase_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "GC_STALL_S", 0.0)
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        with Recorder(tmp_path, here(run_id="r", rank=0, world=1)) as rec:
            rec.begin()
            with rec.phase("forward"):
                gc.collect()
            thread = threading.Thread(target=gc.collect)  # another thread's: the step does not wait for it
            thread.start()
            thread.join()
            step = rec.end_step(0)
    finally:
        if was_enabled:
            gc.enable()
    assert step.phases["gc"] > 0
    assert step.phases["forward"] >= 0
    assert sum(step.phases.values()) == pytest.approx(step.step_time_s)
    assert rec._on_gc not in gc.callbacks
    stalls = [e for e in read_events(event_file(tmp_path, 0))[0] if isinstance(e, Stall) and e.kind == "gc"]
    assert len(stalls) == 1
    assert stalls[0].in_step
    assert stalls[0].detail == "generation 2"


def test_a_collection_within_a_collective_is_no_communication() -> None:
    clock = Clock()
    rec = make(clock)
    rec.begin()
    with rec.phase("forward"):
        clock.work(1)
        with rec.collective_span("tp", "all_reduce", 8):
            clock.work(2)
            rec._on_gc("start", {})
            clock.work(4)
            rec._on_gc("stop", {"generation": 0})
    step = rec.end_step(0)
    assert step.phases == {"forward": 0.001, "comm/tp": 0.002, "gc": 0.004, "other": 0.0}


class LateTimer:
    """A device whose marks are reached one step late."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.reached = 0
        self.free: list[int] = []

    def mark(self) -> int:
        return self.clock.ns

    def elapsed(self, first: int, last: int) -> float | None:
        return (last - first) / 1e9 if last <= self.reached else None

    def marks(self, stream: Any) -> bool:
        return stream is None

    def recycle(self, handles: list[int]) -> None:
        self.free += handles


def test_device_time_comes_later_and_adds_up(tmp_path: Path) -> None:
    clock = Clock()
    timer = LateTimer(clock)
    info = RunStart(run_id="r", rank=0, world=1, t0_wall=0.0, t0_mono=10.0)
    rec = Recorder(tmp_path, info, clock=clock, timer=timer, watch_gc=False)
    rec.begin()
    for i in range(3):
        with rec.phase("forward"):
            clock.work(5)
            with rec.collective_span("tp", "all_reduce", 1):
                clock.work(2)
        with rec.stall("eval"):
            clock.work(100)
        clock.work(1)
        rec.end_step(i)
        assert rec.last_device is None or rec.last_device.step == i - 1
        timer.reached = clock.ns
    rec.finish("done")
    device = [e for e in read_events(event_file(tmp_path, 0))[0] if isinstance(e, DeviceStep)]
    assert [d.step for d in device] == [0, 1, 2]
    for d in device:
        assert d.phases == pytest.approx({"forward": 0.005, "comm/tp": 0.002, "other": 0.001})
        assert d.step_time_s == pytest.approx(0.008)
    assert timer.free


def test_the_file_tells_the_run(tmp_path: Path) -> None:
    clock = Clock()
    rec = make(clock, tmp_path, rank=3, world=4)
    rec.begin()
    rec.end_step(0, loss=math.inf, tokens=7, lr=0.1)
    rec.message("warning", "look")
    rec.metrics(0, {"eval/loss": math.nan, "eval/ppl": 2.0})
    rec.finish("stopped", "SIGTERM")
    rec.finish("done")
    events, damage = read_events(tmp_path / "events" / "rank_00003.jsonl")
    assert not damage
    assert [type(e) for e in events] == [RunStart, Stall, Step, Message, Metrics, RunEnd]
    _, _, step, message, metrics, end = events
    assert isinstance(step, Step)
    assert step.loss == math.inf
    assert isinstance(message, Message)
    assert message.text == "look"
    assert isinstance(metrics, Metrics)
    assert metrics.values["eval/ppl"] == 2.0
    assert math.isnan(metrics.values["eval/loss"] or 0.0)
    assert isinstance(end, RunEnd)
    assert (end.status, end.reason, end.step, end.lost) == ("stopped", "SIGTERM", 0, 0)


def run_that_fails(tmp_path: Path) -> None:
    with make(Clock(), tmp_path) as rec, rec.phase("forward"):
        raise KeyError("gone")


def test_an_error_is_the_last_record(tmp_path: Path) -> None:
    with pytest.raises(KeyError):
        run_that_fails(tmp_path)
    end = read_events(event_file(tmp_path, 0))[0][-1]
    assert isinstance(end, RunEnd)
    assert (end.status, end.reason) == ("failed", "KeyError: 'gone'")


def test_nothing_grows_with_the_run() -> None:
    clock = Clock()
    rec = make(clock)
    ledger = Ledger()
    ledger.recorder = rec
    rec.begin()
    for i in range(MAX_CACHED + 50):
        with rec.phase("forward"), ledger.span("ep", "all_to_all", i):
            clock.work(1)
        if i % 100 == 0:
            rec.end_step(i)
    rec.end_step(9999)
    clock_ = rec._clock
    assert len(ledger._spans) <= MAX_CACHED
    assert ledger.calls("ep") == MAX_CACHED + 50
    assert not clock_.open
    assert not clock_.begun
    assert clock_.end(clock.ns).phases == {"other": 0}


def new_pages(mib: int) -> mmap.mmap:
    """Pages fresh from the kernel, whatever the allocator has kept, each touched."""
    pages = mmap.mmap(-1, mib << 20)
    for at in range(0, len(pages), 1 << 12):
        pages[at] = 1
    return pages


def test_memory_of_this_process() -> None:
    memory = host_memory()
    assert memory.peak >= memory.rss > 1 << 20
    with new_pages(64):
        assert host_memory().rss > memory.rss + (32 << 20)
    rec = Recorder(None, here(run_id="r", rank=0, world=1), memory=lambda: Memory(allocated=5))
    assert rec.end_step(0).memory == Memory(allocated=5)
    rec.finish("done")


def test_memory_of_a_forked_process_is_its_own() -> None:
    host_memory()
    read, write = os.pipe()
    if os.fork() == 0:
        before = host_memory().rss
        with new_pages(64):
            os.write(write, str(host_memory().rss - before).encode())
        os._exit(0)
    grown = int(os.read(read, 64))
    os.wait()
    assert grown > (48 << 20)
