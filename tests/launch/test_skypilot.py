"""SkyPilot's task file: valid, and a machine that replaces a preempted one finds the checkpoints."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from trainsys.errors import EXIT_MACHINE_FAULT, UserError
from trainsys.launch import job, skypilot
from trainsys.launch.node import EXIT_DRAINED

SCHEMA = json.loads((Path(__file__).parent / "schemas/skypilot.json").read_text())
RUN = """
name: small
model: {n_layers: 2, d_model: 32, n_heads: 4, n_kv_heads: 2, d_ff: 64, vocab: 320, max_seq_len: 64}
train: {steps: 12, seq_len: 32, global_batch: 8, device: cuda}
data: {source: synthetic}
launch: {nodes: 2, devices_per_node: 2, skypilot: {accelerator: H100}}
"""
SPOT = "launch.skypilot.use_spot=true"
BUCKET = "launch.skypilot.storage={/ckpt: {name: bucket, store: gcs, mode: %s}}"


@pytest.fixture(autouse=True)
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run.yaml").write_text(RUN)
    monkeypatch.chdir(tmp_path)


def task(*overrides: str) -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load(skypilot.render(job.make("run.yaml", overrides)))
    jsonschema.validate(document, SCHEMA)
    return document


def test_every_field_is_where_skypilot_wants_it() -> None:
    made = task(
        BUCKET % "MOUNT_CACHED",
        "launch.skypilot.volumes={/data: corpora}",
        "launch.skypilot.infra=gcp/us-central1",
        "checkpoint.folder=/ckpt/small",
        "launch.cpus_per_rank=4",
        "launch.memory=200G",
        "launch.container=registry.example/trainsys:0.1",
        "launch.setup=[module load cuda]",
        "launch.env={NCCL_DEBUG: WARN, A_KEY: abc}",
        "launch.port=12345",
        SPOT,
    )
    assert made["file_mounts"] == {"/ckpt": {"name": "bucket", "store": "gcs", "mode": "MOUNT_CACHED"}}
    assert made["volumes"] == {"/data": "corpora"}
    assert (made["resources"]["cpus"], made["resources"]["memory"]) == ("8+", "200+")
    assert made["resources"]["infra"] == "gcp/us-central1"
    assert (made["envs"]["NCCL_DEBUG"], made["secrets"]) == ("WARN", {"A_KEY": None})
    assert "A_KEY" not in made["envs"]
    assert made["setup"] == "module load cuda\n"
    assert "PET_MASTER_PORT=12345" in made["run"]


def test_a_run_that_was_asked_to_stop_costs_no_restart() -> None:
    recovery = task("launch.max_restarts=5")["resources"]["job_recovery"]
    assert recovery == {"max_restarts_on_errors": 5, "recover_on_exit_codes": [EXIT_DRAINED]}
    assert EXIT_MACHINE_FAULT not in recovery["recover_on_exit_codes"]


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        [BUCKET % "MOUNT"],
        [BUCKET % "MOUNT", "checkpoint.folder=/ckpts/small"],
        [BUCKET % "COPY", "checkpoint.folder=/ckpt/small"],
    ],
    ids=["nothing", "folder elsewhere", "folder beside", "a copy"],
)
def test_spot_without_a_place_for_checkpoints_is_refused(overrides: list[str]) -> None:
    task(*overrides)
    with pytest.raises(UserError, match=r"use_spot=true: checkpoints go to .*set launch\.skypilot\.storage="):
        task(SPOT, *overrides)


@pytest.mark.parametrize(
    "overrides", [[BUCKET % "MOUNT"], [BUCKET % "MOUNT_CACHED"], ["launch.skypilot.volumes={/ckpt: disk}"]]
)
def test_spot_with_one_is_not(overrides: list[str]) -> None:
    assert task(SPOT, *overrides, "checkpoint.folder=/ckpt/small")["resources"]["use_spot"] is True


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["launch.skypilot.accelerator=null"], "launch.skypilot.accelerator: name it"),
        (["launch.qos=high"], "launch.qos=high: SkyPilot does not use it"),
        (['launch.time="1:00:00"'], "launch.time=1:00:00: SkyPilot does not use it"),
        (["launch.skypilot.storage={/ckpt/: {name: b}}"], "launch.skypilot.storage"),
        (["launch.skypilot.storage={/ckpt: {mode: MOUNT}}"], "a bucket's name, or a source"),
    ],
)
def test_what_cannot_be_is_refused(overrides: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        task(*overrides)


def test_two_submissions_have_two_names(monkeypatch: pytest.MonkeyPatch) -> None:
    stamps = iter(["20260131-142501", "20260131-142502"])
    monkeypatch.setattr(job.time, "strftime", lambda *_: next(stamps))
    assert [task()["name"], task()["name"]] == ["small-20260131-142501", "small-20260131-142502"]


def test_the_page_shows_what_renders(tmp_path: Path) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs/skypilot.md").read_text()
    (block,) = re.findall(r"^```yaml\n(.*?)^```", page, re.M | re.S)
    (tmp_path / "page.yaml").write_text(f"include: run.yaml\n{block}")
    made = skypilot.render(job.make("page.yaml", ["train.global_batch=16"]))
    jsonschema.validate(yaml.safe_load(made), SCHEMA)
