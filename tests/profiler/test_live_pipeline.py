"""A pipeline's step replayed from what its ranks recorded, and what would have been."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from support.pipeline_cases import FSDP, Case
from support.ranks import run_ranks
from trainsys.config.loader import load_run
from trainsys.config.run import RunConfig
from trainsys.data import Loader, build_source
from trainsys.engines.native import NativeEngine
from trainsys.layout import Layout
from trainsys.parallel.mesh import Mesh
from trainsys.profiler.explain import explain
from trainsys.profiler.pipeline import pipeline_step
from trainsys.profiler.steps import StepTable, make_table
from trainsys.profiler.waterfall import Work, waterfall
from trainsys.profiler.what_if_run import Saved, what_if
from trainsys.schedules.build import build
from trainsys.schedules.program import Compute, Reduce, programs
from trainsys.telemetry.events import Step
from trainsys.telemetry.recorder import Recorder, here
from trainsys.telemetry.run_dir import write_config

MICROS, FORWARD_S, BACKWARD_S = 8, 0.010, 0.020


def config(schedule: str) -> RunConfig:
    return load_run("train/demo.yaml", (
        "parallel.dp_shard=1", "parallel.tp=1", "parallel.sequence_parallel=false", "parallel.pp=4",
        f"parallel.pipeline.schedule={schedule}", f"train.global_batch={8 * MICROS}", "model.n_layers=8",
    ))  # fmt: skip


def recorded(cfg: RunConfig, slow: int | None = None, factor: float = 2.0) -> StepTable:
    """Steps as the pipeline's engine records them, pipeline rank ``slow`` with ``factor`` of the others' times."""
    pipe = cfg.parallel.pipeline
    schedule = build(pipe.schedule, 4, MICROS, pipe.virtual_stages)
    by_rank = {}
    for rank in range(4):
        times: dict[str, list[int]] = {"forward": [], "backward": []}
        for instruction in programs(schedule)[rank]:
            if isinstance(instruction, Reduce):
                times["backward"].append(30)
            elif isinstance(instruction, Compute):
                op = instruction.action.op
                seconds = FORWARD_S if op == "F" else BACKWARD_S if op == "B" else BACKWARD_S / 2
                us = round(1e6 * seconds * (factor if rank == slow else 1.0))
                times["forward" if op == "F" else "backward"].append(us)
        work = {name: sum(us) / 1e6 for name, us in times.items()}
        wait = 1.0 - sum(work.values())
        by_rank[rank] = [
            Step(step=i, start_s=0.0, step_time_s=1.0, phases={**work, "comm/pp": wait}, micro_us=times)
            for i in range(10)
        ]
    return make_table(by_rank, Layout(pp=4))


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_equal_stages_have_the_bubble_of_the_formula(schedule: str) -> None:
    cfg = config(schedule)
    found = pipeline_step(recorded(cfg), cfg)
    assert found is not None
    assert found.bubble == pytest.approx(3 / (MICROS + 3))
    assert found.step_s == pytest.approx((MICROS + 3) * (FORWARD_S + BACKWARD_S))
    assert found.ideal_s == pytest.approx(found.step_s)
    assert found.without == pytest.approx([found.step_s] * 4)
    assert [len(spans) for spans in found.ranks] == [2 * MICROS] * 4
    assert found.ranks[1][0] == ("F", 1, 0, FORWARD_S, 2 * FORWARD_S)


def test_halves_of_backward_are_told_apart() -> None:
    cfg = config("zero_bubble")
    found = pipeline_step(recorded(cfg), cfg)
    assert found is not None
    assert {op for spans in found.ranks for op, *_ in spans} == {"F", "I", "W"}
    assert found.bubble < 3 / (MICROS + 3)


def test_the_slow_stage_is_what_the_step_would_be_rid_of() -> None:
    cfg = config("1f1b")
    table = recorded(cfg, slow=2)
    found = pipeline_step(table, cfg)
    assert found is not None
    even = (MICROS + 3) * (FORWARD_S + BACKWARD_S)
    assert found.step_s > 1.5 * even
    assert found.without[2] == pytest.approx(even)
    assert all(w == pytest.approx(found.step_s) for rank, w in enumerate(found.without) if rank != 2)
    fall = waterfall(table, None, Work(np.zeros(10), np.zeros(10), 0.0))
    assert fall is not None
    told = {w.what: w.step_s for w in what_if(fall, found, [])}
    assert told["pipeline rank 2 like the others"] == pytest.approx(fall.wall_s - (found.step_s - even))
    assert "pipeline rank 1 like the others" not in told


def test_communication_of_other_axes_belongs_to_the_actions() -> None:
    cfg = config("1f1b")
    table = recorded(cfg)
    table.phases["comm/tp"] = 0.5 * (table.phases["forward"] + table.phases["backward"])
    found = pipeline_step(table, cfg)
    assert found is not None
    assert found.step_s == pytest.approx(1.5 * (MICROS + 3) * (FORWARD_S + BACKWARD_S))


def test_no_pipeline_no_picture() -> None:
    cfg = config("1f1b")
    table = recorded(cfg)
    assert pipeline_step(table, None) is None
    table.calls = {}
    assert pipeline_step(table, cfg) is None


def test_a_rank_like_its_peers_gives_the_step_to_the_next_latest() -> None:
    work = np.array([0.10, 0.10, 0.16, 0.13, 0.10, 0.10, 0.10, 0.10])
    table = make_table(
        {
            rank: [
                Step(step=i, start_s=0.0, step_time_s=0.17, phases={"forward": w, "comm/fsdp": 0.17 - w})
                for i in range(10)
            ]
            for rank, w in enumerate(work.tolist())
        },
        Layout(dp_shard=8),
    )
    fall = waterfall(table, None, Work(np.zeros(10), np.zeros(10), 0.0))
    assert fall is not None
    saved = Saved()
    saved.add(table)
    gains = {w.what: w for w in what_if(fall, None, saved.most(table.ranks))}
    assert gains["rank 2 like its peers"].step_s == pytest.approx(0.17 - 0.03)
    assert "rank 3 like its peers" not in gains
    assert gains["no exposed communication on fsdp"].step_s == pytest.approx(0.17 - 0.01)


def train(case: Case, folder: str, steps: int) -> None:
    """``case`` on this rank, as the training loop does it, with events in ``folder``."""
    cfg, rank = case.config, dist.get_rank()
    layout = Layout.resolve(cfg.parallel, case.world)
    mesh = Mesh(layout, torch.device("cpu"))
    sizes = {axis: getattr(layout, axis) for axis in ("pp", "dp_replicate", "dp_shard", "cp", "tp", "ep")}
    recorder = Recorder(folder, here(run_id="pp", rank=rank, world=case.world, layout=sizes))
    mesh.ledger.recorder = recorder
    engine = NativeEngine(cfg, mesh, recorder)
    with Loader(build_source(cfg), mesh.layout, rank, cfg.train.micro_batch) as loader:
        recorder.begin()
        for step in range(steps):
            engine.train_step(step, next(loader))
            recorder.end_step(step)
    recorder.finish("done")


@pytest.mark.parametrize("case", [Case("1f1b", 2, FSDP), Case("zero_bubble", 2)], ids=lambda c: c.id)
def test_what_a_real_pipeline_recorded_is_replayed_whole(case: Case, tmp_path: Path) -> None:
    run_ranks(case.world, train, case, str(tmp_path), 6)
    write_config(tmp_path, case.config)
    e = explain(tmp_path)
    assert e.pipeline is not None
    told = {span[:3] for spans in e.pipeline.ranks for span in spans}
    micros = 8 // (case.config.train.micro_batch * case.world // 2)
    assert told == {tuple(action) for action in build(case.schedule, 2, micros).actions}
    assert all(end > start for spans in e.pipeline.ranks for *_, start, end in spans)
    assert 0 < e.pipeline.ideal_s <= e.pipeline.step_s
    busy = [sum(end - start for *_, start, end in spans) for spans in e.pipeline.ranks]
    assert 0.999 * max(busy) <= e.pipeline.step_s <= 1.001 * sum(busy)
