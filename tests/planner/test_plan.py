"""Search, explanations, refusals and the plan command, end to end."""

from __future__ import annotations

import json
import re
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from trainsys.capabilities import refuse_unable
from trainsys.cli import main
from trainsys.config.loader import load_run
from trainsys.config.run import RunConfig
from trainsys.errors import UserError
from trainsys.layout import Layout
from trainsys.planner import explain
from trainsys.planner.cluster import Cluster, known_clusters, load_cluster
from trainsys.planner.constants import shipped
from trainsys.planner.main import devices_per_node, plan, winner
from trainsys.planner.memory_constants import shipped_memory
from trainsys.planner.schedule_view import of_layout, svg, text
from trainsys.planner.search import Found, search
from trainsys.planner.space import Job, enumerate_layouts, parse_limits, to_cases
from trainsys.planner.stacks import STACKS

RUN = "train/llama3-8b"


def job(run: str = RUN, gpus: int = 64, cluster: str = "dgx-h100", *overrides: str) -> Job:
    return Job.of(load_run(run, overrides), load_cluster(cluster).machine(), gpus)


@pytest.fixture(scope="module")
def found() -> Found:
    return search(job())


@pytest.mark.parametrize("engine", ["native", "deepspeed", "megatron"])
@pytest.mark.parametrize("name", [RUN, "models/mixtral-8x7b"])
def test_every_listed_layout_is_one_that_the_engine_accepts(engine: str, name: str) -> None:
    asked = (f"engine={engine}", "train.compile=false", "train.seq_len=4096", "train.global_batch=256")
    run = load_run(name, asked)
    here = job(name, 32, "dgx-h100", *asked)
    assert here.stack.name == engine
    layouts = enumerate_layouts(here)
    n = len(layouts["pp"])
    assert n > 50
    for i in range(0, n, max(n // 60, 1)):
        f = Found(here, {k: v[i : i + 1] for k, v in layouts.items()}, None, None, 1, 0, 0.0)  # type: ignore[arg-type]
        changed = run.model_dump()
        for section, values in winner(f).items():
            changed[section] = {**changed[section], **values}
        cfg = RunConfig.model_validate_json(json.dumps(changed))
        layout = Layout.resolve(cfg.parallel, 32)
        layout.validate(cfg.model, cfg.train, cfg.parallel, load_cluster("dgx-h100"))
        refuse_unable(cfg, layout)


def test_an_engine_that_cannot_run_a_favourite_is_named() -> None:
    asked = job("train/llama3-70b", 64, "dgx-h100", "engine=megatron")
    said = explain.why_not(search(asked), "pp=2,schedule=zbv", shipped(), shipped_memory())
    assert "for megatron on 64 devices: schedule can be 1f1b, interleaved" in said


def test_deepspeed_under_a_pipeline_is_its_pipeline_engine_with_zero_1() -> None:
    here = job(RUN, 32, "dgx-h100", "engine=deepspeed")
    cases = to_cases(here, enumerate_layouts(here))
    piped = cases.pp > 1
    sharded = cases.opt_shard > 1
    assert set(cases.zero[piped & sharded]) == {1.0}
    assert set(cases.zero[~piped & sharded]) == {2.0, 3.0}
    np.testing.assert_array_equal(cases.ds_pipeline > 0, piped)


def test_ranking_is_by_time_and_within_memory(found: Found) -> None:
    assert np.all(np.diff(found.time.total) >= 0)
    limit = 0.95 * shipped_memory().usable * found.job.machine.mem_bytes
    assert np.all(found.memory.total <= limit)
    assert found.considered == found.count + found.over_memory
    assert 0.3 < found.mfu[0] < 0.65


def test_gradients_are_reduced_each_micro_batch_where_whole_ones_do_not_fit() -> None:
    sharded = ["dp_shard=64", "tp=1", "cp=1", "pp=1", "micro_batch=1", "reshard=1"]
    kept = search(job(), parse_limits([*sharded, "recompute=none"]))
    assert set(kept.layouts["reduce_each"]) == {1.0}
    assert winner(kept)["parallel"]["fsdp"]["reduce_each_micro_batch"] is True
    with pytest.raises(UserError, match="fits on no layout"):
        search(job(), parse_limits([*sharded, "recompute=none", "reduce_each=0"]))
    # Where both fit, the one that sends less is first, and takes more memory.
    both = search(job(), parse_limits([*sharded, "recompute=full"]))
    assert list(both.layouts["reduce_each"]) == [0.0, 1.0]
    assert both.memory.total[0] - both.memory.total[1] > 25 * 2**30


@pytest.mark.parametrize("stack", STACKS)
def test_large_searches_go_in_parts_and_find_the_same(stack: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Job.of(load_run(RUN), load_cluster("dgx-h100").machine(), 64, stack)
    whole = search(asked)
    monkeypatch.setattr("trainsys.planner.search.CHUNK", 100)
    assert whole.considered > 300
    np.testing.assert_array_equal(search(asked).time.total, whole.time.total)


def test_pareto_front_trades_time_for_memory(found: Found) -> None:
    front = found.pareto()
    assert front[0] == 0
    assert np.all(np.diff(found.time.total[front]) >= 0)
    assert np.all(np.diff(found.memory.total[front]) < 0)


def test_limits_are_obeyed_and_bad_ones_refused() -> None:
    some = search(job(), parse_limits(["tp=4", "recompute=full", "micro_batch<=2"]))
    assert set(some.layouts["tp"]) == {4.0}
    assert some.layouts["micro_batch"].max() <= 2
    assert some.layout(0)["recompute"] == "full"
    for bad, says in (
        ("tp", "write KEY"),
        ("gpus<=4", "one of pp, dp_replicate"),
        ("tp<=x", "not a number"),
        ("schedule=zz", "one of"),
    ):
        with pytest.raises(UserError, match=says):
            parse_limits([bad])


def test_impossible_asks_name_what_would_work() -> None:
    with pytest.raises(UserError, match=r"fits on no layout of 8 x H100.*devices.* would work"):
        search(job("train/llama3-70b", 8))
    with pytest.raises(UserError, match=r"global_batch=\d+ does not spread over 63 devices.*would work"):
        search(job(RUN, 63))
    with pytest.raises(UserError, match="without these limits there are some"):
        search(job(), parse_limits(["tp=3"]))
    with pytest.raises(UserError, match="there are aws-p4d"):
        load_cluster("my-basement")
    with pytest.raises(UserError, match="has no fp8 matmul"):
        plan(RUN, "dgx-a100", gpus=8, dtype="fp8")
    with pytest.raises(UserError, match="give --gpus"):
        plan(RUN, "dgx-a100")


@pytest.mark.parametrize(("run", "gpus"), [("train/llama3-70b", 8), ("train/llama3-405b", 1)])
def test_what_would_work_does_work(run: str, gpus: int) -> None:
    with pytest.raises(UserError) as error:
        search(job(run, gpus))
    devices = int(re.search(r"; (\d+) devices", str(error.value))[1])  # type: ignore[index]
    assert search(job(run, devices)).count


def test_explanations_are_about_the_right_part(found: Found) -> None:
    k, m = shipped(), shipped_memory()
    assert "slower" in explain.why_first(found)
    assert re.match(
        r"tp=8,pp=1: \d+\.\d% slower .*tensor-parallel communication",
        explain.why_not(found, "tp=8,pp=1", k, m),
    )
    assert "out of memory" in explain.why_not(found, "micro_batch=8,recompute=none,tp=1,pp=1,cp=1", k, m)
    assert "tp can be 1, 2, 4, 8" in explain.why_not(found, "tp=3", k, m)
    # As the table heads its column, and as RUN.yaml calls a schedule.
    assert "mb=4" in (said := explain.why_not(found, "mb=4", k, m))
    assert said.removeprefix("mb") == explain.why_not(found, "micro_batch=4", k, m).removeprefix("micro_batch")
    assert parse_limits(["mb<=4", "schedule=interleaved_1f1b"]) == parse_limits(
        ["micro_batch<=4", "schedule=interleaved"]
    )
    with pytest.raises(UserError, match="not one of"):
        explain.why_not(found, "colour=red", k, m)
    gains = dict(explain.sensitivity(found, k))
    assert gains["half the network"] <= 0 <= gains["twice the network"]
    assert 1 < gains["10% faster matmuls"] < 10


def test_documents_cost_what_they_hold() -> None:
    """One layout, rows of 8,192 tokens: documents of 1,024 leave an eighth of the pairs, and one more on the diagonal."""
    packed = [job(RUN, 8, "dgx-h100", "data.document_mask=true", f"data.document_length={n}") for n in (8192, 1024)]
    whole, short = (search(j).time for j in packed)
    assert packed[0].seq_len == 8192
    assert short.attention.min() == pytest.approx(whole.attention.min() * 1025 / 8192, rel=0.01)
    assert short.matmul.min() == pytest.approx(whole.matmul.min(), rel=0.01)


def test_slow_network_moves_the_winner_away_from_sharding_over_it() -> None:
    fast = search(job("train/llama3-70b", 128, "dgx-h100", "train.global_batch=256"))
    cluster = load_cluster("dgx-h100").model_copy(update={"nic_gbit_per_gpu": 10.0})
    slow = search(Job.of(load_run("train/llama3-70b", ["train.global_batch=256"]), cluster.machine(), 128))

    def crossing(f: Found) -> float:
        return float(f.layouts["dp_shard"][0] * f.layouts["cp"][0] * f.layouts["tp"][0])

    assert slow.time.total[0] > fast.time.total[0]
    assert crossing(slow) < crossing(fast)


def test_command_prints_ranks_and_writes_a_config_that_loads(tmp_path: Path) -> None:
    out = StringIO()
    path = tmp_path / "planned.yaml"
    data = plan(
        RUN, "dgx-h100", ["train.global_batch=256"], gpus=64, top=4, write=path, why="tp=8",
        console=Console(file=out, width=220),
    )  # fmt: skip
    shown = out.getvalue()
    for word in (
        "MFU",
        "why the first wins",
        "why not",
        "tp=8",
        "sensitivity",
        "effective MFU",
        "confidence",
    ):
        assert word in shown
    cfg = load_run(path)
    first = data["ranked"][0]["layout"]
    assert cfg.train.global_batch == 256
    assert (cfg.parallel.tp, cfg.parallel.pp, cfg.train.micro_batch) == (
        first["tp"],
        first["pp"],
        first["micro_batch"],
    )
    assert Layout.resolve(cfg.parallel, 64).world == 64
    assert (cfg.launch.nodes, cfg.launch.devices_per_node, cfg.launch.cluster) == (8, 8, "dgx-h100")


def test_only_a_plan_is_written_over(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    for gpus in (64, 16):
        plan(RUN, "dgx-h100", gpus=gpus, write=path, console=Console(file=StringIO()))
        assert load_run(path).launch.nodes == gpus // 8
    path.write_text(mine := "# my notes\n" + path.read_text())
    with pytest.raises(UserError, match="exists and was not written by trainsys plan"):
        plan(RUN, "dgx-h100", gpus=64, write=path, console=Console(file=StringIO()))
    assert path.read_text() == mine


@pytest.mark.parametrize(
    ("world", "most", "nodes", "each"),
    [(512, 8, 64, 8), (4, 8, 1, 4), (12, 8, 2, 6), (16, 4, 4, 4), (7, 4, 7, 1), (72, 72, 1, 72)],
)
def test_ranks_are_spread_evenly_over_the_fewest_nodes(world: int, most: int, nodes: int, each: int) -> None:
    assert devices_per_node(world, most) == each
    assert world // each == nodes


def test_a_plan_is_launched_on_the_nodes_it_was_made_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(tmp_path / "planned.yaml")
    plan(RUN, "dgx-h100", gpus=512, write=path, console=Console(file=StringIO()))
    assert (
        main(["launch", path, "--on", "slurm", "--dry-run", "data.source=synthetic", "data.path=null"]) == 0
    )
    script = capsys.readouterr().out.splitlines()
    assert "#SBATCH --nodes=64" in script
    assert "#SBATCH --ntasks-per-node=8" in script


def test_json_is_the_same_data(capsys: pytest.CaptureFixture[str]) -> None:
    data = plan(RUN, "gb200-nvl72", gpus=16, json=True, top=2)
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(data))
    e = data["ranked"][0]
    assert sum(e["time_s"].values()) == pytest.approx(e["step_time_s"])
    memory = dict(e["memory_gib"])
    assert memory.pop("total") == pytest.approx(sum(memory.values()))


def test_winners_pipeline_can_be_drawn() -> None:
    piped = search(
        job(RUN, 64, "dgx-h100", "train.global_batch=256"), parse_limits(["pp=4", "schedule=1f1b"])
    )
    sim = of_layout(piped)
    assert len(sim.ranks) == 4
    assert svg(sim).count("<rect") >= len(sim.schedule.actions)
    assert text(sim, 60).count("\n") == 4
    # A pipeline that is hardly idle is not drawn as idle, however many operations share a character.
    drawn = "".join(line[4:].split()[0] for line in text(sim, 12).splitlines()[:-1])
    assert drawn.count(".") / len(drawn) < sim.bubble + 0.1
    steady = float(piped.time.total[0])
    assert sim.step_time == pytest.approx(steady, rel=0.25)


@pytest.mark.parametrize("name", known_clusters())
def test_every_cluster_can_be_planned_for(name: str) -> None:
    cluster = load_cluster(name)
    assert isinstance(cluster, Cluster)
    machine = cluster.machine()
    assert machine.nic_bw == pytest.approx(cluster.nic_gbit_per_gpu / 8 * 1e9 * cluster.domain)
    assert search(job("train/qwen3-0.6b", cluster.gpus_per_node, name)).count
