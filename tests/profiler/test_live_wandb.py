"""The ledger and the verdicts in W&B: an offline run read back, and the ready-made workspace."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from trainsys import cli
from trainsys.config.loader import load_run
from trainsys.telemetry.sinks.wandb import SUMMARY
from trainsys.telemetry.sinks.wandb_workspace import PANELS, workspace_json

pytest.importorskip("wandb")

RUN = """
import sys
from pathlib import Path
from trainsys.config.run import WandbConfig
from trainsys.telemetry.sinks.base import RunInfo, Sinks
from trainsys.telemetry.sinks.wandb import WandbSink

warn = lambda text: print("WARN", text, flush=True)
sinks = Sinks([WandbSink(WandbConfig(mode="offline", project="proj", group="layouts-a"), print)], warn)
sinks.start(RunInfo("demo", "run1", Path(sys.argv[1]), 4))
sinks.step(0, {"train/loss": 4.0})
sinks.extra(0, {"waterfall/straggler_ms": 12.5})
sinks.finish({
    "step_time_s": 0.125,
    "waterfall": [{"term": "useful", "ms": 47.25, "share": 0.4}, {"term": "straggler", "ms": 12.5, "share": 0.1}],
    "verdicts": [{"kind": "rank", "ranks": [6, 7], "ms": 12.5, "title": "rank 6 computes slowly"}],
})
"""


def test_tables_metrics_and_group_of_an_offline_run(tmp_path: Path) -> None:
    keep = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    done = subprocess.run([sys.executable, "-c", RUN, str(tmp_path)], env={**keep, "HOME": str(tmp_path)},
                          capture_output=True, text=True, timeout=90, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "WARN" not in done.stdout
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    exe = shutil.which("wandb", path=str(Path(sys.executable).parent)) or "wandb"
    (record,) = folder.glob("run-*.wandb")
    told = subprocess.run(
        [exe, "leet", "inspect", "--json", str(record)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    ).stdout
    assert "layouts-a" in told
    assert "waterfall/straggler_ms" in told
    assert "table-file" in told
    tables = {path.name.split("_")[0]: json.loads(path.read_text()) for path in folder.rglob("*.table.json")}
    assert tables["waterfall"]["columns"] == ["term", "ms", "share"]
    assert tables["waterfall"]["data"] == [["useful", 47.25, 0.4], ["straggler", 12.5, 0.1]]
    assert tables["verdicts"]["data"] == [["rank", "6, 7", 12.5, "rank 6 computes slowly"]]


def test_the_workspace_plots_metrics_that_runs_have(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("wandb_workspaces")
    spec = json.loads(workspace_json("proj", "team"))
    assert (spec["project"], spec["entity"]) == ("proj", "team")
    sections = spec["spec"]["section"]["panelBankConfig"]["sections"]
    names = [section["name"] for section in sections if section["panels"]]
    assert set(PANELS) <= set(names)
    text = json.dumps(sections)
    for metric in (
        "perf/mfu",
        "waterfall/straggler_ms",
        "waterfall/comm_tp_ms",
        "train/loss",
        "memory/peak_gib",
    ):
        assert metric in text
    (plot,) = next(section["panels"] for section in sections if section["name"] == "Which layout")
    found = [column["accessor"] for column in plot["config"]["columns"]]
    config = load_run("train/demo").model_dump(mode="json")
    for accessor in found:
        kind, _, name = accessor.partition(":")
        if kind == "config":
            block, _, key = name.partition(".value.")
            assert key in config[block] if key else block.removesuffix(".value") in config
        else:
            assert kind == "summary"
            assert name in SUMMARY
    assert {"config:parallel.value.tp", "summary:perf/mfu"} <= set(found)
    assert cli.main(["wandb", "workspace", "proj", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["displayName"] == spec["displayName"]
