"""The terminal: a live bar with the numbers under it, or plain lines where the output is not a terminal."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from trainsys.telemetry import text as say
from trainsys.telemetry.events import Finding
from trainsys.telemetry.metrics import GIB
from trainsys.telemetry.sinks.base import RunInfo

PLAIN_EVERY_S = 2.0
"""Plain lines come no denser than this; the first and the last step always get one."""
REFRESH = 2
"""A second: drawing takes the interpreter for a millisecond."""
MILESTONES = 10
"""Lines that a live run leaves behind above its bar, so that the history stays readable."""
SPARK = "▁▂▃▄▅▆▇█"
SPARK_WIDTH = 24


class ConsoleSink:
    """``mode`` live, plain, or auto: live on a terminal.

    Arguments:
        log_every: a plain line at most every so many steps.
        clock: seconds; injected by tests.
    """

    name = "console"

    def __init__(
        self,
        mode: Literal["auto", "live", "plain"] = "auto",
        log_every: int = 1,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = console or Console(highlight=False)
        self._live_wanted = mode == "live" or (mode == "auto" and self._console.is_terminal)
        self._fancy = self._console.is_terminal and self._console.encoding.startswith("utf")
        self._log_every = log_every
        self._clock = clock
        self._live: Live | None = None
        self._info: RunInfo | None = None
        self._began = self._last_line = -math.inf
        self._step = -1
        self._printed = -1
        self._milestone = 1
        self._metrics: Mapping[str, float] = {}
        self._losses = _Curve()
        self._pace: float | None = None

    def start(self, info: RunInfo) -> None:
        self._info = info
        self._began = self._clock()
        self._step = self._printed = info.first_step - 1
        self._milestone = max(1, info.steps // MILESTONES)
        processes = f"{info.world} process{'es' * (info.world > 1)}"
        facts = [f for f in (info.model, info.layout, processes, info.hardware) if f]
        about = "  ·  ".join(facts)
        if not self._fancy:
            about = say.ascii_only(about)
        self._console.print(Text.assemble((info.name, "bold cyan"), "  ", (about, "dim")), soft_wrap=True)
        self._console.print(Text.assemble(("run folder  ", "dim"), str(info.run_dir)), soft_wrap=True)
        if self._live_wanted:
            self._live = Live(
                get_renderable=self._render, console=self._console, refresh_per_second=REFRESH, transient=True
            )
            self._live.start()

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        assert self._info is not None
        self._step, self._metrics = step, metrics
        if (loss := metrics.get("train/loss")) is not None:
            self._losses.add(loss)
        seconds = metrics.get("perf/step_time_s", 0.0) + metrics.get("time/stalls_s", 0.0)
        # A running mean over about 20 steps: the ETA follows a change of pace, not a single slow step.
        self._pace = seconds if self._pace is None else self._pace + (seconds - self._pace) / 20
        first = self._printed < self._info.first_step
        last = step == self._info.steps - 1
        now = self._clock()
        if self._live is None:
            due = step - self._printed >= self._log_every and now - self._last_line >= PLAIN_EVERY_S
        else:
            due = step // self._milestone > self._printed // self._milestone
        if first or last or due:
            self._print_line(now)

    def finding(self, finding: Finding) -> None:
        """It is said in a message."""

    def message(self, level: str, text: str) -> None:
        style = {"warning": "yellow", "error": "bold red"}.get(level, "dim")
        if not self._console.encoding.startswith("utf"):
            text = say.ascii_only(text)
        self._console.print(
            Text(text if level == "info" else f"{level}: {text}", style=style), soft_wrap=True
        )

    def finish(self, summary: Mapping[str, Any]) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
        if self._step > self._printed:
            self._print_line(self._clock())

    def _print_line(self, now: float) -> None:
        self._printed, self._last_line = self._step, now
        self._console.print(self._line(), soft_wrap=True)

    def _line(self) -> Text:
        """One step in words that need no legend."""
        assert self._info is not None
        width = len(str(self._info.steps))
        parts = [f"step {self._step + 1:>{width}}/{self._info.steps}"]
        parts += [f"{name} {value}" if name else value for name, value, _ in self._facts()]
        parts.append(f"eta {self._eta()}")
        return Text("  ".join(parts))

    def _facts(self) -> list[tuple[str, str, str]]:
        """(name, value, style) of what is shown, in order. Widths are steady, so lines align."""
        m, facts = self._metrics, []
        if (loss := m.get("train/loss")) is not None:
            facts.append(("loss", f"{loss:.4f}", "bold green" if math.isfinite(loss) else "bold red"))
        if (speed := m.get("perf/tokens_per_s")) is not None:
            facts.append(("", f"{say.count(speed):>6} tok/s", "cyan"))
        if (seconds := m.get("perf/step_time_s")) is not None:
            facts.append(("", f"{say.duration(seconds):>7}/step", ""))
        facts.append(("mfu", self._mfu(), "bold magenta"))
        memory = max(m.get("memory/peak_gib", 0.0), m.get("memory/rss_gib", 0.0))
        if memory:
            facts.append(("mem", say.size(memory * GIB), "yellow"))
        return facts

    def _mfu(self) -> str:
        assert self._info is not None
        mfu = self._metrics.get("perf/mfu")
        if mfu is None:
            return "n/a (no known peak)"
        # More is a peak that was measured too low: how much more says nothing. The report at the end settles it.
        shown = f"{100 * mfu:.1f}%" if mfu <= 1.0 else ">100%"
        return shown + (f" (of {self._info.peak_label})" if self._info.peak_label else "")

    def _eta(self) -> str:
        assert self._info is not None
        if self._pace is None:
            return "?"
        return _clock_time(self._pace * (self._info.steps - 1 - self._step))

    def _render(self) -> RenderableType:
        """What stays at the foot of the terminal while training: bar, numbers, curve."""
        assert self._info is not None
        done, total = self._step + 1, self._info.steps
        bar = Table.grid(padding=(0, 1), expand=True)
        bar.add_column(no_wrap=True)
        bar.add_column(ratio=1)
        bar.add_column(no_wrap=True, justify="right")
        bar.add_row(
            Text.assemble(("step ", "dim"), (f"{done:,}", "bold"), (f" / {total:,}", "dim")),
            ProgressBar(total=total, completed=max(done, 0), complete_style="cyan", finished_style="green"),
            Text.assemble(
                (f"{100 * done / total:3.0f}%", "bold"),
                (f"  {_clock_time(self._clock() - self._began)} passed, ", "dim"),
                (self._eta() if done > self._info.first_step else "?", "bold"),
                (" to go", "dim"),
            ),
        )
        if not self._metrics:
            return Group(bar, Text("first step under way ...", style="dim"))
        numbers = Text()
        for name, value, style in self._facts():
            numbers.append("   " if numbers else "")
            if name:
                numbers.append(f"{name} ", style="dim")
            numbers.append(value.strip(), style=style)
        if self._fancy and (curve := self._losses.spark()):
            numbers.append(f"   {curve}", style="green")
        numbers.no_wrap, numbers.overflow = True, "crop"
        return Group(bar, numbers)


class _Curve:
    """A loss curve in at most ``2 * SPARK_WIDTH`` numbers, however long the run: neighbours merge as it
    grows."""

    def __init__(self) -> None:
        self._points: list[float] = []
        self._stride = 1
        self._sum, self._n = 0.0, 0

    def add(self, value: float) -> None:
        if not math.isfinite(value):
            return
        self._sum += value
        self._n += 1
        if self._n < self._stride:
            return
        self._points.append(self._sum / self._n)
        self._sum, self._n = 0.0, 0
        if len(self._points) == 2 * SPARK_WIDTH:
            pairs = zip(self._points[::2], self._points[1::2], strict=True)
            self._points = [(a + b) / 2 for a, b in pairs]
            self._stride *= 2

    def spark(self) -> str:
        """The curve in block characters; empty until there are two points."""
        points = self._points[:: 1 + (len(self._points) > SPARK_WIDTH)]
        if len(points) < 2:
            return ""
        low, high = min(points), max(points)
        scale = (len(SPARK) - 1) / (high - low) if high > low else 0.0
        return "".join(SPARK[round((p - low) * scale)] for p in points)


def _clock_time(seconds: float) -> str:
    """``0:07``, ``12:34``, ``3:05:09``."""
    s = max(0, round(seconds))
    return f"{s // 3600}:{s % 3600 // 60:02d}:{s % 60:02d}" if s >= 3600 else f"{s // 60}:{s % 60:02d}"
