"""What this machine offers to ranks, found without importing torch."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath


def usable_cores() -> int:
    """CPU cores this process may use: its affinity, within the container's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        limit = cores if quota == "max" else int(quota) // int(period)
    except (OSError, ValueError):
        limit = cores
    return max(1, min(cores, limit))


def free_memory(root: Path = Path("/")) -> int | None:
    """Bytes of host memory that may still be taken: what the system calls available, within the limits of the control
    groups that this process is in (Slurm's, a container's). None where the system does not tell."""
    free = []
    with suppress(OSError, ValueError, StopIteration):
        lines = (root / "proc/meminfo").read_text(encoding="ascii").splitlines()
        free.append(1024 * int(next(line.split()[1] for line in lines if line.startswith("MemAvailable:"))))
    with suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "":
                free += _group_free(root / "sys/fs/cgroup", path, "memory.max", "memory.current", "inactive_file")
            elif "memory" in controllers.split(","):
                names = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
                free += _group_free(root / "sys/fs/cgroup/memory", path, *names)
    return max(0, min(free)) if free else None


def _group_free(top: Path, path: str, limit: str, usage: str, cache: str) -> Iterator[int]:
    """What the group at ``path`` and each above it leave; files that the kernel would drop are free."""
    inside = PurePosixPath(path.strip("/"))
    for folder in (top / inside, *(top / above for above in inside.parents)):
        with suppress(OSError, ValueError):
            most, used = (int((folder / name).read_text(encoding="ascii")) for name in (limit, usage))
            stat = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines())
            yield most - used + int(stat.get(cache, 0))


def cuda_devices() -> int:
    """CUDA devices that processes started from here will see."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        listed = [name.strip() for name in visible.split(",")]
        # CUDA takes the devices before the first invalid one: "-1" and "" hide all.
        return next((n for n, name in enumerate(listed) if name in ("", "-1")), len(listed))
    folder = Path("/dev")
    return sum(1 for node in folder.glob("nvidia*") if re.fullmatch(r"nvidia\d+", node.name))
