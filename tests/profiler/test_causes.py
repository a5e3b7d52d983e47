"""Why a rank is late: real processes, disturbed from outside or within, and what the kernel counted of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest

from trainsys.layout import Layout
from trainsys.profiler.blame import judge_window
from trainsys.profiler.causes import cause_of, explained
from trainsys.profiler.run_steps import load_steps
from trainsys.profiler.steps import Floats, StepTable, empty_table
from trainsys.profiler.waits import work_between
from trainsys.telemetry.events import HostTime
from trainsys.telemetry.host_time import HostTimes, cpu_stat

STEPS = 60
RANK = """
import sys, threading, time
from trainsys.telemetry.recorder import Recorder, here
folder, rank, fault = sys.argv[1], int(sys.argv[2]), sys.argv[3]
exec(fault)
def work(n):
    for _ in range(n):
        sum(range(200))
begin = time.thread_time()
work(2000)
n = int(2000 * 0.01 / (time.thread_time() - begin))
with Recorder(folder, here(rank=rank, world=2, run_id="r", layout={"dp_replicate": 2})) as rec:
    rec.begin()
    print("ready", flush=True)
    for step in range(%d):
        with rec.phase("forward"):
            work(n)
        with rec.phase("backward"):
            work(n)
        rec.end_step(step, tokens=1)
""" % STEPS
HOLDS_THE_LOCK = """
import ctypes
held = ctypes.PyDLL(None)
def hold():
    while True:
        end = time.thread_time() + 0.01
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
    ranks = []
    for rank in (0, 1):
        command = [sys.executable, "-c", RANK, str(folder), str(rank), fault if rank else ""]
        ranks.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        os.sched_setaffinity(ranks[-1].pid, {cores[rank]})
    for process in ranks:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    with disturbed(ranks[1].pid):
        for process in reversed(ranks):
            assert process.wait(120) == 0
    _, steps = load_steps(folder)
    return steps.table(np.flatnonzero(steps.whole))


@pytest.mark.timing
@pytest.mark.parametrize(
    "cause, fault, disturbed",
    [
        ("stopped", "", _stopped),
        ("cpu_contention", "", _hogged),
        ("cpu_quota", "", _quota),
        ("host_lock", HOLDS_THE_LOCK, _nothing),
        ("page_faults", FAULTS_PAGES, _nothing),
    ],
)
def test_a_process_that_is_disturbed_is_late_for_that_reason(tmp_path: Path, cause: str, fault: str, disturbed) -> None:  # type: ignore[no-untyped-def]
    table = _run(tmp_path, fault, disturbed)
    found = cause_of(table, work_between(table), np.array([1]), "compute", 8, len(table.steps))
    assert (found.name, found.evidence.count("ms") + found.evidence.count("pages")) == (cause, 1), found
    assert found.words and found.advice
