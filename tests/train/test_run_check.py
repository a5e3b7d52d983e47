"""Before the first step: each folder that a run writes to, and settings that work and are seldom meant."""

from __future__ import annotations

import errno
import itertools
from pathlib import Path
from typing import Any

import pytest
import yaml

from support.jobs import Job
from trainsys.config.run import RunConfig
from trainsys.data import build_source
from trainsys.errors import EXIT_USER_ERROR, MachineFault, UserError
from trainsys.flops.params import param_counts
from trainsys.layout import Layout
from trainsys.optim.schedule import learning_rate
from trainsys.train.check import check_folders, check_weights, doubts

CONFIG = """
name: small
model: {n_layers: 1, d_model: 16, n_heads: 2, d_ff: 32, vocab: 264, max_seq_len: 32}
data: {source: synthetic, prefetch: 0}
train: {steps: 6, seq_len: 16, global_batch: 4, micro_batch: 2, dtype: fp32, device: cpu}
telemetry: {console: "off"}
checkpoint: {every: 2}
"""


def config(out: Path, **sections: dict[str, Any]) -> RunConfig:
    tree = yaml.safe_load(CONFIG)
    tree["telemetry"]["out"] = str(out)
    for section, values in sections.items():
        tree[section] = {**tree.get(section, {}), **values}
    return RunConfig.model_validate(tree)


KEYS = {
    "telemetry.out": {},
    "checkpoint.folder": {},
    "checkpoint.local_dir": {},
    "checkpoint.memory_dir": {"checkpoint": {"memory_every": 1}},
}
WRONG = {
    "{tmp}/file": "/file is a file",
    "{tmp}/file/below": "/file is a file",
    "{tmp}/dangling": "it is a link to nothing",
    "/proc/nowhere": "No such file",
    "/dev/null": "/dev/null is a file",
    "x" * 300: "File name too long",
    "": "is empty",
}


@pytest.mark.parametrize(("key", "path"), [*itertools.product(KEYS, WRONG)])
def test_a_folder_that_cannot_be_is_named_by_its_key(key: str, path: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    section, _, name = key.partition(".")
    sections: dict[str, dict[str, Any]] = {s: dict(v) for s, v in KEYS[key].items()}
    sections.setdefault(section, {})[name] = path.format(tmp=tmp_path)
    cfg = config(tmp_path / "out", **sections)
    if path == "" and key == "checkpoint.folder":
        return check_folders(cfg)  # the default
    with pytest.raises(UserError, match=f"^{key}") as told:
        check_folders(cfg)
    assert WRONG[path] in str(told.value)
    assert "\n" not in str(told.value)
    assert len(str(told.value)) < 400


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.ESTALE, errno.ETIMEDOUT])
def test_a_file_system_that_fails_is_the_machines_fault(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise OSError(number, "it fails")

    monkeypatch.setattr(Path, "mkdir", fail)
    with pytest.raises(MachineFault, match=r"telemetry\.out.*it fails"):
        check_folders(config(tmp_path))


def said(tmp_path: Path, **sections: dict[str, Any]) -> list[str]:
    cfg = config(tmp_path, **sections)
    return list(doubts(cfg, build_source(cfg)))


def test_settings_that_are_seldom_meant_get_a_line(tmp_path: Path) -> None:
    assert said(tmp_path) == []
    assert said(tmp_path, optim={"warmup_steps": 6}) == []
    (line,) = said(tmp_path, optim={"warmup_steps": 12, "lr": 0.001})
    assert "optim.warmup_steps=12 is longer than the run (train.steps=6)" in line
    assert "ends at 0.0005 and never reaches optim.lr=0.001" in line
    (line,) = said(tmp_path, optim={"schedule": "wsd", "warmup_steps": 3, "decay_steps": 4})
    assert "together longer than the run" in line
    assert said(tmp_path, optim={"schedule": "wsd", "warmup_steps": 2, "decay_steps": 4}) == []


def test_many_epochs_over_little_data_get_a_line(tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text("abcdefgh" * 8 + "\n")  # 4 sequences of 16 bytes
    data = {"source": "text", "path": str(text), "cache_dir": str(tmp_path / "cache"), "tokenizer": "bytes"}
    (line,) = said(tmp_path, data=data)
    assert "this run reads its data 6 times: 4 sequences of 16 tokens" in line
    assert said(tmp_path, data=data, train={"steps": 4}) == []


@pytest.mark.parametrize("warmup", [0, 2, 10])
@pytest.mark.parametrize("decay", [0, 1, 3, 100, None])
@pytest.mark.parametrize("schedule", ["cosine", "wsd", "linear", "constant"])
@pytest.mark.parametrize("steps", [1, 2, 10])
def test_a_learning_rate_for_every_setting(schedule: Any, decay: int | None, warmup: int, steps: int) -> None:
    cfg = RunConfig.model_validate(
        {
            **yaml.safe_load(CONFIG),
            "optim": {"schedule": schedule, "decay_steps": decay, "warmup_steps": warmup},
        }
    ).optim
    rates = [learning_rate(cfg, step, steps) for step in range(steps)]
    assert all(0 < rate <= cfg.lr for rate in rates)
    if schedule == "wsd" and decay == 0 and not warmup:
        assert rates == [cfg.lr] * steps


def run(tmp_path: Path, *overrides: str) -> tuple[int, str]:
    file, log = tmp_path / "run.yaml", tmp_path / "log"
    file.write_text(CONFIG)
    (code,) = Job(1, file, [f"telemetry.out={tmp_path / 'out'}", *overrides], log).wait()
    return code, log.read_text()


def test_a_checkpoint_folder_that_is_a_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    code, log = run(tmp_path, f"checkpoint.folder={tmp_path / 'file'}")
    assert code == EXIT_USER_ERROR
    assert f"checkpoint.folder={tmp_path / 'file'}: no folder can be made or written there" in log
    assert len(log.splitlines()) == 1


def test_batches_without_a_label_name_the_data_and_not_the_learning_rate(tmp_path: Path) -> None:
    """Documents of a byte and its end in rows of one token: every other row has nothing that could be predicted."""
    lines = tmp_path / "a.jsonl"
    lines.write_text('{"text": "a"}\n' * 40)
    code, log = run(
        tmp_path, "data.source=jsonl", f"data.path={lines}", f"data.cache_dir={tmp_path / 'cache'}",
        "data.tokenizer=bytes", "data.document_mask=true", "train.seq_len=1", "train.global_batch=1",
        "train.micro_batch=1", "train.steps=40", "resilience.max_anomalies=3",
    )  # fmt: skip
    assert code == EXIT_USER_ERROR, log
    assert "no token of the global batch has a label" in log
    assert "(samples " in log
    assert "the data are at fault" in log
    assert "optim.lr" not in log


@pytest.mark.parametrize(
    ("sizes", "local_world", "copies"),
    [
        ({"dp_shard": 8}, 8, 1.0),
        ({"dp_shard": 8}, 2, 0.25),
        ({"dp_shard": 2, "tp": 2, "pp": 2}, 4, 0.5),
        ({"dp_replicate": 4, "dp_shard": 2}, 8, 4.0),
    ],
)
def test_weights_that_no_layout_of_these_ranks_can_hold_are_refused(
    sizes: dict[str, int], local_world: int, copies: float, tmp_path: Path
) -> None:
    cfg, layout = config(tmp_path), Layout(**sizes)
    least = int(4 * param_counts(cfg.model).total * copies)
    check_weights(cfg, layout, local_world, least)
    with pytest.raises(UserError, match=r"^out of memory before .* weights alone take .*`trainsys plan` says") as told:
        check_weights(cfg, layout, local_world, least - 1)
    assert "\n" not in str(told.value)


def test_a_model_larger_than_the_machine_is_refused_before_it_is_built(tmp_path: Path) -> None:
    file, log = tmp_path / "run.yaml", tmp_path / "log"
    file.write_text(CONFIG)
    huge = ["model.n_layers=10000", "model.d_model=8192", "model.d_ff=32768"]
    (code,) = Job(1, file, [f"telemetry.out={tmp_path / 'out'}", *huge], log).wait()
    assert code == EXIT_USER_ERROR
    assert "fp32 weights alone take" in log.read_text()
