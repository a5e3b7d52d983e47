"""Timelines of runs and traces: who is shown first, where spans lie, what is thinned; the pages that draw them."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import numpy as np
import pytest

from support.browser import probe
from trainsys.profiler.explain import Explanation, explain
from trainsys.profiler.page import MAX_BYTES
from trainsys.profiler.page import page as run_page
from trainsys.profiler.timeline import Lane, lanes_shown, slowest_and_typical
from trainsys.profiler.trace.health import Finding
from trainsys.profiler.trace.lanes import Busy, thinned, timeline_of
from trainsys.profiler.trace.main import analyse
from trainsys.profiler.trace.optimeline import TimelineReport
from trainsys.profiler.trace.page import page as trace_page
from trainsys.profiler.trace.report import Report
from trainsys.profiler.trace.synthetic import Job, Timeline
from trainsys.telemetry.events import Event, RunEnd, RunStart, Step
from trainsys.telemetry.reader import event_file
from trainsys.telemetry.writer import EventWriter

SLOW, LATE_STEP, NAN_STEP = 2, 30, 12
SKEW_S = 0.25


def spans(lane: Lane, which: int = 0) -> list[tuple[int, int, int]]:
    """(start, end, kind) of a track, in ticks."""
    out, at = [], 0
    for gap, length, kind in zip(*[iter(lane.tracks[which])] * 3, strict=True):
        out.append((at + gap, at + gap + length, kind))
        at += gap + length
    return out


def write_run(folder: Path, steps: int = 40) -> Path:
    """Four ranks on two hosts, the second host's clock ahead; rank ``SLOW`` is late in every step, all end together."""
    rng = np.random.default_rng(0)
    work = 0.1 * (1 + 0.01 * rng.random((steps, 4))) * np.where(np.arange(4) == SLOW, 1.3, 1.0)
    work[LATE_STEP] *= 3
    for rank in range(4):
        at = 1000.0 + SKEW_S * (rank // 2)
        events: list[Event] = [
            RunStart(run_id="r", rank=rank, world=4, t0_wall=at, t0_mono=0.0, name="r", hostname=f"n{rank // 2}",
                     layout={"pp": 1, "dp_replicate": 1, "dp_shard": 4, "cp": 1, "tp": 1, "ep": 1})
        ]  # fmt: skip
        for n in range(steps):
            own, late = float(work[n, rank]), float(work[n].max())
            phases = {"forward": own / 3, "backward": 2 * own / 3, "comm/fsdp": late - own + 0.01}
            loss = math.nan if n == NAN_STEP else 4.0 - 0.05 * n
            events.append(
                Step(step=n, start_s=at, step_time_s=sum(phases.values()), phases=phases, loss=loss,
                     nonfinite={"loss": "nan"} if n == NAN_STEP else {})
            )  # fmt: skip
            at += sum(phases.values())
        writer = EventWriter(event_file(folder, rank))
        for event in [*events, RunEnd(status="done", time_s=at, step=steps - 1)]:
            writer.put(event)
        writer.close()
    return folder


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Explanation:
    return explain(write_run(tmp_path_factory.mktemp("run")))


# ---- who is shown --------------------------------------------------------------------------------


def test_the_slowest_is_first_then_the_one_at_the_median_then_all_in_order() -> None:
    assert slowest_and_typical([3.0, 1.0, 9.0, math.nan, 2.0]) == (2, 0)
    assert lanes_shown([3.0, 1.0, 9.0, math.nan, 2.0]) == [2, 0, 1, 3, 4]
    assert lanes_shown([5.0]) == [0]
    assert lanes_shown([]) == []
    assert lanes_shown([math.nan, math.nan]) == [0, 1]


def test_of_many_ranks_the_slow_ones_are_kept() -> None:
    slowness = [float(i % 100) for i in range(1000)]
    shown = lanes_shown(slowness, 64)
    assert len(shown) == len(set(shown)) == 64
    assert shown[0] == 99
    assert shown[2:] == sorted(shown[2:])
    assert sum(slowness[i] >= 90 for i in shown) >= 31


# ---- of a run ------------------------------------------------------------------------------------


def test_a_runs_ranks_are_on_one_axis_whatever_their_clocks(told: Explanation) -> None:
    typical, about = told.timelines
    assert [(lane.rank, lane.note) for lane in typical.lanes][:1] == [(SLOW, "slowest")]
    assert typical.lanes[1].note == "typical"
    assert {lane.rank for lane in typical.lanes} == set(range(4))
    assert f", {LATE_STEP}" in about.title
    assert LATE_STEP not in [n for n, _ in typical.steps]
    for line in told.timelines:
        last = line.kinds.index("comm/fsdp")
        for lane in line.lanes:
            ends = [end for _, end, kind in spans(lane) if kind == last]
            assert ends == pytest.approx([at for _, at in line.steps], abs=5)
            assert max(ends) <= line.length
    assert any("clocks are set" in note for note in typical.notes)
    number, end = typical.steps[-1]
    before = dict(typical.steps)[number - 1]
    slow = {typical.kinds[k]: (b - a) * typical.tick_s for a, b, k in spans(typical.lanes[0]) if before <= a < end}
    assert slow["forward"] == pytest.approx(0.13 / 3, rel=0.02)
    assert slow["comm/fsdp"] == pytest.approx(0.01, abs=1e-5)


def test_the_loss_is_binned_and_what_is_not_finite_is_told(told: Explanation, tmp_path: Path) -> None:
    loss = told.loss
    assert loss is not None
    assert loss.not_finite == [NAN_STEP]
    assert NAN_STEP not in loss.steps
    assert loss.mean[:2] == [4.0, 3.95]
    long = explain(write_run(tmp_path, 1500)).loss
    assert long is not None
    assert len(long.steps) <= 600
    assert long.per_bin == 3
    assert long.mean[1] == pytest.approx(np.mean([4.0 - 0.05 * n for n in (3, 4, 5)]))
    assert (long.low[1], long.high[1]) == (pytest.approx(3.75), pytest.approx(3.85))


# ---- of a trace ----------------------------------------------------------------------------------


def test_a_traces_ranks_are_on_one_axis_and_lose_no_time(slow_job: tuple[Job, Timeline, Path]) -> None:
    report = analyse([slow_job[2]], timeline=True, critical=False)
    line = report.timeline
    assert line is not None
    assert (line.lanes[0].rank, line.lanes[0].note) == (2, "slowest")
    tick_ns = line.tick_s * 1e9
    for lane in line.lanes:
        whole = next(r for r in report.ranks if r.rank == lane.rank).breakdown.whole  # type: ignore[union-attr]
        took: dict[str, int] = {}
        for which in (0, 1):
            for a, b, kind in spans(lane, which):
                took[line.kinds[kind]] = took.get(line.kinds[kind], 0) + b - a
        n = len(lane.tracks[0]) + len(lane.tracks[1])
        assert took["matmul"] * tick_ns == pytest.approx(whole.matmul, abs=n * tick_ns)
        assert took["communication"] * tick_ns == pytest.approx(whole.comm, abs=n * tick_ns)
    # Nobody leaves a collective early: with clocks aligned (rank 1's is 5 ms ahead) the ends are one.
    ends = [[b for _, b, kind in spans(lane, 1) if line.kinds[kind] == "communication"] for lane in line.lanes]
    for other in ends[1:]:
        assert np.array(other) == pytest.approx(np.array(ends[0]), abs=20_000 / tick_ns)
    assert analyse([slow_job[2]], critical=False).timeline is None


def test_what_is_too_fine_keeps_what_took_most() -> None:
    # Kernels of 9 with gaps of 1, then of 1 with gaps of 9: mostly busy, then mostly idle.
    starts = np.arange(0, 20_000, 10)
    ends = starts + np.where(starts < 10_000, 9, 1)
    busy = Busy(0, 20_000, [(starts, ends, np.zeros(starts.size, int))])
    assert thinned(busy, 2000) is busy
    few = thinned(busy, 100)
    assert few.step_ns == 200
    assert [a.tolist() for a in few.tracks[0]] == [[0], [10_000], [0]]


def test_64_ranks_of_many_kernels_fit_on_a_page() -> None:
    rng = np.random.default_rng(0)

    def capture(rank: int) -> SimpleNamespace:
        edges = np.cumsum(rng.integers(1_000, 40_000, 10_000))
        tracks = [(edges[:-1:2], edges[1::2], rng.integers(0, 2, 5_000)), (edges[:-1:2], edges[1::2], np.full(5_000, 2))]
        report = SimpleNamespace(rank=rank, window=0, host="a", breakdown=None)
        return SimpleNamespace(report=report, busy=Busy(int(edges[0]), int(edges[-1]), tracks))

    line = timeline_of(Report(), cast(Any, [capture(r) for r in range(64)]))
    assert line is not None
    assert len(line.lanes) == 64
    size = len(msgspec.json.encode(line))
    assert size < 0.6 * MAX_BYTES
    assert len(line.lanes[0].tracks[0]) == 3 * 5_000
    assert any("only what took most" in note for note in line.notes)


# ---- drawn ---------------------------------------------------------------------------------------

ZOOM = """
const cv = document.querySelector("canvas.timeline");
const all = (what) => [...document.querySelectorAll(what)], words = (what) => all(what).map((n) => n.textContent);
const view = () => document.querySelector(".timeline-view").textContent;
const key = (k) => cv.dispatchEvent(new KeyboardEvent("keydown", { key: k, bubbles: true, cancelable: true }));
const at = (kind, x) => {
  const box = cv.getBoundingClientRect(), where = { clientX: box.left + x, clientY: box.top + 45 };
  cv.dispatchEvent(new PointerEvent(kind, { ...where, bubbles: true, pointerId: 1 }));
};
cv.setPointerCapture = () => {};
const found = { all: view() };
key("+"); found.nearer = view();
key("ArrowRight"); found.later = view();
at("pointerdown", 500); at("pointermove", 700); at("pointerup", 700); found.dragged = view();
cv.focus();
cv.dispatchEvent(new WheelEvent("wheel", { deltaY: -200, bubbles: true, cancelable: true })); found.wheel = view();
document.querySelector(".timeline-tools button[title='zoom out']").click(); found.out = view();
key("0"); found.again = view();
at("pointermove", 200); found.tip = document.getElementById("tip").textContent;
const g = cv.getContext("2d"), colours = new Set();
for (let x = 120; x < cv.width; x += 7) colours.add(g.getImageData(x, 40, 1, 1).data.join());
document.title = JSON.stringify({ ...found, colours: colours.size, errors: window.failures,
  sections: words("h2"), health: words(".health"), axes: words("svg text"),
  curve: all(".curve").length, lost: all(".lost").length,
  wide: document.documentElement.scrollWidth > innerWidth });
"""


def ends(text: str) -> list[float]:
    """Milliseconds of ``1.00 ms to 2.00 ms of 3.00 ms``."""
    units = {"s": 1e3, "ms": 1.0, "µs": 1e-3}
    words = text.split()
    return [float(words[i]) * units[words[i + 1]] for i in (0, 3, 6)]


def moves(seen: dict[str, Any]) -> None:
    assert seen["errors"] == []
    assert seen["wide"] is False
    first, last, whole = ends(seen["all"])
    assert (first, last) == (0, whole)

    def length(name: str) -> float:
        return ends(seen[name])[1] - ends(seen[name])[0]

    assert length("nearer") == pytest.approx(whole / 2, rel=0.02)
    assert ends(seen["later"])[0] == pytest.approx(ends(seen["nearer"])[0] + 0.1 * whole, rel=0.05)
    assert ends(seen["dragged"])[0] < ends(seen["later"])[0]
    assert length("dragged") == pytest.approx(length("later"), rel=0.02)
    assert length("wheel") < 0.7 * length("dragged")
    assert length("out") == pytest.approx(2 * length("wheel"), rel=0.05)
    assert seen["again"] == seen["all"]
    assert seen["colours"] >= 3


def test_a_runs_page_zooms_and_has_the_loss(told: Explanation, tmp_path: Path) -> None:
    text = run_page(told)
    assert len(text.encode()) < MAX_BYTES
    seen = probe(text, ZOOM, tmp_path)
    moves(seen)
    assert {"Timeline", "Loss"} <= set(seen["sections"])
    assert f"rank {SLOW}, slowest" in seen["tip"]
    assert {"loss", "step"} <= set(seen["axes"])
    assert (seen["curve"], seen["lost"]) == (1, 1)


def test_a_traces_page_zooms_and_has_its_health(slow_job: tuple[Job, Timeline, Path], tmp_path: Path) -> None:
    report = analyse([slow_job[2]], timeline=True)
    report.ranks[1].health.append(Finding("records dropped: 3 of 4 <b>launches</b>"))
    report.timelines = [TimelineReport("a", 4, 2, 1.0, 1.5, [(0, 1)], 0.9, 0.1, {"forward-compute": 1.4})]
    text = trace_page(report)
    assert len(text.encode()) < MAX_BYTES
    seen = probe(text, ZOOM, tmp_path, "dark")
    moves(seen)
    assert {"Timeline", "Trace health", "Op timeline"} <= set(seen["sections"])
    assert seen["health"] == ["rank 1: records dropped: 3 of 4 <b>launches</b>"]
    assert "rank 2, slowest" in seen["tip"]
