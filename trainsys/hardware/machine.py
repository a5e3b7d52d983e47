"""What this machine offers to ranks, found without importing torch."""

from __future__ import annotations

import os
import re
from pathlib import Path


def usable_cores() -> int:
    """CPU cores this process may use: its affinity, within the container's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        limit = cores if quota == "max" else int(quota) // int(period)
    except (OSError, ValueError):
        limit = cores
    return max(1, min(cores, limit))


def cuda_devices() -> int:
    """CUDA devices that processes started from here will see."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        listed = [name.strip() for name in visible.split(",")]
        # CUDA takes the devices before the first invalid one: "-1" and "" hide all.
        return next((n for n, name in enumerate(listed) if name in ("", "-1")), len(listed))
    folder = Path("/dev")
    return sum(1 for node in folder.glob("nvidia*") if re.fullmatch(r"nvidia\d+", node.name))
