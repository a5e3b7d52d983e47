"""``explain`` on whole runs and on what is left of dead ones; goodput, memory, advice; the page in a real browser."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from support.browser import probe
from support.made_run import as_lines
from trainsys import cli
from trainsys.config.loader import load_run as load_config_file
from trainsys.hardware import lookup
from trainsys.layout import Layout
from trainsys.planner.machine import from_device
from trainsys.planner.one import predict_run
from trainsys.profiler.advice import advise, to_fit
from trainsys.profiler.explain import Explanation, explain, to_json
from trainsys.profiler.flops_split import split_flops
from trainsys.profiler.goodput import account
from trainsys.profiler.memory import MemoryUse, memory_report, predict, would_have_fitted
from trainsys.profiler.page import MAX_BYTES, page
from trainsys.profiler.pipeline import PipelineStep
from trainsys.profiler.steps import make_table
from trainsys.profiler.waterfall import Work, waterfall
from trainsys.telemetry.events import Comm, Event, Flops, Memory, RunEnd, RunStart, Stall, Step
from trainsys.telemetry.reader import event_file
from trainsys.telemetry.records import gathered
from trainsys.telemetry.writer import EventWriter

GIB = 1 << 30


def start(rank: int = 0, **more: object) -> RunStart:
    fields: dict[str, object] = {
        "run_id": "made", "rank": rank, "world": 4, "t0_wall": 1000.0, "t0_mono": 0.0, "name": "made",
        "hostname": f"node{rank // 2}", "peak_flops": 1e9, "peak_label": "of a test", "dtype": "bf16", "steps": 40,
        "layout": {"pp": 1, "dp_replicate": 1, "dp_shard": 4, "cp": 1, "tp": 1, "ep": 1},
    }  # fmt: skip
    return RunStart(**{**fields, **more})  # type: ignore[arg-type]


def records(rank: int, steps: int = 40, slow: int | None = 2, skew_s: float = 0.0) -> list[Event]:
    rng = np.random.default_rng(rank)
    out: list[Event] = [
        start(rank, t0_wall=1000.0 + skew_s),
        Stall(kind="setup", start_s=1000.0 + skew_s, seconds=1.0),
    ]
    at = 1001.0 + skew_s
    for number in range(steps):
        work = 0.08 * (1 + 0.01 * rng.normal()) * (1.5 if rank == slow else 1.0)
        phases = {"data": 0.002, "forward": work * 0.3, "backward": work * 0.7, "optimizer": 0.003, "other": 0.001,
                  "comm/fsdp": 0.054 if rank != slow else 0.012}  # fmt: skip
        seconds = sum(phases.values())
        out.append(Step(step=number, start_s=at, step_time_s=seconds, phases=phases,
                        comm={"fsdp": {"all_gather": Comm(4, 1000, phases["comm/fsdp"])}}, tokens=100, loss=3.0,
                        memory=Memory(allocated=10 * GIB, reserved=31 * GIB, peak=30 * GIB, rss=GIB),
                        flops=Flops(model=1e8, palm=1e8, hardware=1e8)))  # fmt: skip
        at += seconds
    return [*out, RunEnd(status="done", time_s=at, step=steps - 1)]


def write(folder: Path, by_rank: dict[int, list[Event]]) -> Path:
    for rank, events in by_rank.items():
        writer = EventWriter(event_file(folder, rank))
        for event in events:
            writer.put(event)
        writer.close()
    return folder


@pytest.fixture
def made(tmp_path: Path) -> Path:
    return write(tmp_path / "run", {rank: records(rank) for rank in range(4)})


def test_a_whole_run(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    e = explain(made)
    assert e.missing == []
    assert e.waterfall is not None
    assert sum(t.seconds for t in e.waterfall.terms) == pytest.approx(e.waterfall.step_s, rel=1e-9)
    assert e.waterfall.mfu == pytest.approx(1e8 / 4e9 / e.waterfall.wall_s)
    assert [(v.kind, v.ranks, v.phase) for v in e.verdicts] == [("rank", (2,), "compute")]
    assert e.verdicts[0].cost_s == pytest.approx(0.04, rel=0.1)
    assert e.heat is not None
    assert e.heat.values[2][0] == pytest.approx(0.5, rel=0.2)
    assert cli.main(["explain", str(made)]) == 0
    text = capsys.readouterr().out
    for word in (
        "Where the time goes",
        "rank 2 on node1 computes slowly",
        "mfu without it",
        "Goodput",
        "Memory",
    ):
        assert word in text


def test_waiting_for_now_one_rank_and_now_another_is_jitter(made: Path, tmp_path: Path) -> None:
    by_rank = {rank: records(rank, slow=None) for rank in range(4)}
    for rank, events in by_rank.items():
        for event in events:
            if isinstance(event, Step) and event.step % 4 == rank:
                event.phases["forward"] += 0.03
                event.phases["comm/fsdp"] -= 0.03
    e = explain(write(tmp_path / "even", by_rank))
    assert e.verdicts == []
    assert e.waterfall is not None
    assert {t.name: t.label for t in e.waterfall.terms}["straggler"] == "jitter (waiting)"
    assert e.over_time is not None
    assert e.over_time.labels["straggler"] == "jitter (waiting)", "one name on the page"
    (advice,) = [a.what for a in e.advice if "jitter" in a.what]
    assert "garbage collection" in advice
    late = explain(made)
    assert late.waterfall is not None
    assert {t.name: t.label for t in late.waterfall.terms}["straggler"] == "waiting for stragglers"
    assert any("the straggler: rank 2 on node1" in a.what for a in late.advice)


def test_json_is_the_same_tree(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["explain", str(made), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told == json.loads(to_json(explain(made)))
    assert told["schema"] == "trainsys.explain/1"


def test_a_killed_run_with_a_torn_record_and_a_missing_rank(made: Path) -> None:
    event_file(made, 3).unlink()
    torn = event_file(made, 1)
    as_lines(torn)
    torn.write_bytes(torn.read_bytes()[: -len(torn.read_bytes()) // 3])
    e = explain(made)
    assert e.status == "killed"
    assert [(v.kind, v.ranks) for v in e.verdicts] == [("rank", (2,))]
    told = "\n".join(e.missing)
    assert "1 of 4 ranks left no events (3)" in told
    assert "no last record from rank 1" in told
    assert "cut short" in told
    assert "are not on file of every rank" in told
    assert e.waterfall is not None
    assert sum(t.seconds for t in e.waterfall.terms) == pytest.approx(e.waterfall.wall_s, rel=1e-9)
    assert "1 of 4 ranks" in page(e)


def test_a_damaged_line_in_the_middle_costs_one_step(made: Path) -> None:
    path = event_file(made, 0)
    as_lines(path)
    lines = path.read_bytes().splitlines(keepends=True)
    lines[12] = b'{"event":"step","ste\x00\xff\n'
    path.write_bytes(b"".join(lines))
    e = explain(made)
    assert any("1 damaged line" in text for text in e.missing)
    assert [v.ranks for v in e.verdicts] == [(2,)]


def test_clocks_that_are_apart_change_nothing_and_are_told(tmp_path: Path) -> None:
    right = explain(write(tmp_path / "a", {r: records(r) for r in range(4)}))
    skewed = explain(write(tmp_path / "b", {r: records(r, skew_s=100.0 * r) for r in range(4)}))
    assert right.waterfall is not None
    assert skewed.waterfall is not None
    assert [t.seconds for t in right.waterfall.terms] == [t.seconds for t in skewed.waterfall.terms]
    assert right.missing == []
    assert any("clocks are 300.0 s apart" in text for text in skewed.missing)


def test_a_run_that_never_finished_a_step(tmp_path: Path) -> None:
    e = explain(write(tmp_path, {0: [start()]}))
    assert e.waterfall is None
    assert e.verdicts == []
    assert any("nothing to say" in text for text in e.missing)
    assert len(page(e)) > 1000


def test_no_run_is_a_users_mistake(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["explain", str(tmp_path)]) == 2
    assert "no run here" in capsys.readouterr().err


def test_goodput_counts_restarts_and_steps_trained_twice() -> None:
    def step(number: int, at: float) -> Step:
        return Step(step=number, start_s=at, step_time_s=1.0)

    first = [
        start(),
        Stall(kind="setup", start_s=1000.0, seconds=5.0),
        *(step(i, 1005.0 + i) for i in range(10)),
    ]
    second = [start(t0_wall=1035.0, attempt=1), Stall(kind="setup", start_s=1035.0, seconds=5.0),
              *(step(i, 1040.0 + i - 6) for i in range(6, 12)),
              Stall(kind="checkpoint", start_s=1046.0, seconds=2.0, step=12),
              RunEnd(status="done", time_s=1049.0)]  # fmt: skip
    good = account([gathered([*first, *second])])
    assert good.wall_s == pytest.approx(49.0)
    assert good.lost == pytest.approx(
        {"restart": 20.0, "setup": 10.0, "lost steps": 4.0, "checkpoint": 2.0, "the rest": 1.0}
    )
    assert good.productive_s == pytest.approx(12.0)
    assert (good.steps, good.lost_steps, good.attempts) == (12, 4, 2)
    assert good.productive_s + sum(good.lost.values()) == pytest.approx(good.wall_s)


@pytest.mark.parametrize("schedule", ["1f1b", "zbv", "interleaved_1f1b", "blockwise"])
def test_memory_is_predicted_as_the_planner_does_for_the_schedule_that_ran(schedule: str) -> None:
    asked = ["parallel.pp=4", f"parallel.pipeline.schedule={schedule}", "train.global_batch=64", "hardware=H100-SXM-80"]
    cfg = load_config_file("train/llama3-8b", asked)
    machine = from_device(lookup("H100-SXM-80"))
    ran = start(world=8, hardware="H100-SXM-80", device_memory=True, layout={"pp": 4, "dp_shard": 2})
    parts = predict(cfg, ran)
    assert parts is not None
    assert sum(parts.values()) == pytest.approx(predict_run(cfg, 8, machine).memory_bytes)
    assert predict(cfg, start(world=7, layout={})) is None


def test_memory_parts_sum_to_the_peak_and_stand_beside_the_prediction(made: Path) -> None:
    cfg = load_config_file("train/llama3-8b", ["parallel.dp_shard=8", "parallel.tp=1", "train.micro_batch=1"])
    table = make_table({0: [r for r in records(0) if isinstance(r, Step)]}, Layout())
    at = start(device_memory=80 * GIB, hardware="H100-SXM-80", world=8,
               layout={"pp": 1, "dp_replicate": 1, "dp_shard": 8, "cp": 1, "tp": 1, "ep": 1})  # fmt: skip
    report = memory_report(MemoryUse.of(table), at, cfg)
    assert report is not None
    assert sum(held for _, held in report.parts) == pytest.approx(report.peak)
    assert report.peak == 30 * GIB
    assert report.predicted_total is not None
    assert (
        report.predicted_total > 10 * GIB
    )  # 8 billion parameters: 16 bytes each over 8 ranks, and activations
    measured = {p.name: p.measured for p in report.compared}
    assert measured["resident between steps"] == 10 * GIB
    assert measured["transient at the peak"] == 20 * GIB
    assert all(held >= 0 for _, held in report.parts)


OOM = (
    "OutOfMemoryError: CUDA out of memory. Tried to allocate {} GiB. GPU 0 has a total capacity of 79.15 GiB of which "
    "1.50 GiB is free. Of the allocated memory 70.00 GiB is allocated by PyTorch, and 6.00 GiB is reserved by PyTorch "
    "but unallocated."
)


def test_a_run_out_of_memory_is_told_whether_it_would_have_fitted(tmp_path: Path) -> None:
    assert would_have_fitted("SIGTERM") == ""
    assert would_have_fitted("RuntimeError: out of memory") == ""
    assert "would have fitted" in would_have_fitted(OOM.format("4.00"))
    assert "2.50 GiB were missing" in would_have_fitted(OOM.format("10.00"))
    end = RunEnd(status="failed", time_s=1100.0, reason=OOM.format("4.00"))
    e = explain(write(tmp_path / "run", {0: [start(device_memory=80 * GIB), *records(0)[1:-1], end]}))
    assert e.memory is not None
    assert e.memory.fragmentation == GIB  # 31 reserved, 30 at the peak
    assert "expandable_segments" in e.memory.would_have_fitted


def test_a_leak_is_growth_beyond_doubt() -> None:
    def report(grows: float) -> float:
        rng = np.random.default_rng(0)
        steps = [Step(step=i, start_s=0.0, step_time_s=1.0,
                      memory=Memory(allocated=int(GIB * (1 + grows * i + 0.001 * rng.normal())), peak=2 * GIB))
                 for i in range(100)]  # fmt: skip
        found = memory_report(MemoryUse.of(make_table({0: steps}, Layout())), start(), None)
        assert found is not None
        return found.leak_bytes_per_step

    assert report(0.0) == 0.0
    assert report(0.002) == pytest.approx(0.002 * GIB, rel=0.2)


def test_advice_names_the_change_and_its_gain(made: Path) -> None:
    cfg = load_config_file("train/llama3-8b", ["parallel.dp_shard=8", "recompute.policy=full"])
    phases = {"forward": 1.0, "backward": 3.0, "data": 1.0}
    steps = [Step(step=i, start_s=0.0, step_time_s=5.0, phases=phases, memory=Memory(allocated=GIB, peak=2 * GIB),
                  flops=Flops(model=1e9, palm=None, hardware=1.3e9)) for i in range(4)]  # fmt: skip
    table = make_table({0: steps}, Layout())
    fall = waterfall(table, 1e9, split_flops(table, cfg))
    assert fall is not None
    memory = memory_report(MemoryUse.of(table), start(device_memory=80 * GIB), cfg)
    found = {a.what.split("=")[0].split(":")[0]: a for a in advise(fall, cfg, memory)}
    data = next(a for what, a in found.items() if "data.prefetch" in what)
    assert data.gain == pytest.approx(0.2)
    assert "recompute.policy" in found
    assert fall.mfu is not None
    for a in found.values():
        assert a.mfu == pytest.approx(fall.mfu / (1 - a.gain))
    assert memory is not None
    assert any("recompute" in x or "dp_shard" in x for x in to_fit(cfg, memory, 1.0))


def test_no_advice_where_nothing_is_lost() -> None:
    phases, flops = {"forward": 0.3, "backward": 0.7}, Flops(model=1e9, palm=None, hardware=1e9)
    steps = [Step(step=i, start_s=0.0, step_time_s=1.0, phases=phases, flops=flops) for i in range(4)]
    table = make_table({0: steps}, Layout())
    fall = waterfall(table, 1e9, Work(np.zeros(4), np.zeros(4), 0.0))
    assert fall is not None
    assert fall.mfu == pytest.approx(1.0)
    assert advise(fall, None, None) == []


# ---- the page ------------------------------------------------------------------------------------

PROBE = """
const text = document.querySelector("main").innerText;
document.title = JSON.stringify({
  sections: [...document.querySelectorAll("h2")].map((n) => n.textContent),
  h1: document.querySelector("h1").textContent, errors: window.failures,
  bars: document.querySelectorAll(".fall .lane i:not(.ghost)").length,
  rects: document.querySelectorAll("svg rect").length,
  wide: document.documentElement.scrollWidth > innerWidth, bad: /undefined|NaN|\\[object/.test(text),
  painted: [...document.querySelectorAll("canvas")].map((c) =>
    c.getContext("2d").getImageData(c.width / 2, c.height * 0.6, 1, 1).data[3]),
  ground: getComputedStyle(document.body).backgroundColor, ifs: document.querySelectorAll(".ifs .good").length,
  small: [...document.querySelectorAll("svg text")].filter((t) => t.getBoundingClientRect().height < 9).length,
});
"""


def browse(html: Path, folder: Path, theme: str, width: int = 1240) -> dict[str, object]:
    return probe(html.read_text(encoding="utf-8"), PROBE, folder, theme, width)


def test_the_page_in_a_browser_in_both_themes(made: Path, tmp_path: Path) -> None:
    html = tmp_path / "page.html"
    assert cli.main(["explain", str(made), "--html", str(html)]) == 0
    text = html.read_text(encoding="utf-8")
    assert len(text.encode()) < MAX_BYTES
    asks = re.search(r"""(?:src|href)=|url\(|@import|https?://(?!www\.w3\.org)""", text)
    assert asks is None, "the page asks for something"
    grounds = set()
    for theme in ("light", "dark"):
        seen = browse(html, tmp_path, theme)
        assert seen["errors"] == []
        assert seen["bad"] is False
        assert seen["wide"] is False
        assert str(seen["h1"]).startswith("rank 2 on node1 computes slowly")
        for title in ("Where each step goes", "Stragglers", "What if", "What to change",
                      "The same over time", "Rank by time", "Phases by rank", "Memory at the peak",
                      "Goodput"):  # fmt: skip
            assert title in seen["sections"]  # type: ignore[operator]
        e = explain(made)
        assert e.waterfall is not None
        assert seen["bars"] == len(e.waterfall.terms) + 1
        assert int(str(seen["rects"])) >= 40
        assert seen["painted"] == [255, 255]  # the timeline, the heat map
        assert seen["ifs"] == len(e.what_if) > 0
        grounds.add(seen["ground"])
    assert len(grounds) == 2


def test_the_page_of_a_pipeline_on_a_narrow_screen(made: Path, tmp_path: Path) -> None:
    e = explain(made)
    spans = [("F", 0, m, 0.01 * m, 0.01 * m + 0.01) for m in range(8)]
    e.pipeline = PipelineStep("1f1b", [spans, [("B", 1, m, a, b) for _, _, m, a, b in spans]], 0.08, 0.09, 0.1, 0.07,
                              [0.08, 0.07])  # fmt: skip
    html = tmp_path / "page.html"
    plain = browse_page(e, html, tmp_path)
    assert "Pipeline, a typical step" in plain["sections"]  # type: ignore[operator]
    assert plain["errors"] == []
    assert plain["bad"] is False
    assert plain["wide"] is False
    assert plain["small"] == 0
    e.pipeline = None
    without = browse_page(e, html, tmp_path)
    assert "Pipeline, a typical step" not in without["sections"]  # type: ignore[operator]
    assert int(str(plain["rects"])) - int(str(without["rects"])) == 16 + 2


def browse_page(e: Explanation, html: Path, folder: Path) -> dict[str, object]:
    html.write_text(page(e), encoding="utf-8")
    return browse(html, folder, "light", width=500)


def test_a_page_of_many_ranks_stays_small(tmp_path: Path) -> None:
    e = explain(write(tmp_path, {r: records(r % 4, slow=None) for r in range(4)}))
    e.ranks = list(range(20_000))
    e.phases = {name: [0.123456789] * 20_000 for name in ("forward", "backward", "optimizer", "comm/fsdp")}
    text = page(e)
    assert len(text.encode()) < MAX_BYTES
    assert "of 20000 ranks" in text


def test_a_name_cannot_break_out_of_the_page(tmp_path: Path) -> None:
    e = explain(write(tmp_path, {0: [start(name="</script><script>alert(1)</script>"), *records(0)[1:]]}))
    assert "<script>alert(1)" not in page(e)
