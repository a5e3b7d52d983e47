"""What the system says of a rank's thread and process: on a CPU, waiting for one, kept from it, served pages.

All of it is counted by the kernel from the process's start, so reading it now and then loses nothing. A reading takes
some ten microseconds; what the system does not tell stays 0.
"""

from __future__ import annotations

import os
import re
import resource
import time
from pathlib import Path

from trainsys.telemetry.events import HostTime

GROUP_EVERY = 10
"""Readings between two looks for the process's control group, which another process may change."""


class HostTimes:
    """``read`` is for the thread that makes this: the one that runs the step."""

    def __init__(self, proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> None:
        self._proc, self._groups = proc, groups
        self._pid, self._delay = -1, -1
        self._stat = -1
        self._reads = 0

    def read(self) -> HostTime:
        """Seconds to the millisecond, and counts, since the process began."""
        if self._pid != os.getpid():  # the first time, and after a fork: the descriptors tell of the parent
            self._pid = os.getpid()
            self._delay, self._stat, self._reads = _open(self._proc / "thread-self/schedstat"), -1, 0
        if self._reads % GROUP_EVERY == 0:
            if self._stat >= 0:
                os.close(self._stat)
            self._stat = _open(cpu_stat(self._proc, self._groups))
        self._reads += 1
        cpu = time.thread_time()
        used = resource.getrusage(resource.RUSAGE_SELF)
        waited = _read(self._delay).split()
        throttled = re.search(rb"^throttled_(usec|time) (\d+)", _read(self._stat), re.M)
        scale = {b"usec": 1e6, b"time": 1e9}
        return HostTime(
            cpu_s=round(cpu, 3),
            wait_s=round(int(waited[1]) / 1e9, 3) if len(waited) > 1 else 0.0,
            others_s=round(max(0.0, used.ru_utime + used.ru_stime - cpu), 3),
            throttled_s=round(int(throttled[2]) / scale[throttled[1]], 3) if throttled else 0.0,
            faults=used.ru_minflt,
            major_faults=used.ru_majflt,
        )


def cpu_stat(proc: Path, groups: Path) -> Path | None:
    """The ``cpu.stat`` of this process's control group, of either version; None where there is none."""
    try:
        lines = (proc / "self/cgroup").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if "cpu" in controllers.split(","):
            mounts = [controllers, "cpu"]
        else:
            mounts = [] if controllers else [""]  # version 2 names none
        for mount in mounts:
            found = groups / mount / path.lstrip("/") / "cpu.stat"
            if found.exists():
                return found
    return None


def _open(path: Path | None) -> int:
    try:
        return -1 if path is None else os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return -1


def _read(descriptor: int) -> bytes:
    try:
        return b"" if descriptor < 0 else os.pread(descriptor, 4096, 0)
    except OSError:
        return b""
