"""A run started again, whole: what it goes on from, what it says about that, and what it refuses."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint.matrix import LAYOUTS, Pieces, assemble, build, pieces, train

from support.apart import apart
from support.jobs import Job
from support.ranks import run_ranks
from trainsys.checkpoint import manifest as manifests
from trainsys.checkpoint.atoms import AtomReader
from trainsys.checkpoint.compare import model_differences
from trainsys.checkpoint.convert import convert
from trainsys.checkpoint.folder import Folder
from trainsys.checkpoint.hf import export, import_
from trainsys.checkpoint.hf_config import from_hf_config, to_hf_config
from trainsys.checkpoint.initial import load_weights, open_weights
from trainsys.checkpoint.ranks import Ranks
from trainsys.checkpoint.resume import find
from trainsys.config.loader import load_run
from trainsys.config.run import ParallelConfig
from trainsys.data import build_source
from trainsys.data.order import samples_seen
from trainsys.errors import UserError
from trainsys.profiler.goodput import goodput_of
from trainsys.telemetry.events import RunStart, Step
from trainsys.telemetry.reader import Damage, event_file, iter_events

RUN = """\
name: {name}
hardware: H100-SXM-80
model: {{n_layers: 2, d_model: 32, n_heads: 4, n_kv_heads: 2, d_ff: 64, vocab: 64, max_seq_len: 32}}
data: {{source: synthetic, prefetch: 0}}
optim: {{lr: 1e-3, warmup_steps: 2}}
train: {{steps: 4, seq_len: 16, global_batch: 4, micro_batch: 2, dtype: fp32, device: cpu, threads: 1}}
telemetry: {{out: {out}, console: plain}}
checkpoint: {{every: 2, keep_last: 2}}
"""
ROOT = Path(__file__).resolve().parents[2]
SAID = itertools.count()


def run(out: Path, name: str, *overrides: str, world: int = 1) -> tuple[int, str]:
    """Run ``name`` with overrides in ranks of its own: its exit code, and what it printed."""
    config, log = out / f"{name}.yaml", out / f"log-{next(SAID)}"
    config.write_text(RUN.format(name=name, out=out))
    codes = Job(world, config, list(overrides), log).wait(timeout_s=120)
    return max(codes), log.read_text() if log.exists() else ""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of run "a", which has done 4 steps, and of other forms of its weights."""
    out = tmp_path_factory.mktemp("source")
    code, said = run(out, "a", "optim.lr=0.02")
    assert code == 0, said
    apart(_other_forms, out / "checkpoints/a/step_0000000004", out)
    return out


def _other_forms(checkpoint: Path, out: Path) -> None:
    convert(checkpoint, out / "weights", weights_only=True)
    export(checkpoint, out / "hf", "F32")
    import_(out / "hf", out / "imported")


@pytest.fixture
def again(source: Path, tmp_path: Path) -> Path:
    """The same run's checkpoints in a folder where it may go on."""
    shutil.copytree(source / "checkpoints", tmp_path / "checkpoints")
    (tmp_path / "a.yaml").write_text(RUN.format(name="a", out=tmp_path))
    for attempt in run_dirs(source, "a"):
        shutil.copytree(attempt, tmp_path / attempt.name)
    return tmp_path


def run_dirs(out: Path, name: str) -> list[Path]:
    return sorted(p for p in out.glob(f"{name}-*") if p.is_dir())


def events(run_dir: Path, kind: type[Any]) -> list[Any]:
    return [e for e in iter_events(event_file(run_dir, 0), Damage()) if isinstance(e, kind)]


def losses(out: Path, name: str) -> dict[int, float]:
    """By step, of all attempts."""
    return {e.step: e.loss for run in run_dirs(out, name) for e in events(run, Step)}


def folder(out: Path, name: str) -> Folder:
    return Folder(out / "checkpoints" / name)


def one_line(said: str) -> str:
    lines = [line for line in said.splitlines() if line.startswith("trainsys: ")]
    assert len(lines) == 1, said
    return lines[0]


def test_it_says_what_it_goes_on_from_and_what_has_changed(again: Path) -> None:
    code, said = run(again, "a", "train.steps=8", "optim.weight_decay=0.3", "parallel.tp=2", world=2)
    assert code == 0, said
    at = folder(again, "a").root / "step_0000000004"
    first, second = run_dirs(again, "a")
    told = f"resumed at step 4 from {at} of {first.name}; batch 4, sample 16 comes next"
    changes = (
        "resumed with changes: layout one process → tp=2; world 1 → 2; optim.lr 0.02 → 0.001; "
        "optim.weight_decay 0.1 → 0.3; train.steps 4 → 8; lr at step 4: 0.002 → 0.000689"
    )
    for text in (told, changes):
        assert text in said
        assert text in events(second, RunStart)[0].origin
    facts = json.loads((second / "environment.json").read_text())["run"]
    assert facts["lines"] == [told, changes]
    assert (facts["source"], facts["first_step"]) == (str(at), 4)
    assert facts["lineage"] == json.loads((first / "environment.json").read_text())["run"]["lineage"] != ""
    good = goodput_of(second, 0)
    assert (good.attempts, good.steps, good.lost_steps) == (2, 8, 0)


def test_weights_begin_a_new_run_once(source: Path, tmp_path: Path) -> None:
    weights = f"train.init_from={source / 'hf'}"
    code, said = run(tmp_path, "b", weights)
    assert code == 0, said
    assert f"step 0 begins with the weights of {source / 'hf'}" in said
    assert list(losses(tmp_path, "b")) == [0, 1, 2, 3]
    newest = manifests.read(folder(tmp_path, "b").root / "step_0000000004")
    assert (newest.step, newest.samples, newest.updates, newest.resumed_from) == (4, 16, 4, str(source / "hf"))

    code, said = run(tmp_path, "b", weights, "train.steps=6")
    assert code == 0, said
    assert "resumed at step 4" in said
    assert list(losses(tmp_path, "b")) == list(range(6))
    assert folder(tmp_path, "b").names()[-2:] == ["step_0000000004", "step_0000000006"]
    code, said = run(tmp_path, "b", f"train.init_from={source / 'weights'}", "train.steps=8")
    assert code == 2
    assert f"holds step 6 of a run that began with {source / 'hf'}, so train.init_from=" in one_line(said)


FORMS = ("checkpoints/a", "checkpoints/a/step_0000000004", "weights", "hf", "imported")


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name not in ("fsdp4", "ddp2_tp2")] + ["pp2"])
def test_weights_are_the_same_in_every_layout(source: Path, layout: str) -> None:
    """From every form, over what an earlier one left: the checkpoint's weights, and the loss of one process."""
    world, axes = {**LAYOUTS, "pp2": (2, {"pp": 2})}[layout]
    paths = [str(source / form) for form in FORMS]
    by_rank = run_ranks(world, init_each, axes, paths)
    one = run_ranks(1, init_each, {}, paths[:1])
    reader = AtomReader(source / FORMS[1], manifests.read(source / FORMS[1]))
    for i, form in enumerate(FORMS):
        got = assemble(rank[i][0] for rank in by_rank)
        assert sum("@exp_avg" in name for name in got) > 20
        for name, value in got.items():
            want = np.zeros_like(value) if "@" in name else reader.read(name).numpy()
            assert np.array_equal(value, want), f"{form}: {name}"
        np.testing.assert_allclose(by_rank[0][i][1], one[0][0][1], rtol=2e-6, err_msg=form)
    losses = one[0][0][1]
    assert max(losses) - min(losses) > 1e-3


def init_each(axes: dict[str, Any], paths: list[str]) -> list[tuple[Pieces, list[float]]]:
    readers = axes.get("dp_shard", 1) * axes.get("dp_replicate", 1)
    cfg = load_run(str(Path(paths[0]).parents[1] / "a.yaml"), [])
    train_config = cfg.train.model_copy(update={"global_batch": 12, "micro_batch": 12 // readers // axes.get("pp", 1)})
    cfg = cfg.model_copy(
        update={"train": train_config, "parallel": ParallelConfig(**{"dp_shard": 1, **axes})}
    )
    engine, out = build(cfg), []
    for path in paths:
        asked = cfg.train.model_copy(update={"init_from": path})
        load_weights(open_weights(cfg.model_copy(update={"train": asked}), Ranks()), engine)
        assert engine.updates == 0
        held = pieces(engine)
        out.append((held, train(engine, 0, 3)))
        for t in engine.state():
            t.data.zero_()
    return out


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["model.d_ff=96"], "does not fit the model: model.d_ff: checkpoint 64, run 96"),
        (["model.n_heads=2", "model.n_kv_heads=null"], "model.head_dim: checkpoint 8, run 16; model.n_heads"),
        (["train.init_from={source}/nothing"], "nothing: no such folder"),
        (["train.init_from={out}/checkpoints/b"], "where this run saves and goes on from"),
        (["checkpoint.resume={source}/checkpoints/a"], "drop one of the two"),
    ],
)
def test_weights_that_cannot_be_used_are_refused_by_key(
    source: Path, tmp_path: Path, overrides: list[str], said: str
) -> None:
    (tmp_path / "checkpoints/b").mkdir(parents=True)
    given = [f"train.init_from={source}/checkpoints/a", *(o.format(out=tmp_path, source=source) for o in overrides)]
    code, printed = run(tmp_path, "b", *given)
    assert code == 2
    assert said in one_line(printed)


def test_damaged_weights_are_refused_and_what_computes_otherwise_is_said(again: Path) -> None:
    (again / "b.yaml").write_text(RUN.format(name="b", out=again))
    weights = f"train.init_from={again}/checkpoints/a"
    opened = open_weights(load_run(str(again / "b.yaml"), [weights, "model.rope.theta=5000"]), Ranks())
    assert len(opened.notes) == 1
    assert "used with another value: model.rope.theta: checkpoint 10000.0, run 5000.0" in opened.notes[0]
    file = next((again / "checkpoints/a/step_0000000004").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    code, printed = run(again, "b", weights)
    assert code == 2
    assert "sha256 does not match" in one_line(printed)


def test_a_path_to_go_on_from_never_sets_a_run_back(again: Path) -> None:
    older = folder(again, "a").root / "step_0000000002"
    code, said = run(again, "a", f"checkpoint.resume={older}", "train.steps=8")
    assert code == 2
    assert "is step 2, and" in one_line(said)
    assert "at step 4" in said
    assert len(folder(again, "a").names()) == 2

    branch = ["b", f"checkpoint.resume={older}"]
    code, said = run(again, *branch)
    assert code == 0, said
    assert f"resumed at step 2 from {older}" in said
    lineages = [folder(again, name).lineage() for name in "ab"]
    assert lineages[0] != lineages[1]
    code, said = run(again, *branch, "train.steps=6")
    assert code == 0, said
    assert "resumed at step 4 from" in said
    assert list(losses(again, "b")) == list(range(2, 6))
    newest = folder(again, "b").root / "step_0000000006"
    code, said = run(again, "b", f"checkpoint.resume={folder(again, 'a').root / 'step_0000000004'}", "train.steps=8")
    assert code == 2
    assert str(newest) in one_line(said)
    found = find(folder(again, "b"), str(newest), Ranks())
    assert found is not None
    assert found.path == newest


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["train.steps=3"], "is step 4, but train.steps=3; set it to more than 4"),
        (["model.d_ff=96", "model.norm_eps=1e-6"], "model.d_ff: checkpoint 64, run 96; model.norm_eps: checkpoint 1e-05"),
        (["data.shuffle=false"], "data.shuffle True -> False"),
        (["data.document_mask=true"], "data.document_mask False -> True"),
        (["data.packing=pad"], "data.packing concat -> pad"),
        (["train.global_batch=8"], "train.global_batch 4 -> 8"),
        (["train.init_from={source}/hf"], "began with other weights"),
        (["checkpoint.resume={source}/weights/step_0000000004", "checkpoint.folder={out}/new"],
         "without the optimizer's state, so a run cannot go on from it; train.init_from="),
        (["checkpoint.resume={source}/hf", "checkpoint.folder={out}/new"], "hf starts a new run from weights"),
    ],
)  # fmt: skip
def test_another_run_is_refused_in_one_line(again: Path, source: Path, overrides: list[str], said: str) -> None:
    code, printed = run(again, "a", "optim.lr=0.02", *(o.format(out=again, source=source) for o in overrides))
    assert code == 2
    assert said in one_line(printed)
    assert len(folder(again, "a").names()) == 2


def test_a_batch_of_another_size_goes_on_at_the_next_sample(again: Path) -> None:
    """Sample by sample: 4 batches of 4, 2 of 8, and again 2 of 8 after one more start."""
    for steps in (6, 8):
        code, said = run(again, "a", "train.global_batch=8", f"train.steps={steps}", "checkpoint.changed_data=true")
        assert code == 0, said
    newest = manifests.read(folder(again, "a").root / "step_0000000008")
    assert (newest.data_step, newest.samples) == (8, 16 + 4 * 8)
    said_of = [line for at in run_dirs(again, "a")[1:] for line in events(at, RunStart)[0].origin if "sample" in line]
    assert [line.rsplit("batch ", 1)[1] for line in said_of] == [
        "4, sample 16 comes next", "6, sample 32 comes next",
    ]  # fmt: skip
    # What the run trained on is what the source gives from there: the loss of step 4 is of samples 16 to 23.
    cfg = load_run(str(again / "a.yaml"), [])
    whole = build_source(cfg)
    order = [int(n) for step in range(12) for n in whole.samples(step, range(4))]
    source = build_source(load_run(str(again / "a.yaml"), ["train.global_batch=8"]))
    source.go_on(4, samples_seen(cfg.model_dump(mode="json"), 16, 4, cfg))
    parts = order[:16] + [int(n) for step in range(4, 8) for n in source.samples(step, range(8))]
    assert parts == order[:48]


def test_a_manifest_without_samples_is_read(again: Path) -> None:
    manifest = manifests.read(folder(again, "a").root / "step_0000000004")
    cfg = load_run(str(again / "a.yaml"), ["train.global_batch=8", "train.seq_len=8"])
    assert samples_seen(manifest.config, manifest.samples, 4, cfg) == 32, "windows of half the length: twice as many"
    assert samples_seen(manifest.config, None, 4, cfg) == 32
    old = {name: getattr(manifest, name) for name in ("step", "data_step", "updates", "world", "files", "atoms")}
    assert manifests.decode(manifests.encode(manifests.Manifest(**old, schema="1.0")), "old").samples is None


def test_every_shipped_model_comes_back_from_hugging_face_as_the_same_model() -> None:
    """What an import says of a model and what its shipped config says resolve to the same; what no family has is
    refused."""
    taken = 0
    for path in sorted((ROOT / "configs" / "models").glob("[!_]*.yaml")):
        model = load_run(f"models/{path.stem}", []).model
        assert model_differences(model.model_dump(mode="json"), model) == []
        if model.moe is not None or model.norm == "layernorm":
            with pytest.raises(UserError, match="none of the Llama, Mistral, Qwen2 and Qwen3 families has it"):
                to_hf_config(model)
            continue
        back = from_hf_config(json.loads(json.dumps(to_hf_config(model))))
        taken += 1
        assert model_differences(back.model_dump(mode="json"), model) == [], path.stem
        other = back.model_copy(update={"d_ff": 1, "norm_eps": 1.0, "n_kv_heads": 1})
        assert [name for name, _ in model_differences(other.model_dump(mode="json"), model)] == [
            "d_ff", "n_kv_heads", "norm_eps",
        ]  # fmt: skip
    assert taken >= 15
