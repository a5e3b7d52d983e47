from __future__ import annotations

import os
from pathlib import Path

import pytest

from trainsys.hardware.machine import cuda_devices, free_memory, usable_cores


@pytest.mark.parametrize(
    ("visible", "count"),
    [("0,1,2", 3), ("", 0), ("-1", 0), ("0,-1,2", 1), ("GPU-8a56,MIG-1f", 2), ("3", 1)],
)
def test_cuda_visible_devices_is_obeyed(monkeypatch: pytest.MonkeyPatch, visible: str, count: int) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert cuda_devices() == count


def test_cores_respect_affinity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {4}, raising=False)
    assert usable_cores() == 1


GIB = 1 << 30


def _machine(root: Path, groups: str, files: dict[str, str], available: int | None = 32 * GIB) -> Path:
    (root / "proc/self").mkdir(parents=True)
    if available is not None:
        (root / "proc/meminfo").write_text(f"MemTotal: 1 kB\nMemAvailable: {available // 1024} kB\n")
    (root / "proc/self/cgroup").write_text(groups)
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_free_memory_is_what_is_available(tmp_path: Path) -> None:
    assert free_memory(_machine(tmp_path, "0::/\n", {})) == 32 * GIB


def test_free_memory_keeps_to_the_tightest_group(tmp_path: Path) -> None:
    files = {
        "slurm/memory.max": str(16 * GIB), "slurm/memory.current": str(6 * GIB), "slurm/memory.stat": "inactive_file 0\n",
        "slurm/job_3/memory.max": str(8 * GIB), "slurm/job_3/memory.current": str(7 * GIB),
        "slurm/job_3/memory.stat": f"anon 1\ninactive_file {2 * GIB}\n",
        "slurm/job_3/step/memory.max": "max\n", "slurm/job_3/step/memory.current": str(GIB),
    }  # fmt: skip
    assert free_memory(_machine(tmp_path, "0::/slurm/job_3/step\n", files)) == 3 * GIB


def test_free_memory_of_the_older_groups(tmp_path: Path) -> None:
    files = {
        "memory/job/memory.limit_in_bytes": str(4 * GIB), "memory/job/memory.usage_in_bytes": str(5 * GIB),
        "memory/job/memory.stat": "total_inactive_file 1024\n",
    }  # fmt: skip
    assert free_memory(_machine(tmp_path, "4:memory,hugetlb:/job\n0::/\n", files)) == 0


def test_free_memory_is_unknown_where_the_system_does_not_tell(tmp_path: Path) -> None:
    assert free_memory(_machine(tmp_path, "", {}, available=None)) is None
