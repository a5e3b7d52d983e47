"""How often a job was started before, as torchrun, Slurm and a JobSet tell it."""

from __future__ import annotations

import pytest

from trainsys.resilience.session import attempt


@pytest.mark.parametrize(
    ("environment", "count"),
    [
        ({}, 0),
        ({"TORCHELASTIC_RESTART_COUNT": "2"}, 2),
        ({"SLURM_RESTART_COUNT": "3", "TORCHELASTIC_RESTART_COUNT": "1"}, 4),
        ({"PET_RDZV_ID": "2", "JOB_COMPLETION_INDEX": "0"}, 2),
        ({"PET_RDZV_ID": "2", "JOB_COMPLETION_INDEX": "0", "TORCHELASTIC_RESTART_COUNT": "1"}, 3),
        ({"PET_RDZV_ID": "4711"}, 0),
        ({"PET_RDZV_ID": "my-run", "JOB_COMPLETION_INDEX": "0"}, 0),
    ],
)
def test_restarts_of_every_launcher_count(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], count: int
) -> None:
    for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT", "PET_RDZV_ID", "JOB_COMPLETION_INDEX"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert attempt() == count
