"""Why a rank is late: real processes, disturbed from outside or within, and what the kernel counted of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest

from trainsys.layout import Layout
from trainsys.profiler.blame import judge_window
from trainsys.profiler.causes import UNKNOWN, cause_of, explained, per_step
from trainsys.profiler.run_steps import load_steps
from trainsys.profiler.steps import Floats, StepTable, empty_table
from trainsys.profiler.waits import work_between
from trainsys.telemetry.events import HostTime
from trainsys.telemetry.host_time import HostTimes, cpu_stat

STEPS = 60
CALL_S = 0.01
"""Approximate time of a forward or backward."""
RANK = """
import sys, threading, time
from trainsys.telemetry.recorder import Recorder, here
folder, rank, n = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
exec(sys.argv[4])
def work(n):
    for _ in range(n):
        sum(range(200))
with Recorder(folder, here(rank=rank, world=2, run_id="r", layout={"dp_replicate": 2})) as rec:
    rec.begin()
    print("ready", flush=True)
    for step in range(STEPS):
        with rec.phase("forward"):
            work(n)
        with rec.phase("backward"):
            work(n)
        rec.end_step(step, tokens=1)
""".replace("STEPS", str(STEPS))
HOLDS_THE_LOCK = """
def hold():
    while True:
        sum(range(300000))
        time.sleep(0.001)
threading.Thread(target=hold, daemon=True).start()
"""
FAULTS_PAGES = """
import mmap
def hold():
    while True:
        with mmap.mmap(-1, 1 << 24) as pages:
            for at in range(0, 1 << 24, 4096):
                pages[at] = 1
threading.Thread(target=hold, daemon=True).start()
"""


@contextmanager
def _nothing(_: int) -> Iterator[None]:
    yield


@contextmanager
def _stopped(pid: int) -> Iterator[None]:
    """SIGSTOP for 40% of every 20 ms."""
    code = (
        "import os, signal, sys, time\nwhile True:\n"
        f" os.kill({pid}, signal.SIGSTOP); time.sleep(0.008); os.kill({pid}, signal.SIGCONT); time.sleep(0.012)"
    )
    with _helper([sys.executable, "-c", code]):
        yield
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)


@contextmanager
def _hogged(pid: int) -> Iterator[None]:
    """Something else wants the core that the rank is pinned to."""
    (core,) = os.sched_getaffinity(pid)
    with _helper([sys.executable, "-c", f"import os\nos.sched_setaffinity(0, {{{core}}})\nwhile True: pass"]):
        yield


@contextmanager
def _quota(pid: int) -> Iterator[None]:
    """Half a CPU, by control group."""
    root = cpu_stat(Path("/proc"), Path("/sys/fs/cgroup"))
    if root is None:
        pytest.skip("this process has no control group for CPUs")
    group = root.parent / f"test-causes-{pid}"
    try:
        group.mkdir()
        if (group / "cpu.cfs_quota_us").exists():
            (group / "cpu.cfs_period_us").write_text("20000")
            (group / "cpu.cfs_quota_us").write_text("10000")
        else:
            (group / "cpu.max").write_text("10000 20000")
        (group / "cgroup.procs").write_text(str(pid))
    except OSError as error:
        pytest.skip(f"this user may not make a control group: {error}")
    try:
        yield
    finally:
        (group.parent / "cgroup.procs").write_text(str(pid)) if Path(f"/proc/{pid}").exists() else None
        with suppress(OSError):
            group.rmdir()


@contextmanager
def _helper(command: list[str]) -> Iterator[None]:
    with subprocess.Popen(command) as process:
        try:
            yield
        finally:
            process.kill()


def _run(folder: Path, fault: str, disturbed) -> StepTable:  # type: ignore[no-untyped-def]
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        pytest.skip("two ranks need a core each")
    begin = time.thread_time()
    for _ in range(2000):
        sum(range(200))
    calls = round(2000 * CALL_S / (time.thread_time() - begin))
    ranks = []
    for rank in (0, 1):
        command = [sys.executable, "-c", RANK, str(folder), str(rank), str(calls), fault if rank else ""]
        ranks.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        os.sched_setaffinity(ranks[-1].pid, {cores[rank]})
    for process in ranks:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    with disturbed(ranks[1].pid):
        for process in reversed(ranks):
            assert process.wait(120) == 0
    return load_steps(folder)


@pytest.mark.timing
@pytest.mark.parametrize(
    ("cause", "fault", "disturbed"),
    [
        ("stopped", "", _stopped),
        ("cpu_contention", "", _hogged),
        ("cpu_quota", "", _quota),
        ("host_lock", HOLDS_THE_LOCK, _nothing),
        ("page_faults", FAULTS_PAGES, _nothing),
        ("device", "n *= 2", _nothing),
    ],
)
def test_a_process_that_is_disturbed_is_late_for_that_reason(
    tmp_path: Path, cause: str, fault: str, disturbed
) -> None:  # type: ignore[no-untyped-def]
    table = _run(tmp_path, fault, disturbed)
    found = cause_of(table, work_between(table), np.array([1]), "compute", 8, len(table.steps))
    assert found.name == cause, (found, per_step(table, 8, len(table.steps)))
    assert "more per step" in found.evidence
    assert bool(found.words) == bool(found.advice) == (cause != "device")


def _table(**late: float) -> tuple[StepTable, Floats]:
    """Four ranks of 20 ms of work, the last of which has more of what is named, per step."""
    table = empty_table(range(4), np.arange(40), Layout(dp_shard=4))
    table.work[:] = True
    work = np.full((40, 4), 0.020)
    work[:, 3] += 0.010
    grown = {"cpu_s": 0.020} | dict.fromkeys(late, 0.0)
    for name, base in grown.items():
        each = np.full((40, 4), base)
        each[:, 3] += late.get(name, 0.0)
        table.host[name] = np.cumsum(each, axis=0)
    return table, work


@pytest.mark.parametrize(
    ("cause", "more"),
    [
        ("cpu_quota", {"throttled_s": 0.009, "wait_s": 0.010}),
        ("cpu_contention", {"wait_s": 0.007, "others_s": 0.001}),
        ("host_lock", {"wait_s": 0.006, "others_s": 0.009, "faults": 100}),
        ("page_faults", {"wait_s": 0.006, "others_s": 0.009, "faults": 1000}),
        ("page_faults", {"cpu_s": 0.010, "faults": 9000}),
        ("page_faults", {"major_faults": 80}),
        ("stopped", {"wait_s": 0.001}),
        ("device", {"cpu_s": 0.010, "wait_s": 0.001}),
        ("", {"cpu_s": 0.003, "wait_s": 0.003}),
    ],
)
def test_the_cause_is_what_accounts_for_half_of_the_excess(cause: str, more: dict[str, float]) -> None:
    table, work = _table(**more)
    found = cause_of(table, work, np.array([3]), "compute", 8, 40)
    assert found.name == cause, found


def test_on_a_device_an_idle_host_says_nothing_and_a_starved_one_does() -> None:
    table, work = _table()
    table.on_device = True
    assert cause_of(table, work, np.array([3]), "compute", 8, 40).name == ""
    table, work = _table(throttled_s=0.009)
    table.on_device = True
    assert cause_of(table, work, np.array([3]), "compute", 8, 40).name == "cpu_quota"


def test_a_restart_sets_the_counters_back_and_is_no_cause() -> None:
    table, work = _table(throttled_s=0.009, wait_s=0.009)
    for name in table.host:
        table.host[name][20:] -= table.host[name][20]
    assert cause_of(table, work, np.array([3]), "compute", 8, 40).name == "cpu_quota"


def test_a_late_loader_is_not_a_thread_that_was_stopped() -> None:
    table, work = _table()
    assert cause_of(table, work, np.array([3]), "data", 8, 40).name == "data"


def test_nothing_is_made_up_where_nothing_was_counted() -> None:
    table, work = _table()
    table.host = {name: np.zeros_like(values) for name, values in table.host.items()}
    assert cause_of(table, work, np.array([3]), "compute", 8, 40) == UNKNOWN
    assert explained({}, 0.0) == UNKNOWN


def test_the_verdict_carries_the_cause_its_evidence_and_its_advice() -> None:
    table, work = _table(throttled_s=0.009, wait_s=0.010)
    rng = np.random.default_rng(3)
    table.time = work * rng.normal(1.0, 0.01, work.shape)
    table.phases = {"forward": 0.4 * table.time, "backward": 0.6 * table.time}
    (verdict,) = judge_window(table)
    assert (verdict.ranks, verdict.cause) == ((3,), "cpu_quota")
    assert "is throttled by its CPU quota" in verdict.title
    assert "out of CPU quota for 9.0 ms more per step" in verdict.evidence
    assert verdict.advice.startswith("raise the CPU limit")


@pytest.mark.parametrize(
    ("lines", "stat", "seconds"),
    [
        ("0::/pod/one\n", {"pod/one": "usage_usec 9\nthrottled_usec 2500000\n"}, 2.5),
        ("4:cpu,cpuacct:/job\n0::/\n", {"cpu,cpuacct/job": "throttled_time 1500000000\n"}, 1.5),
        ("4:cpuset:/job\n1:cpu:/\n", {"cpu": "throttled_time 1000000000\n"}, 1.0),
        ("0::/gone\n", {}, 0.0),
        ("", {}, 0.0),
    ],
)
def test_throttling_is_read_in_either_version_of_control_groups(
    tmp_path: Path, lines: str, stat: dict[str, str], seconds: float
) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(lines)
    for path, text in stat.items():
        (tmp_path / "groups" / path).mkdir(parents=True)
        (tmp_path / "groups" / path / "cpu.stat").write_text(text)
    assert HostTimes(tmp_path / "proc", tmp_path / "groups").read().throttled_s == seconds


def test_counters_are_of_this_thread_and_of_the_process_s_others() -> None:
    times = HostTimes()
    before = times.read()
    thread = threading.Thread(target=lambda: _burn(0.1))
    thread.start()
    thread.join()
    _burn(0.05)
    after = times.read()
    assert isinstance(after, HostTime)
    assert 0.099 <= after.others_s - before.others_s < 0.2
    assert 0.049 <= after.cpu_s - before.cpu_s < 0.1
    if sys.platform == "linux":
        assert after.faults > 0


def _burn(seconds: float) -> None:
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass
