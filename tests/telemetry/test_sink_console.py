"""What a person sees while training."""

import io
import math
from pathlib import Path

from rich.console import Console

from trainsys.telemetry.sinks.base import RunInfo
from trainsys.telemetry.sinks.console import PLAIN_EVERY_S, SPARK_WIDTH, ConsoleSink, _clock_time, _Curve

METRICS = {
    "train/loss": 2.5,
    "perf/tokens_per_s": 12345.6,
    "perf/step_time_s": 0.5,
    "perf/mfu": 0.412,
    "memory/peak_gib": 0.25,
    "memory/rss_gib": 0.305,
}


class Screen:
    """A console sink, its output and its clock."""

    def __init__(self, terminal: bool, log_every: int = 1, peak: str = "measured 92 GFLOP/s") -> None:
        self.file = io.StringIO()
        console = Console(
            file=self.file, force_terminal=terminal, width=100, highlight=False, color_system=None
        )
        self.now = 0.0
        self.sink = ConsoleSink("auto", log_every, console, clock=lambda: self.now)
        self.sink.start(
            RunInfo("demo", "r", Path("runs/x"), 300, 0, 4, "dp_shard=2 × tp=2", "tiny", "", peak)
        )

    def step(self, i: int, dt: float = 0.5, **change: float | None) -> None:
        self.now += dt
        metrics = {**METRICS, **{name.replace("__", "/"): v for name, v in change.items()}}
        self.sink.step(i, {name: v for name, v in metrics.items() if v is not None})

    @property
    def lines(self) -> list[str]:
        return self.file.getvalue().splitlines()


def test_a_plain_line_needs_no_legend() -> None:
    screen = Screen(terminal=False)
    screen.step(0)
    assert screen.lines == [
        "demo  tiny  |  dp_shard=2 x tp=2  |  4 processes",
        "run folder  runs/x",
        "step   1/300  loss 2.5000  12,346 tok/s   500 ms/step  mfu 41.2% (of measured 92 GFLOP/s)"
        "  mem 312 MiB  eta 2:30",
    ]
    assert screen.file.getvalue().isascii()


def test_no_line_quotes_more_than_the_peak() -> None:
    screen = Screen(terminal=False)
    screen.step(0, perf__mfu=1.386)
    screen.step(299, dt=10.0, perf__mfu=1.0)
    assert "mfu >100% (of measured 92 GFLOP/s)" in screen.lines[2]
    assert "mfu 100.0% (of" in screen.lines[3]


def test_plain_lines_come_in_sensible_intervals() -> None:
    screen = Screen(terminal=False)
    for i in range(300):
        screen.step(i, dt=0.1)
    shown = [int(line.split()[1].partition("/")[0]) for line in screen.lines[2:]]
    assert shown[0] == 1
    assert shown[-1] == 300
    assert len(shown) <= 300 * 0.1 / PLAIN_EVERY_S + 2
    every = Screen(terminal=False, log_every=50)
    for i in range(300):
        every.step(i, dt=100.0)
    assert len(every.lines) - 2 == 7
    every.sink.finish({})
    assert len(every.lines) - 2 == 7  # the last step has its line already


def test_an_interrupted_run_shows_its_last_step() -> None:
    screen = Screen(terminal=False)
    screen.step(0)
    screen.step(1, dt=0.001)
    assert "2/300" not in screen.lines[-1]
    screen.sink.finish({})
    assert "2/300" in screen.lines[-1]


def test_no_peak_no_mfu() -> None:
    screen = Screen(terminal=False, peak="")
    screen.step(0, perf__mfu=None)
    assert "mfu n/a (no known peak)" in screen.lines[-1]
    screen.step(1, dt=9, train__loss=math.nan)
    assert "loss nan" in screen.lines[-1]


def test_a_terminal_gets_a_bar_and_its_milestones() -> None:
    screen = Screen(terminal=True)
    for i in range(150):
        screen.step(i, train__loss=5.0 - i / 50)
    out = io.StringIO()
    Console(file=out, force_terminal=True, width=100, color_system=None).print(screen.sink._render())
    bar, numbers = out.getvalue().splitlines()
    assert bar.startswith("step 150 / 300 ")
    assert "50%  1:15 passed, 1:15 to go" in bar
    assert "mfu 41.2% (of measured 92 GFLOP/s)" in numbers
    assert len(numbers) <= 100
    screen.sink.message("warning", "mind the gap")
    screen.sink.finish({})
    text = screen.file.getvalue()
    assert "warning: mind the gap" in text
    assert [f"step {n:>3}/300" in text for n in (1, 31, 61, 91, 121, 150)] == [True] * 6
    assert "step   2/300" not in text


def test_the_curve_stays_small_and_falls() -> None:
    curve = _Curve()
    curve.add(math.nan)
    assert curve.spark() == ""
    for i in range(10_000):
        curve.add(-float(i))
        assert len(curve._points) < 2 * SPARK_WIDTH
    spark = curve.spark()
    assert SPARK_WIDTH // 2 <= len(spark) <= SPARK_WIDTH
    assert (spark[0], spark[-1]) == ("█", "▁")
    assert list(spark) == sorted(spark, reverse=True)
    assert (
        spark[len(spark) // 2] in "▄▅"
    )  # an even fall is drawn evenly: old points weigh as much as new ones


def test_clock_time() -> None:
    assert [_clock_time(s) for s in (-1, 7, 754, 11109)] == ["0:00", "0:07", "12:34", "3:05:09"]
