"""The desk beside rank 0: it shows and judges in a process of its own, and its end is not the run's."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from trainsys.config.run import TelemetryConfig
from trainsys.layout import Layout
from trainsys.profiler.live import EVERY
from trainsys.profiler.verdict import Verdict
from trainsys.telemetry.events import Finding, Flops, Step
from trainsys.telemetry.sinks.base import RunInfo
from trainsys.telemetry.vectors import to_vector
from trainsys.train import desk_link
from trainsys.train.desk_link import Brief, DeskLink

pytestmark = [pytest.mark.timing, pytest.mark.timeout(120)]


class Heard:
    def __init__(self) -> None:
        self.messages: list[tuple[str, str]] = []
        self.verdicts: list[Verdict] = []
        self.at: list[int] = []

    def verdict(self, verdict: Verdict, finding: Finding) -> None:
        self.verdicts.append(verdict)
        self.at.append(finding.step)

    def message(self, level: str, text: str) -> None:
        self.messages.append((level, text))


@pytest.fixture
def heard() -> Heard:
    return Heard()


@pytest.fixture
def open_desk(tmp_path: Path, heard: Heard) -> Iterator[Callable[[], DeskLink]]:
    links: list[DeskLink] = []

    def make() -> DeskLink:
        brief = Brief(
            TelemetryConfig(console="plain"),
            RunInfo("demo", "r", tmp_path, 1000),
            Layout(dp_shard=4),
            1,
            1e9,
            0.0,
        )
        links.append(DeskLink(brief, heard.message, heard.verdict))
        return links[-1]

    yield make
    for link in links:
        if link._process is not None and link._process.poll() is None:
            link._process.kill()
            link._process.wait()


def window(number: int, slow: float = 1.0) -> tuple[np.ndarray, Step, int]:
    rng = np.random.default_rng(number)
    work = 0.1 * (1 + 0.01 * rng.normal(size=4)) * np.array([1, 1, slow, 1])
    steps = [
        Step(number, 0.0, work.max() + 0.01, {"forward": w, "comm/fsdp": work.max() - w + 0.01}, loss=2.0)
        for w in work.tolist()
    ]
    steps[0].flops = Flops(model=1e8, palm=None, hardware=1e8)
    return np.array([to_vector(s) for s in steps]), steps[0], 64 * (number + 1)


def lines(folder: Path) -> list[dict[str, float]]:
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def until(holds: Callable[[], object], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert holds()


def test_it_shows_judges_and_ends(
    tmp_path: Path, heard: Heard, open_desk: Callable[[], DeskLink], capfd: pytest.CaptureFixture[str]
) -> None:
    desk = open_desk()
    for number in range(3 * EVERY):
        desk.call("window", *window(number, slow=1.5))
    desk.message("info", "said by the rank")
    desk.settle()
    assert [(v.kind, v.ranks) for v in heard.verdicts] == [("rank", (2,))]
    assert heard.at == [3 * EVERY - 1]
    assert [level for level, text in heard.messages if "rank 2" in text] == ["warning"]
    desk.finish({"status": "done"}, timeout_s=20.0)
    assert [line["step"] for line in lines(tmp_path)] == list(range(3 * EVERY))
    assert lines(tmp_path)[-1]["train/tokens"] == 64 * 3 * EVERY
    out = capfd.readouterr().out
    assert "said by the rank" in out
    assert "warning: rank 2" in out
    assert f"step {3 * EVERY:>4}/1000" in out
    assert desk._process is not None
    assert desk._process.returncode == 0


def test_its_death_is_told_once_and_the_run_goes_on(
    tmp_path: Path, heard: Heard, open_desk: Callable[[], DeskLink], capfd: pytest.CaptureFixture[str]
) -> None:
    desk = open_desk()
    desk.call("window", *window(0))
    until(lambda: lines(tmp_path))
    assert desk._process is not None
    desk._process.kill()
    until(lambda: heard.messages)
    for number in range(1, 20):
        desk.call("window", *window(number))
    began = time.monotonic()
    desk.settle()
    desk.finish({}, timeout_s=20.0)
    assert time.monotonic() - began < 10
    assert len(lines(tmp_path)) == 1
    assert [text for _, text in heard.messages] == [
        "the process of console, W&B and live blame has ended; training goes on, and so do event files"
    ]
    assert capfd.readouterr().err.count("has ended") == 1


def test_one_that_hangs_keeps_nobody_waiting(
    heard: Heard, open_desk: Callable[[], DeskLink], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(desk_link, "DEPTH", 50)
    monkeypatch.setattr(desk_link, "EXIT_S", 0.5)
    desk = open_desk()
    assert desk._process is not None
    desk._process.send_signal(signal.SIGSTOP)
    longest = 0.0
    for number in range(20_000):
        made = window(number % 3)
        began = time.thread_time()
        desk.call("window", *made)
        longest = max(longest, time.thread_time() - began)
        if desk._dropped:
            break
    assert desk._dropped
    assert longest < 0.1
    began = time.monotonic()
    desk.settle(timeout_s=0.2)
    desk.finish({}, timeout_s=0.2)
    assert time.monotonic() - began < 10
    assert desk._process.returncode == -signal.SIGKILL


def test_one_that_cannot_start_is_told(
    heard: Heard, open_desk: Callable[[], DeskLink], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    desk = open_desk()
    desk.call("window", *window(0))
    desk.settle()
    desk.finish({}, timeout_s=1.0)
    ((level, text),) = heard.messages
    assert level == "warning"
    assert "did not start: [Errno 2]" in text


KILLED = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
from train.test_desk import Brief, DeskLink, Layout, RunInfo, TelemetryConfig, lines, until, window
folder = Path({folder!r})
brief = Brief(TelemetryConfig(console="plain"), RunInfo("demo", "r", folder, 9), Layout(dp_shard=4), 1, None, 0.0)
desk = DeskLink(brief, print, print)
print(desk._process.pid, flush=True)
for number in range(3):
    desk.call("window", *window(number))
until(lambda: len(lines(folder)) == 3)
time.sleep(60)
"""


def test_it_ends_with_a_killed_rank_and_not_at_a_signal(tmp_path: Path) -> None:
    script = KILLED.format(tests=str(Path(__file__).parents[1]), folder=str(tmp_path))
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as rank:
        assert rank.stdout is not None
        desk = int(rank.stdout.readline())
        until(lambda: len(lines(tmp_path)) == 3)
        for sig in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # as a terminal or scheduler sends to all
            os.kill(desk, sig)
        time.sleep(0.2)
        os.kill(desk, 0)
        rank.kill()
    until(lambda: not _alive(desk))


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
