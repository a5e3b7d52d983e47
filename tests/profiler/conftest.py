"""Where the shared recordings are, and synthetic jobs common to several tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainsys.profiler.trace.synthetic import Job, Timeline, write_job

SHARED = Path(__file__).resolve().parents[2] / "../shared/data/traces"


@pytest.fixture(scope="session")
def shared() -> Path:
    if not SHARED.is_dir():
        pytest.skip("../shared/data/traces is not here: recorded traces are needed")
    return SHARED


@pytest.fixture(scope="session")
def slow_job(tmp_path_factory: pytest.TempPathFactory) -> tuple[Job, Timeline, Path]:
    """Four ranks on two hosts whose clocks differ by 5 ms; rank 2 is 10% slow."""
    job = Job(ranks=4, steps=6, slow={2: 1.1}, clock_ns={1: 5_000_000}, ranks_per_host=2, fill=2, noise=0.01)
    folder = tmp_path_factory.mktemp("slow_job")
    return job, write_job(job, folder), folder
