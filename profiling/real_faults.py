"""Faults of ``profiling/blame_real.py``: each is on within its context, from outside or by a rank's own thread.

What a fault is done to is a ``Target``: the processes of a run, one of which it is for. Nothing here sleeps in place of a
fault; the helpers' sleeps are the parts of a period in which they leave the rank alone.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

GROUPS = Path("/sys/fs/cgroup")
RATE = "rate 150mbit burst 32kb latency 400ms"
READS_PER_S = 40
"""Of the rank that is starved of data; a page that is not in memory takes several, for the kernel reads ahead."""

DIE_WITH_US = ["setpriv", "--pdeathsig", "KILL"]
"""A harness that is killed leaves no hog and no rank that stands still for ever."""
STOPS = """
import os, signal, sys, time
pid, share = int(sys.argv[1]), float(sys.argv[2])
try:
    while True:
        os.kill(pid, signal.SIGSTOP)
        time.sleep(0.02 * share)
        os.kill(pid, signal.SIGCONT)
        time.sleep(0.02 * (1 - share))
except ProcessLookupError:
    pass
"""
HOG = """
import os, sys, time
core, duty = int(sys.argv[1]), float(sys.argv[2])
os.sched_setaffinity(0, {core})
while True:
    end = time.monotonic() + 0.05 * duty
    while time.monotonic() < end:
        pass
    time.sleep(0.05 * (1 - duty))
"""
FORGETS = """
import os, sys, time
file = os.open(sys.argv[1], os.O_RDONLY)
while True:
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    time.sleep(0.05)
"""
THREADS = """
import os, threading, time
def disturb(kind, flag):
    import mmap
    kept = []
    while True:
        if not os.path.exists(flag):
            time.sleep(0.02)
        elif kind == "pages":
            with mmap.mmap(-1, 1 << 22) as pages:
                for at in range(0, 1 << 22, 4096):
                    pages[at] = 1
            time.sleep(0.002)
        else:
            kept = [[i] for i in range(20000)]
            time.sleep(0.01)
if os.environ.get("DISTURB"):
    threading.Thread(target=disturb, args=os.environ["DISTURB"].split(":", 1), daemon=True).start()
"""
"""The ``sitecustomize`` of the rank that is disturbed from within. A thread that never rests takes the interpreter for
5 ms at each of the step's hundreds of calls."""


@dataclass(frozen=True)
class Target:
    pids: list[int]
    """Of each rank."""
    rank: int
    flag: Path
    """While this file is there, the thread within the rank is at work."""
    spaces: list[str]
    """Each rank's network namespace; empty where all share the machine's."""
    shard: Path | None = None
    """What the ranks read."""

    @property
    def pid(self) -> int:
        return self.pids[self.rank]


Fault = Callable[[Target], AbstractContextManager[None]]


@contextmanager
def helper(code: str, *arguments: str) -> Iterator[None]:
    process = subprocess.Popen([*DIE_WITH_US, sys.executable, "-S", "-c", code, *arguments])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def stopped(share: float) -> Fault:
    @contextmanager
    def fault(target: Target) -> Iterator[None]:
        try:
            with helper(STOPS, str(target.pid), str(share)):
                yield
        finally:
            with suppress(ProcessLookupError):
                os.kill(target.pid, signal.SIGCONT)

    return fault


@contextmanager
def hogged(target: Target) -> Iterator[None]:
    """The rank has one core and shares it."""
    before = os.sched_getaffinity(0)
    core = sorted(before)[target.rank % len(before)]
    _each_thread(target.pid, {core})
    try:
        with helper(HOG, str(core), "1.0"):
            yield
    finally:
        _each_thread(target.pid, before)


def _each_thread(pid: int, cores: set[int]) -> None:
    with suppress(FileNotFoundError):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            with suppress(ProcessLookupError):
                os.sched_setaffinity(int(thread.name), cores)


@contextmanager
def quota(target: Target) -> Iterator[None]:
    """40% of a core, in periods of 20 ms."""
    with _group("cpu", target.pid) as group:
        if (group / "cpu.cfs_quota_us").exists():
            (group / "cpu.cfs_period_us").write_text("20000")
            (group / "cpu.cfs_quota_us").write_text("8000")
        else:
            (group / "cpu.max").write_text("8000 20000")
        yield


@contextmanager
def starved(target: Target) -> Iterator[None]:
    """Few reads a second of the disk that has the data, of which memory keeps nothing: the kernel reads far ahead, and a
    file is soon there as a whole."""
    assert target.shard is not None
    number = os.stat(target.shard).st_dev
    device = f"{os.major(number)}:{os.minor(number)}"
    with _group("blkio", target.pid) as group, helper(FORGETS, str(target.shard)):
        if (group / "io.max").exists():
            (group / "io.max").write_text(f"{device} riops={READS_PER_S}")
        else:
            (group / "blkio.throttle.read_iops_device").write_text(f"{device} {READS_PER_S}")
        yield


@contextmanager
def _group(controller: str, pid: int) -> Iterator[Path]:
    """A control group of its own for ``pid``, which goes back where it was."""
    root = _root(controller)
    assert root is not None
    group = root / f"blame-real-{pid}"
    before = "/"
    for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
        number, controllers, path = line.split(":", 2)
        if controller in controllers.split(",") or (number == "0" and root == GROUPS):
            before = path
    group.mkdir()
    try:
        (group / "cgroup.procs").write_text(str(pid))
        yield group
    finally:
        with suppress(OSError):
            (root / before.lstrip("/") / "cgroup.procs").write_text(str(pid))
        with suppress(OSError):
            group.rmdir()


def _root(controller: str) -> Path | None:
    """Where groups with this controller can be made, of version 1 or 2."""
    if (GROUPS / controller / "cgroup.procs").exists():
        return GROUPS / controller
    offered = GROUPS / "cgroup.subtree_control"
    name = {"blkio": "io"}.get(controller, controller)
    return GROUPS if offered.exists() and name in offered.read_text().split() else None


@contextmanager
def flagged(target: Target) -> Iterator[None]:
    """The thread within the rank is told to begin, and to end."""
    target.flag.touch()
    try:
        yield
    finally:
        target.flag.unlink(missing_ok=True)


@contextmanager
def throttled(target: Target) -> Iterator[None]:
    """What the rank sends and what it receives goes through a token bucket each."""
    rank, *hub = target.spaces[target.rank], target.spaces[-1]
    ends = [(rank, "eth0"), (hub[0], f"p{target.rank}")]
    for space, device in ends:
        _tc(space, f"qdisc add dev {device} root tbf {RATE}")
    try:
        yield
    finally:
        for space, device in ends:
            with suppress(subprocess.CalledProcessError):
                _tc(space, f"qdisc del dev {device} root")


def _tc(space: str, what: str) -> None:
    subprocess.run(["ip", "netns", "exec", space, "tc", *what.split()], check=True, stderr=subprocess.PIPE)


@contextmanager
def nothing(target: Target) -> Iterator[None]:
    yield


@contextmanager
def network(ranks: int) -> Iterator[list[str]]:
    """A namespace a rank, ``eth0`` at 10.77.0.(rank + 1), and behind them the bridge that joins them (``p0``, ...)."""
    names = [f"blame-{os.getpid()}-{rank}" for rank in range(ranks)] + [f"blame-{os.getpid()}-hub"]
    hub = names[-1]

    def ip(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True, stderr=subprocess.PIPE)

    with ExitStack() as stack:
        for name in names:
            ip("netns", "add", name)
            stack.callback(subprocess.run, ["ip", "netns", "del", name], check=False)
            ip("-n", name, "link", "set", "lo", "up")
        ip("-n", hub, "link", "add", "br0", "type", "bridge")
        ip("-n", hub, "link", "set", "br0", "up")
        for rank, name in enumerate(names[:-1]):
            port = f"p{rank}"
            ip("-n", hub, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", name)
            ip("-n", hub, "link", "set", port, "master", "br0", "up")
            ip("-n", name, "addr", "add", f"10.77.0.{rank + 1}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
        yield names


FAULTS: dict[str, tuple[Fault, tuple[str, ...]]] = {
    "stopped 10%": (stopped(0.10), ("stopped",)),
    "stopped 20%": (stopped(0.20), ("stopped",)),
    "stopped 35%": (stopped(0.35), ("stopped",)),
    "quota": (quota, ("cpu_quota",)),
    "hog": (hogged, ("cpu_contention",)),
    "pages": (flagged, ("page_faults",)),
    "objects": (flagged, ("host_lock", "gc")),
    "link": (throttled, ("link",)),
    "data": (starved, ("data",)),
    "none": (nothing, ()),
}
"""What does it, and the causes that are right; one that makes objects holds the interpreter, and has them collected."""


def why_not(fault: str) -> str:
    """Why this machine cannot have ``fault``; empty where it can."""
    needs = {"quota": "cpu", "data": "blkio"}
    if fault in needs and ((root := _root(needs[fault])) is None or not os.access(root, os.W_OK)):
        return f"no control group for {needs[fault]} may be made here"
    if fault == "link":
        if os.geteuid() != 0:
            return "network namespaces need root"
        made = subprocess.run(
            ["unshare", "-n", "tc", *f"qdisc add dev lo root tbf {RATE}".split()], capture_output=True
        )
        if made.returncode:
            return f"no token bucket here: {made.stderr.decode().strip()[:100]}"
    return ""
