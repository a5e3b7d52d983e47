"""A hang is put down to the rank that is missing, and to its node where that is sure."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from trainsys.failure import FAILURE_FILE, Failure, read_failure
from trainsys.resilience.hung import blame, missing


@dataclass
class State:
    doing: str


WAITS, IDLE = State("all_reduce on fsdp"), State("")
HOSTS = ["n0", "n0", "n1", "n1"]


@pytest.mark.parametrize(
    ("states", "ranks", "host"),
    [
        ({0: WAITS, 1: WAITS, 3: WAITS}, [2], "n1"),
        ({0: WAITS, 1: WAITS}, [2, 3], "n1"),
        ({0: WAITS, 3: WAITS}, [1, 2], ""),  # a switch rather than a node
        ({0: WAITS, 1: IDLE, 2: WAITS, 3: WAITS}, [1], "n0"),
        ({0: WAITS, 1: IDLE, 2: WAITS}, [3], "n1"),
        (dict.fromkeys(range(4), WAITS), [], None),
        (dict.fromkeys(range(4), IDLE), [], None),  # all of them compute
    ],
)
def test_the_missing_rank_is_the_failure(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    states: dict[int, State],
    ranks: list[int],
    host: str | None,
) -> None:
    report = tmp_path / "failure.json"
    monkeypatch.setenv(FAILURE_FILE, str(report))
    assert missing(states, 4) == ranks
    blame(70, "hang: it hangs", states, 4, HOSTS)
    expected = None if host is None else Failure(ranks[0], 70, "hang: it hangs", host)
    assert read_failure(report) == expected


def test_without_a_launcher_or_hosts_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (FAILURE_FILE, "TORCHELASTIC_ERROR_FILE"):
        monkeypatch.delenv(name, raising=False)
    blame(70, "hang", {0: WAITS}, 2, HOSTS)
    monkeypatch.setenv(FAILURE_FILE, str(tmp_path / "f"))
    blame(70, "hang", {0: WAITS}, 2, [])
    assert read_failure(tmp_path / "f") == Failure(1, 70, "hang", "")
