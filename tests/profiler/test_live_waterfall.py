"""The ledger adds up, and each term is what was put in: arithmetic on made-up tables, then real ranks that sleep."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support.ranks import run_ranks
from support.standin import Fault, Standin, run
from trainsys.layout import Layout
from trainsys.profiler.flops_split import split_flops
from trainsys.profiler.run_steps import load_steps
from trainsys.profiler.steps import Capture, StepTable, make_table
from trainsys.profiler.waits import late_excess, waiting
from trainsys.profiler.waterfall import Work, seconds_by_term, waterfall
from trainsys.telemetry.events import Comm, Flops, Step
from trainsys.telemetry.run_data import load_run


def step(
    number: int, phases: dict[str, float], stalls: dict[str, float] | None = None, **more: object
) -> Step:
    comm = {name[5:]: {"all_reduce": Comm(1, 8, s)} for name, s in phases.items() if name.startswith("comm/")}
    return Step(step=number, start_s=0.0, step_time_s=sum(phases.values()), phases=phases, comm=comm,
                stalls=stalls or {}, flops=Flops(model=4e8, palm=None, hardware=4e8), **more)  # fmt: skip


def nothing(table: StepTable) -> Work:
    return Work(np.zeros(len(table.steps)), np.zeros(len(table.steps)), 0.0)


SECONDS = st.floats(0.0, 1.0)
NAMES = ("data", "h2d", "forward", "backward", "recompute", "optimizer", "gc", "other", "checkpoint", "odd",
         "comm/tp", "comm/fsdp", "comm/pp", "comm/world", "comm/unknown")  # fmt: skip


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_terms_sum_to_step_and_stalls_whatever_the_phases(data: st.DataObject) -> None:
    layout = data.draw(st.sampled_from([
        Layout(dp_shard=2, tp=2), Layout(pp=2, dp_shard=2), Layout(dp_replicate=4), Layout(pp=4), Layout(tp=4),
    ]))  # fmt: skip
    ranks = data.draw(st.sets(st.integers(0, 3), min_size=1))
    by_rank = {
        rank: [
            step(number, {n: data.draw(SECONDS) for n in data.draw(st.sets(st.sampled_from(NAMES)))},
                 {"eval": data.draw(SECONDS)})
            for number in range(3)
        ]
        for rank in ranks
    }  # fmt: skip
    table = make_table(by_rank, layout)
    work = Work(np.full(3, data.draw(st.floats(0, 1e8))), np.zeros(3), data.draw(st.floats(0, 1)))
    capture = data.draw(st.sampled_from([None, Capture(0, 0, 0.6, 0.2)]))
    table.captures = [capture] if capture else []
    peak = data.draw(st.sampled_from([None, 1e8, 1e12]))
    parts = seconds_by_term(table, work, capture)
    total = sum(parts.values())
    np.testing.assert_allclose(total, table.time + table.stalls["eval"], atol=1e-9)
    assert all(values.min() >= -1e-9 for values in parts.values())
    fall = waterfall(table, peak, work, data.draw(st.booleans()))
    assert fall is not None
    assert all(t.seconds >= -1e-9 for t in fall.terms)
    assert fall.mfu is None or 0.0 <= fall.mfu <= 1.0 + 1e-9
    assert fall.mfu is None or fall.get("useful") == pytest.approx(fall.mfu * fall.step_s)
    # A term below a nanosecond is left out of the list: dust of the arithmetic, not time.
    assert sum(t.seconds for t in fall.terms) == pytest.approx(fall.wall_s, rel=1e-9, abs=1e-8)


def test_waiting_is_what_exceeds_the_least_blocked_of_the_group() -> None:
    layout = Layout(dp_shard=2, tp=2)  # tp groups (0, 1) and (2, 3); fsdp groups (0, 2) and (1, 3)
    blocked = {0: (0.1, 0.5), 1: (0.3, 0.2), 2: (0.4, 0.6), 3: (0.4, 0.2)}
    table = make_table(
        {r: [step(0, {"comm/tp": a, "comm/fsdp": b})] for r, (a, b) in blocked.items()}, layout
    )
    waits = waiting(table)
    np.testing.assert_allclose(waits["tp"][0], [0.0, 0.2, 0.0, 0.0])
    np.testing.assert_allclose(waits["fsdp"][0], [0.0, 0.0, 0.1, 0.0], atol=1e-12)


def test_the_bubble_is_what_a_pipeline_waits_but_not_what_a_late_pipeline_costs() -> None:
    layout = Layout(pp=2, dp_shard=2)  # stages (0, 1) and (2, 3)
    blocked = {0: 0.1, 1: 0.3, 2: 0.2, 3: 0.2}
    table = make_table({r: [step(0, {"forward": 1.0, "comm/pp": b})] for r, b in blocked.items()}, layout)
    fall = waterfall(table, None, nothing(table))
    assert fall is not None
    assert fall.get("bubble") == pytest.approx((0.1 + 0.1 + 0.2 + 0.2) / 4)
    assert fall.get("straggler") == pytest.approx(0.2 / 4)


def test_a_rank_that_is_late_for_good_is_counted_with_those_who_wait_for_it() -> None:
    layout = Layout(dp_shard=4)
    by_rank = {r: [step(n, {"forward": 1.5 if r == 2 else 1.0, "comm/fsdp": 0.1 if r == 2 else 0.6}) for n in range(4)]
               for r in range(4)}  # fmt: skip
    table = make_table(by_rank, layout)
    assert late_excess(table)[0].tolist() == pytest.approx([0, 0, 0.5, 0])
    fall = waterfall(table, None, nothing(table))
    assert fall is not None
    assert fall.get("straggler") == pytest.approx(0.5)  # as much as everyone would save
    assert fall.get("compute") == pytest.approx(1.0)
    assert fall.get("comm/fsdp") == pytest.approx(0.1)


def test_waiting_for_garbage_collection_is_the_collections() -> None:
    layout = Layout(dp_shard=4)
    by_rank = {r: [step(n, {"forward": 1.0, "gc": 0.4 if r == n % 4 else 0.0, "comm/fsdp": 0.1 if r == n % 4 else 0.5})
                   for n in range(4)] for r in range(4)}  # fmt: skip
    fall = waterfall(table := make_table(by_rank, layout), None, nothing(table))
    assert fall is not None
    assert fall.get("gc") == pytest.approx(0.4)
    assert fall.get("straggler") == pytest.approx(0.0)
    assert fall.get("comm/fsdp") == pytest.approx(0.1)


def test_peak_padding_and_recomputation_are_told_apart() -> None:
    table = make_table({0: [step(0, {"forward": 1.0, "backward": 3.0}, tokens=3, tokens_padded=1)]}, Layout())
    table.flops_model[:] = 300.0
    table.flops_hardware[:] = 400.0 + 0.5 * 400.0 / 3  # a quarter padding, half of forward repeated
    work = split_flops(table, None)
    assert work.recompute_share == 0.0
    share = 0.5
    forward = table.flops_hardware / (3 + share)
    work = Work(table.flops_hardware - share * forward - table.flops_model, share * forward, share)
    fall = waterfall(table, 150.0, work)
    assert fall is not None
    assert fall.get("recompute") == pytest.approx(0.5)
    assert fall.get("padding") == pytest.approx(3.5 / 4)
    assert fall.get("useful") == pytest.approx(2.0)
    assert fall.get("compute_below_peak") == pytest.approx(3.5 * 3 / 4 - 2.0)
    assert fall.mfu == pytest.approx(0.5)


def test_a_capture_splits_what_timers_cannot() -> None:
    table = make_table({0: [step(0, {"forward": 1.0, "backward": 3.0})]}, Layout())
    table.captures = [Capture(0, 0, 0.6, 0.25)]
    fall = waterfall(table, 2e8, nothing(table))  # useful at the peak: 2 s
    assert fall is not None
    found = {t.name: t.seconds for t in fall.terms if t.seconds}
    assert found["launch"] == pytest.approx(1.0)
    assert found["useful"] == pytest.approx(2.0)
    assert found["matmul_below_peak"] == pytest.approx(4 * 0.6 - 2.0)
    assert found["other_compute"] == pytest.approx(4 - 1.0 - 2.4)


LAYOUT = (("dp_shard", 2), ("tp", 2))


Told = list[dict[str, list[float]]]


def ledger(tmp_path: Path, spec: Standin, world: int = 4) -> tuple[dict[str, float], Told, StepTable]:
    """Seconds by term of the steps with the faults less those of the steps without, and what was injected."""
    told = run_ranks(world, run, spec, str(tmp_path))
    start = load_run(tmp_path)
    table = load_steps(tmp_path)
    medians = []
    for rows in (table.work & (table.steps < spec.steps // 2), table.work & (table.steps >= spec.steps // 2)):
        part = table.select(np.flatnonzero(rows))
        fall = waterfall(part, start.start.peak_flops, split_flops(part, None))
        assert fall is not None
        assert sum(t.seconds for t in fall.terms) == pytest.approx(fall.wall_s, rel=1e-6)
        parts = seconds_by_term(part, split_flops(part, None))
        medians.append({name: float(np.median(values.mean(axis=1))) for name, values in parts.items()})
    before, after = medians
    return {name: after[name] - before.get(name, 0.0) for name in after}, told, table


@pytest.mark.parametrize(
    ("fault", "term"),
    [
        (Fault("data", 0.03, first=10), "data"),
        (Fault("optimizer", 0.03, first=10), "optimizer"),
        (Fault("forward", 0.04, ranks=(1,), first=10), "straggler"),
        (Fault("link", 0.012, ranks=(0, 1, 2, 3), axis="tp", first=10), "comm/tp"),
        (Fault("save", 0.04, first=10), "stall/checkpoint"),
    ],
    ids=lambda x: x if isinstance(x, str) else x.kind,
)
def test_what_is_injected_is_found_in_its_term(tmp_path: Path, fault: Fault, term: str) -> None:
    spec = Standin(LAYOUT, steps=20, faults=(fault,), forward_s=0.001, backward_s=0.001)
    delta, told, _ = ledger(tmp_path, spec)
    injected = np.median([max(rank[fault.kind][s] for rank in told) for s in range(10, 20)])
    # This machine may be busy, and either half of the run more so: the study in profiling/ holds terms within 5%.
    # What must not happen here is that the time is somewhere else.
    assert delta[term] > 0.7 * injected


def test_padding_is_the_time_that_padding_took(tmp_path: Path) -> None:
    _, _, table = ledger(tmp_path, Standin(LAYOUT, steps=12, padded_share=0.4))
    rows = table.select(np.flatnonzero(table.work))
    fall = waterfall(rows, None, split_flops(rows, None))
    assert fall is not None
    assert fall.get("padding") == pytest.approx(0.4 * (fall.get("padding") + fall.get("compute")), rel=1e-6)


def test_recomputation_is_the_time_that_it_took(tmp_path: Path) -> None:
    spec = Standin(LAYOUT, steps=12, recompute_share=0.8, timed_recompute=True)
    _, told, table = ledger(tmp_path, spec)
    fall = waterfall(table, None, split_flops(table, None))
    assert fall is not None
    rows = np.flatnonzero(table.work)
    injected = np.mean([np.array(rank["recompute"])[rows].mean() for rank in told])
    # Both are clocks around the same sleeps; what a late rank is late by is counted with those who wait for it.
    assert fall.get("recompute") == pytest.approx(injected, rel=0.15)
    assert not next(t for t in fall.terms if t.name == "recompute").estimated
