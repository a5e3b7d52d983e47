"""What-ifs against the truth: generated programs run again with the change, and each kind of wait by itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from profiling.trace_whatif import CHANGES, ask
from support.whatif.machine import COMPUTE, COPY, MATMUL, Program, Traits
from support.whatif.machine import run as play
from support.whatif.programs import GEMM, MAIN, NORM, SCENARIOS
from support.whatif.recording import write
from trainsys.profiler.trace.analyse import Options, load
from trainsys.profiler.trace.critical import critical_path
from trainsys.profiler.trace.gaps import at_least
from trainsys.profiler.trace.main import analyse
from trainsys.profiler.trace.relaunch import with_lost_launches
from trainsys.profiler.trace.text import render

MATMULS = "matmuls were 20% faster"


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_what_ifs_are_true_of_the_program_run_again(scenario):
    for seed in (100, 101):
        asked, path = ask(scenario, seed)
        given = [a for a in asked if a.said is not None]
        wrong = [a for a in given if not a.right]
        assert len(given) >= 4
        # Waits between streams are not named in a trace, and this change depends on all of them.
        assert [a.what for a in wrong if a.what != "the host never waited for the device"] == [], wrong
        device = sum(v for k, v in path.items() if k not in ("host", "data", "sync", "launch"))
        if scenario not in ("launch_bound", "loader_bound"):
            assert device > 0.9


def waiting(how: str) -> Program:
    """Three rounds: 40 matmuls of 0.2 ms are launched, far ahead of the device, and then waited for."""
    p = Program(Traits())
    for n in range(3):
        for _ in range(40):
            p.work(3_000)
            p.launch(GEMM, MATMUL, MAIN, 200_000, "cudaLaunchKernel")
        p.record(f"e{n}", MAIN)
        if how == "item":
            p.launch("Memcpy DtoH (Device -> Pinned)", COPY, MAIN, 2_000, "cudaMemcpyAsync")
            p.sync_stream(MAIN)
        elif how == "device":
            p.sync_device()
        elif how == "event":
            p.sync_event(f"e{n}")
        elif how == "copy":
            p.blocking_copy("Memcpy DtoH (Device -> Pageable)", MAIN, 2_000, "cudaMemcpyAsync")
        elif how == "poll":
            p.poll(f"e{n}", 20_000, "cudaEventQuery")
        elif how == "spin":
            p.spin(f"e{n}", 20_000)
        p.launch(NORM, COMPUTE, MAIN, 30_000, "cudaLaunchKernel")
    return p


def answer(program: Program, path: Path, what: str = MATMULS, **lacking) -> tuple[float, float]:
    """(ns that a change saves by the trace, and in truth)."""
    base = play(program)
    write(base, path, **lacking)
    loaded = load(path, Options())
    found = critical_path(loaded.trace, loaded.kinds, loaded.launches)
    assert found.faithful
    said = {w.what: w.saved_ns for w in found.what_if}
    return said[what], base.span - play(program, CHANGES[what]).span


@pytest.mark.parametrize("how", ["item", "device", "event", "copy", "poll", "spin"])
@pytest.mark.parametrize("operators", [True, False])
def test_each_way_to_wait_is_seen(tmp_path, how, operators):
    said, true = answer(waiting(how), tmp_path / "rank0.json", operators=operators)
    assert true > 3_000_000
    assert said == pytest.approx(true, rel=0.02)


def test_a_full_launch_queue_is_a_wait(tmp_path):
    """Each launch blocks for 30 us, as long as a host may well think."""
    p = Program(Traits(queue=24))
    for _ in range(200):
        p.work(3_000)
        p.launch(GEMM, MATMUL, MAIN, 40_000, "cudaLaunchKernel")
    said, true = answer(p, tmp_path / "rank0.json")
    assert said == pytest.approx(true, rel=0.02)


def test_lost_launches_are_put_back_where_they_were(tmp_path):
    p = Program(Traits())
    for _ in range(200):
        p.work(40_000)
        p.launch(NORM, COMPUTE, MAIN, 10_000, "cudaLaunchKernel")
    base = play(p)
    write(base, tmp_path / "rank0.json", lost=0.1, seed=3)
    loaded = load(tmp_path / "rank0.json", Options())
    lost = np.flatnonzero(loaded.launches.index < 0)
    _, launches = with_lost_launches(loaded.trace, loaded.launches)
    true = {e.correlation: e.start for e in base.seen if e.category == "cuda_runtime"}
    at = [true[c] for c in loaded.trace.device.correlation[lost].tolist()]
    assert len(lost) > 10
    assert launches.unlinked == 0
    assert np.abs(launches.start[lost] - at).max() <= 1_000


def test_a_host_that_may_have_been_busy_withholds_the_answer(tmp_path):
    """It goes on in the middle of a kernel, nothing recorded: work or a wait, the trace does not tell."""
    p = Program(Traits())
    for _ in range(6):
        for _ in range(10):
            p.launch(GEMM, MATMUL, MAIN, 500_000, "cudaLaunchKernel")
        p.work(4_400_000)
    write(play(p), tmp_path / "rank0.json", operators=False)
    report = analyse([tmp_path / "rank0.json"])
    assert MATMULS in report.critical.withheld
    assert MATMULS not in {w.what for w in report.critical.what_if}
    assert f"if {MATMULS}: withheld, " in render(report)
    write(play(p), tmp_path / "rank0.json", operators=True)
    assert MATMULS in {w.what for w in analyse([tmp_path / "rank0.json"]).critical.what_if}


def test_at_least_is_the_binomial_tail():
    draws = np.random.default_rng(0).binomial(8, 0.3, 200_000)
    assert at_least(4, 8, 0.3) == pytest.approx((draws >= 4).mean(), abs=0.01)
    assert at_least(0, 8, 0.3) == pytest.approx(1.0)


def test_deepseeks_published_step_is_the_device_s(shared):
    """Idle 0.4%, matmuls 71.1%: its host polls and waits for kernels that write how much will arrive."""
    path = shared / "deepseek_profile/train.json"
    if not path.is_file():
        pytest.skip("train.json of github.com/deepseek-ai/profile-data is not in ../shared/data/traces/deepseek_profile")
    c = analyse([path]).critical
    assert max(c.by_kind, key=c.by_kind.get) == "matmul"
    assert c.by_kind.get("host", 0) < 0.01 * c.span_ns
    saved = {w.what: w.saved_share for w in c.what_if}
    assert saved[MATMULS] > 0.05
