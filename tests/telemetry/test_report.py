"""The report of runs that ended in every way: numbers that add up, and what is missing is said."""

import io
import math
import re
from pathlib import Path

import pytest
from rich.console import Console

from support.made_run import as_lines
from trainsys.errors import UserError
from trainsys.profiler.explain import explain
from trainsys.telemetry.events import DeviceStep, Flops, RunStart
from trainsys.telemetry.reader import event_file
from trainsys.telemetry.recorder import Recorder
from trainsys.telemetry.report import final_report, summarize, tokens_per_s
from trainsys.telemetry.run_data import load_run
from trainsys.telemetry.utilization import Utilization


class Clock:
    def __init__(self, ns: int = 5_000_000_000) -> None:
        self.ns = ns

    def __call__(self) -> int:
        return self.ns

    def work(self, ms: float) -> None:
        self.ns += round(ms * 1e6)


def start(rank: int, world: int, attempt: int, **info: object) -> RunStart:
    fields = {
        "run_id": "demo-1",
        "name": "demo",
        "model": "tiny",
        "layout": {"pp": 1, "dp_replicate": 1, "dp_shard": 2, "cp": 1, "tp": 2},
        "peak_flops": 25e9,
        "peak_label": "measured 100 GFLOP/s",
        "conventions": {"mfu": "exact"},
        **info,
    }
    return RunStart(rank=rank, world=world, t0_wall=1e9 + 100 * attempt, t0_mono=5.0, **fields)  # type: ignore[arg-type]


def write_rank(
    run_dir: Path,
    rank: int,
    world: int = 4,
    steps: int = 20,
    end: str = "done",
    attempt: int = 0,
    **info: object,
) -> None:
    """``steps`` of 100 ms: 60 forward (+10 a rank), 25 tp, 5 data, rest other; the first five thrice as long."""
    clock = Clock()
    rec = Recorder(run_dir, start(rank, world, attempt, **info), clock=clock, watch_gc=False)
    clock.work(1000)
    rec.begin()
    for i in range(steps):
        slow = 3 if i < 5 else 1
        with rec.phase("data"):
            clock.work(5 * slow)
        with rec.phase("forward"):
            clock.work((60 + 10 * rank) * slow)
            with rec.collective_span("tp", "all_reduce", 1 << 20):
                clock.work(25 * slow)
        clock.work(10 * slow)
        flops = Flops(model=1e9, palm=1.2e9, hardware=1.5e9)
        rec.end_step(i, tokens=1000, loss=5.0 - i / 10, lr=0.1, flops=flops)
        if i == 9:
            with rec.stall("checkpoint"):
                clock.work(500)
    if end == "killed":
        assert rec._writer is not None
        rec._writer.close()
    else:
        rec.finish(end, "RuntimeError: out of luck" if end == "failed" else "")  # type: ignore[arg-type]


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    for rank in range(4):
        write_rank(tmp_path, rank)
    return tmp_path


def use_of(run_dir: Path) -> Utilization:
    return explain(run_dir).use


def printed(run_dir: Path, terminal: bool = False, width: int = 100) -> str:
    file = io.StringIO()
    console = Console(file=file, width=width, force_terminal=terminal, color_system=None, highlight=False)
    final_report(load_run(run_dir), use_of(run_dir), console)
    return file.getvalue()


def test_numbers_leave_the_warm_up_out(run_dir: Path) -> None:
    run = load_run(run_dir)
    got = summarize(run, use_of(run_dir))
    assert got["status"] == "done"
    assert got["warmup_steps"] == 5
    assert got["step_time_s"] == pytest.approx(0.115)  # mean of 100, 110, 120, 130 ms
    assert got["phases_s"] == pytest.approx(
        {"data": 0.005, "forward": 0.075, "comm/tp": 0.025, "other": 0.010}
    )
    assert sum(got["phases_s"].values()) == pytest.approx(got["step_time_s"])
    assert (got["loss_first"], got["loss_last"], got["loss_best"]) == (5.0, 3.1, 3.1)
    rates = [1000 / s for s in (0.100, 0.110, 0.120, 0.130)]
    assert tokens_per_s(run) == pytest.approx(2 * sum(rates) / 4)  # two data ranks
    # FLOPs are of all ranks: 1e9 in the mean step of 0.115 s, on four ranks of 25e9.
    mfu = 1e9 / 0.115 / 1e11
    assert use_of(run_dir).shares == pytest.approx({"mfu": mfu, "mfu_palm": 1.2 * mfu, "hfu": 1.5 * mfu})
    assert {name: got[name] for name in ("mfu", "mfu_palm", "hfu")} == use_of(run_dir).shares
    assert got["conventions"]["mfu"] == "exact"
    assert got["stalls_s"] == {"setup": 1.0, "checkpoint": 0.5}
    assert got["wall_s"] == pytest.approx(1.0 + 5 * 0.3 + 15 * 0.1 + 0.5)
    assert got["stepping_s"] + sum(got["stalls_s"].values()) == pytest.approx(got["wall_s"])


def test_a_short_run_gives_up_only_a_quarter(tmp_path: Path) -> None:
    write_rank(tmp_path, 0, world=1, steps=4)
    assert load_run(tmp_path).lead.warmup == 1
    write_rank(tmp_path / "one", 0, world=1, steps=1)
    assert load_run(tmp_path / "one").lead.work.steps == 1


def test_plain_page(run_dir: Path) -> None:
    page = printed(run_dir)
    assert page.isascii()
    assert not re.search(r"[ \t]+$", page, re.MULTILINE)
    assert max(map(len, page.splitlines())) <= 100
    for said in (
        "tiny  |  dp_shard=2 x tp=2  |  4 processes",
        "done after 20 steps in 4.50 s",
        "5.0000 -> 3.1000",
        "17,5",  # tokens/s
        "8.7%              of measured 100 GFLOP/s; exact",
        "6N + 12LHQT a token (PaLM)",
        "66.7% training, 22.2% setup, 11.1% checkpoint",
        "mean of 15 steps on 4 ranks, wall time; 5 warm-up steps left out",
        "60.0 (rank 0) - 90.0 (rank 3)",
        "25.0 on every rank",
    ):
        assert said in page
    table = re.findall(r"^  ([a-z][a-z *]+?) +([\d.]+) +([\d.]+)%", page, re.MULTILINE)
    assert [row[0] for row in table] == ["data", "forward", "communication tp*", "other", "step"]
    assert sum(float(row[1]) for row in table[:-1]) == pytest.approx(float(table[-1][1]), abs=0.1)
    assert sum(round(10 * float(row[2])) for row in table[:-1]) == 1000
    assert "!" not in page
    assert "* includes waiting for slower ranks" in page


def test_terminal_page_fits_and_is_drawn(run_dir: Path) -> None:
    for width in (100, 80, 200):
        page = printed(run_dir, terminal=True, width=width)
        assert max(map(len, page.splitlines())) <= min(width, 100)
        assert "█" in page
        assert "5.0000 → 3.1000" in page


def test_killed_failed_missing_and_cut_files_are_said(tmp_path: Path) -> None:
    write_rank(tmp_path, 0, world=4, end="killed")
    write_rank(tmp_path, 1, world=4, end="failed")
    write_rank(tmp_path, 3, world=4, end="killed", steps=12)
    path = event_file(tmp_path, 3)
    as_lines(path)
    data = path.read_bytes()
    path.write_bytes(data.replace(b'"step":7,', b'"st?', 1)[:-25])
    run = load_run(tmp_path)
    assert (run.status, run.missing) == ("failed", [2])
    assert run.ranks[3].steps == 10
    page = printed(tmp_path)
    text = " ".join(page.split())
    assert "failed after 20 steps" in text
    assert "rank 1: RuntimeError: out of luck" in text
    assert "! 1 of 4 ranks left no events: 2" in text
    assert "! no last record from ranks 0, 3 (killed, or running still): last step 20" in text
    assert "rank_00003.jsonl: 1 damaged line skipped, last record cut short" in text
    assert "mean of 15 steps on 3 ranks" in text


def test_only_killed(tmp_path: Path) -> None:
    write_rank(tmp_path, 0, world=1, end="killed")
    assert load_run(tmp_path).status == "killed"
    assert "killed after 20 steps" in printed(tmp_path)


def test_a_restart_is_one_run_of_two_attempts(tmp_path: Path) -> None:
    write_rank(tmp_path, 0, world=1, end="killed")
    write_rank(tmp_path, 0, world=1, attempt=1)
    run = load_run(tmp_path)
    assert run.status == "done"
    assert (run.lead.attempts, run.lead.steps, run.lead.warmup) == (2, 40, 10)
    assert summarize(run, use_of(tmp_path))["step_time_s"] == pytest.approx(0.1)
    assert "2 attempts are in these files" in printed(tmp_path)


def test_no_peak_is_said_and_no_step_too(tmp_path: Path) -> None:
    write_rank(tmp_path, 0, world=1, peak_flops=None, peak_label="")
    assert use_of(tmp_path).shares == {"mfu": None, "mfu_palm": None, "hfu": None}
    assert "trainsys bench matmul measures one" in " ".join(printed(tmp_path).split())
    write_rank(tmp_path / "none", 0, world=1, steps=0, end="killed")
    assert "No step was finished" in printed(tmp_path / "none")
    assert summarize(load_run(tmp_path / "none"), use_of(tmp_path / "none"))["mfu"] is None


def test_a_loss_that_broke(tmp_path: Path) -> None:
    rec = Recorder(tmp_path, start(0, 1, 0), watch_gc=False)
    for i, loss in enumerate((4.0, math.nan, math.nan)):
        rec.end_step(i, loss=loss)
    rec.finish("done")
    assert "4.0000 -> nan" in printed(tmp_path)
    assert "2 steps were not finite" in printed(tmp_path)
    assert summarize(load_run(tmp_path), use_of(tmp_path))["loss_last"] is None


def test_device_time_is_preferred_where_there_is_any(tmp_path: Path) -> None:
    rec = Recorder(tmp_path, start(0, 1, 0), watch_gc=False)
    for i in range(8):
        rec.end_step(i)
        rec.put(DeviceStep(step=i, step_time_s=0.2, phases={"forward": 0.15, "other": 0.05}))
    rec.finish("done")
    page = printed(tmp_path)
    assert "mean of 6 steps on 1 rank, device time" in page
    assert re.search(r"forward +150\.0 +75\.0%", page)


def test_no_run_here(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no run here .* runs/latest"):
        load_run(tmp_path / "nowhere")
    (tmp_path / "events").mkdir()
    event_file(tmp_path, 0).write_bytes(b"rubbish\n")
    with pytest.raises(UserError, match="no usable record in 1 event file"):
        load_run(tmp_path)
