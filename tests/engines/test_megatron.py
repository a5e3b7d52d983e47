"""The Megatron-Core engine against the native one: losses, norms, gradients and weights under every layout it runs,
and checkpoints that go from either to the other."""

from __future__ import annotations

import subprocess
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from support.parity import Pieces, assemble, reference
from support.ranks import run_ranks
from support.rounding import Answer
from trainsys.checkpoint.folder import Folder
from trainsys.checkpoint.ranks import Ranks
from trainsys.checkpoint.resume import find, load
from trainsys.checkpoint.saver import Progress, Saver
from trainsys.config.engines import EngineName, MegatronConfig
from trainsys.config.model import ModelConfig
from trainsys.config.run import (
    CheckpointConfig,
    DataConfig,
    OptimConfig,
    ParallelConfig,
    RecomputeConfig,
    RunConfig,
    TrainConfig,
)
from trainsys.data import Loader, build_source
from trainsys.engines import build
from trainsys.engines.base import Engine
from trainsys.layout import Layout
from trainsys.parallel.mesh import Mesh
from trainsys.telemetry.recorder import Recorder, here

with warnings.catch_warnings():
    # Before any fork: each worker would spend seconds on it.
    warnings.simplefilter("ignore")
    pytest.importorskip("megatron.core", reason="the extra megatron is not installed")
    import trainsys.engines.megatron  # noqa: F401

ROOT = Path(__file__).resolve().parents[2]
STEPS = 20
MODEL: dict[str, Any] = {
    "n_layers": 4, "d_model": 32, "n_heads": 4, "n_kv_heads": 2, "d_ff": 64, "vocab": 72, "max_seq_len": 64,
    "qk_norm": True, "init_std": 0.1,
}  # fmt: skip
EXPERTS = {"n_layers": 2, "moe": {"n_experts": 4, "top_k": 2, "d_ff": 32}}
BIASED = {
    "n_layers": 2,
    "moe": {
        "n_experts": 4, "top_k": 2, "d_ff": 32, "score": "sigmoid", "balance": "bias", "n_shared_experts": 1,
        "route_scale": 2.0, "n_dense_layers": 1,
    },
}  # fmt: skip
OTHER = {
    "n_layers": 2, "tied_embeddings": True, "qkv_bias": True, "ffn_kind": "gelu", "norm": "layernorm",
    "sliding_window": 5, "qk_norm": False, "rope": {
        "scaling": "yarn", "factor": 4.0, "original_seq_len": 8, "attention_factor": 1.3, "beta_fast": 8.0,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    world: int
    layout: dict[str, Any] = field(default_factory=dict)
    axes: tuple[str, ...] = ()
    model: dict[str, Any] = field(default_factory=dict)
    other: dict[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> RunConfig:
        sections: dict[str, Any] = {
            "optim": OptimConfig(lr=2e-3, warmup_steps=2),
            "data": DataConfig(source="synthetic", prefetch=0),
            **self.other,
        }
        readers = self.layout.get("dp_shard", 1) * self.layout.get("dp_replicate", 1)
        train = {
            "seq_len": 16,
            "global_batch": 8,
            # Two micro-batches where there are no other data ranks, or a pipeline: small tests, both ways.
            "micro_batch": 8 // (readers * self.layout.get("pp", 1 if readers > 1 else 2)),
            "dtype": "fp32",
            "device": "cpu",
            "steps": STEPS,
        }
        return RunConfig(
            engine="megatron",
            model=ModelConfig(**{**MODEL, **self.model}),
            parallel=ParallelConfig(**{"dp_shard": 1, **self.layout}),
            train=TrainConfig(**{**train, **sections.pop("train", {})}),
            **sections,
        )


INTERLEAVED = {"schedule": "interleaved_1f1b", "virtual_stages": 2}
Z_LOSS = {"optim": OptimConfig(lr=2e-3, warmup_steps=2, z_loss=1e-3)}
PLAIN_OPTIMIZER = {"megatron": MegatronConfig(distributed_optimizer=False)}
DOCUMENTS = {"data": DataConfig(source="synthetic", prefetch=0, document_mask=True)}
TWO = {"n_layers": 2}
CASES: dict[str, Case] = {
    "one process": Case(1),
    "one process, other features": Case(1, model=OTHER, other=Z_LOSS),
    "one process, recomputed": Case(1, other={"recompute": RecomputeConfig(policy="full")}, model=TWO),
    "one process, attention recomputed": Case(
        1, other={"recompute": RecomputeConfig(policy="selective")}, model=TWO
    ),
    "one process, experts and bias": Case(1, model=BIASED),
    "dp2": Case(2, {"dp_shard": 2}, ("fsdp",)),
    "dp2 plain optimizer": Case(2, {"dp_shard": 2}, ("fsdp",), TWO, PLAIN_OPTIMIZER),
    "dp2 nothing overlaps": Case(2, {"dp_shard": 2, "overlap": {"gradients": False}}, ("fsdp",), TWO),
    "replicas2": Case(2, {"dp_replicate": 2}, ("dp_replicate",), TWO, {"train": {"micro_batch": 1}}),
    "tp2": Case(2, {"tp": 2, "sequence_parallel": False}, ("tp",), OTHER, Z_LOSS),
    "tp2 sp": Case(2, {"tp": 2}, ("tp",), TWO),
    "pp2": Case(2, {"pp": 2}, ("pp",), TWO, {"train": {"micro_batch": 1}}),
    "pp2 tied": Case(2, {"pp": 2}, ("pp",), {**TWO, "tied_embeddings": True}),
    "pp2 interleaved": Case(2, {"pp": 2, "pipeline": INTERLEAVED}, ("pp",)),
    "cp2": Case(2, {"cp": 2}, ("cp", "fsdp"), TWO),
    "cp2 ulysses, documents": Case(2, {"cp": 2, "context": {"flavour": "ulysses"}}, ("cp",), TWO, DOCUMENTS),
    "ep2": Case(2, {"dp_shard": 2, "ep": 2}, ("ep", "fsdp"), EXPERTS),
    "ep2 bias": Case(2, {"dp_shard": 2, "ep": 2}, ("ep",), BIASED),
    "tp2 experts": Case(2, {"tp": 2}, ("tp",), EXPERTS),
    "replicas2 dp2": Case(4, {"dp_replicate": 2, "dp_shard": 2}, ("fsdp", "dp_replicate"), TWO),
    "dp2 tp2": Case(4, {"dp_shard": 2, "tp": 2}, ("fsdp", "tp"), TWO),
    "pp2 tp2": Case(4, {"pp": 2, "tp": 2}, ("pp", "tp"), TWO),
    "pp2 dp2": Case(4, {"pp": 2, "dp_shard": 2}, ("pp", "fsdp"), TWO),
    "cp2 tp2": Case(4, {"cp": 2, "tp": 2}, ("cp", "tp"), TWO),
    "pp2 dp2 ep2": Case(4, {"pp": 2, "dp_shard": 2, "ep": 2}, ("pp", "ep"), EXPERTS),
}


@dataclass
class Seen:
    losses: list[float]
    norms: list[float]
    gradients: Pieces
    parameters: Pieces
    sent_bytes: dict[str, int]
    phases: set[str]


def pieces(tensors: Any) -> Pieces:
    return [(t.name, t.place.full_shape, t.place.bounds, t.data.float().numpy().copy()) for t in tensors]


def engine_of(cfg: RunConfig) -> tuple[Engine, Mesh, Recorder]:
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    mesh = Mesh(Layout.resolve(cfg.parallel, world), torch.device("cpu"))
    recorder = Recorder(None, here(run_id="engines", rank=rank, world=world), watch_gc=False)
    mesh.ledger.recorder = recorder
    return build(cfg, mesh, recorder), mesh, recorder


def steps(
    cfg: RunConfig, engine: Engine, mesh: Mesh, first: int, count: int, **options: Any
) -> list[list[float]]:
    loader = Loader(
        build_source(cfg), mesh.layout, mesh.rank, cfg.train.micro_batch, start_step=first, prefetch=0
    )
    return [
        [float(x) for x in engine.train_step(s, next(loader), **options).scalars]
        for s in range(first, first + count)
    ]


def train(cfg: RunConfig) -> Seen:
    warnings.simplefilter("ignore")
    engine, mesh, recorder = engine_of(cfg)
    mesh.ledger.reset()  # what building it took
    recorder.begin()
    first = steps(cfg, engine, mesh, 0, 1)
    gradients = pieces(engine.gradients())
    rest = steps(cfg, engine, mesh, 1, STEPS - 1)
    phases = set(recorder.end_step(0).phases)
    sent: dict[str, int] = {}
    for (axis, _), traffic in mesh.ledger.traffic.items():
        sent[axis] = sent.get(axis, 0) + traffic.sent_bytes
    losses, norms = zip(*first, *rest, strict=True)
    return Seen(list(losses), list(norms), gradients, pieces(engine.parameters()), sent, phases)


@pytest.mark.parametrize("name", CASES)
def test_losses_gradients_and_weights_are_the_native_engines(name: str) -> None:
    case = CASES[name]
    cfg = case.config
    want = reference(cfg, STEPS)
    got = run_ranks(case.world, train, cfg, timeout_s=180.0)
    assert max(want.exact.losses) - min(want.exact.losses) > 1e-2, "the loss does not move: this compares dead models"
    for rank, seen in enumerate(got):
        assert seen.losses == got[0].losses, f"rank {rank} reports another loss"
        assert seen.norms == got[0].norms, f"rank {rank} reports another gradient norm"
        assert {"data", "forward", "backward", "optimizer"} <= seen.phases
        for axis in case.axes:
            assert seen.sent_bytes.get(axis, 0) > 0, f"rank {rank} sent nothing on {axis}: {seen.sent_bytes}"
        assert "other" not in seen.sent_bytes
    gradients, weights = ([getattr(seen, what) for seen in got] for what in ("gradients", "parameters"))
    want.check(Answer(got[0].losses, got[0].norms, [assemble(gradients)], assemble(weights)))


# ---- what a judge turns down, and who asks to stop -------------------------------------------------------


def judged(cfg: RunConfig) -> Any:
    warnings.simplefilter("ignore")
    engine, mesh, _ = engine_of(cfg)
    steps(cfg, engine, mesh, 0, 2)
    before = pieces(engine.state())
    loader = Loader(
        build_source(cfg), mesh.layout, mesh.rank, cfg.train.micro_batch, start_step=2, prefetch=0
    )
    told: list[tuple[float, float]] = []

    def refuse(loss: float, norm: float) -> bool:
        told.append((loss, norm))
        return False

    result = engine.train_step(2, next(loader), refuse, mesh.rank == 1)
    after = pieces(engine.state())
    same = [a[:3] == b[:3] and np.array_equal(a[3], b[3]) for a, b in zip(before, after, strict=True)]
    return (
        all(same),
        result.applied,
        engine.updates,
        float(result.asked),
        told == [tuple(result.scalars.tolist())],
    )


@pytest.mark.parametrize("model", [TWO, BIASED], ids=["dense", "experts with a bias"])
def test_a_refused_update_leaves_everything_as_it_was(model: dict[str, Any]) -> None:
    for seen in run_ranks(2, judged, Case(2, {"dp_shard": 2}, model=model).config):
        assert seen == (True, False, 2, 1.0, True)


# ---- checkpoints from one engine to the other ------------------------------------------------------------

BEFORE, AFTER = 3, 4
PAIRS: dict[str, tuple[EngineName, str, EngineName, str]] = {
    "megatron dp2 -> native": ("megatron", "dp2", "native", "one process"),
    "native dp2 -> megatron dp2 tp2": ("native", "dp2", "megatron", "dp2 tp2"),
    "megatron dp2 tp2 -> native dp2": ("megatron", "dp2 tp2", "native", "dp2"),
    "megatron pp2 dp2 ep2 -> megatron ep2": ("megatron", "pp2 dp2 ep2", "megatron", "ep2"),
    "native -> megatron experts and bias": (
        "native",
        "one process, experts and bias",
        "megatron",
        "ep2 bias",
    ),
}


def config_of(engine: EngineName, name: str) -> RunConfig:
    """One model with two layers for each pair: a checkpoint belongs to its model."""
    case = CASES[name]
    model = case.model if "moe" in case.model else TWO
    return Case(
        case.world, case.layout, (), model, {"checkpoint": CheckpointConfig(mode="sync")}
    ).config.model_copy(update={"engine": engine})


def save(cfg: RunConfig, root: str) -> tuple[list[list[float]], Pieces]:
    warnings.simplefilter("ignore")
    engine, mesh, _ = engine_of(cfg)
    steps(cfg, engine, mesh, 0, BEFORE)
    header = {"layout": {}, "config": cfg.model_dump(mode="json"), "lineage": "test", "engine": cfg.engine}
    saver = Saver(cfg.checkpoint, Folder(root), Ranks(), lambda: list(engine.state()), header)
    saver.save(Progress(BEFORE, BEFORE, engine.updates))
    saver.close()
    saved = pieces(engine.state())
    return steps(cfg, engine, mesh, BEFORE, AFTER), saved


def resume(cfg: RunConfig, root: str) -> tuple[list[list[float]], Pieces]:
    warnings.simplefilter("ignore")
    engine, mesh, _ = engine_of(cfg)
    steps(cfg, engine, mesh, 0, 1)  # so that there is something to overwrite
    found = find(Folder(root), "auto", Ranks())
    assert found is not None
    load(found, engine, Ranks())
    assert engine.updates == BEFORE
    return steps(cfg, engine, mesh, BEFORE, AFTER), pieces(engine.state())


@pytest.mark.parametrize("name", PAIRS)
def test_a_checkpoint_of_one_engine_goes_on_in_the_other(name: str, tmp_path: Path) -> None:
    first, one, second, two = PAIRS[name]
    saved = run_ranks(CASES[one].world, save, config_of(first, one), str(tmp_path))
    resumed = run_ranks(CASES[two].world, resume, config_of(second, two), str(tmp_path))
    want = reference(config_of(first, one), BEFORE + AFTER)
    for run in (saved[0][0], resumed[0][0]):
        losses, norms = zip(*run, strict=True)
        assert len(losses) == AFTER
        want.check_losses(losses, norms, first=BEFORE)
    # Also what no loss of a few steps would show: every moment has its name and its place.
    held = assemble([state for _, state in saved])
    assert any("@exp_avg_sq" in tensor and value.any() for tensor, value in held.items())
    assert assemble([state for _, state in resumed]).keys() == held.keys()


# ---- a run from the command line -------------------------------------------------------------------------

RUN = """
import sys, warnings
warnings.simplefilter("ignore")
from trainsys.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_run_has_its_waterfall(tmp_path: Path) -> None:
    """`trainsys train engine=megatron` from a config, then `trainsys explain`: the same terms as any run's."""
    settings = [
        "engine=megatron", "model.n_layers=2", "model.d_model=32", "model.n_heads=4", "model.d_ff=64",
        "data.source=synthetic", "train.seq_len=32", "train.global_batch=4", "train.steps=4",
        "train.dtype=fp32", "train.device=cpu", f"telemetry.out={tmp_path}", "telemetry.console=plain",
    ]  # fmt: skip
    config = tmp_path / "run.yaml"
    config.write_text("name: mega\nmodel: {n_layers: 2, d_model: 32, n_heads: 4, d_ff: 64, vocab: 300}\n")
    done = subprocess.run(
        [sys.executable, "-c", RUN, "train", str(config), *settings],
        capture_output=True, text=True, cwd=ROOT, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    (folder,) = [p.parent for p in tmp_path.glob("*/events") if not p.parent.is_symlink()]
    told = subprocess.run(
        [sys.executable, "-m", "trainsys", "explain", str(folder)],
        capture_output=True, text=True, cwd=ROOT, check=True, timeout=60,
    ).stdout  # fmt: skip
    for term in ("forward", "backward", "optimizer"):
        assert term in told.lower(), told


def test_an_engine_that_is_not_installed_is_one_line_that_names_the_extra() -> None:
    code = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("megatron", "deepspeed"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
import torch
from trainsys.engines import build
from trainsys.errors import UserError
from trainsys.layout import Layout
from trainsys.layout.refused.page import run_of
from trainsys.parallel.mesh import Mesh
for engine in ("megatron", "deepspeed"):
    try:
        build(run_of({"engine": engine}), Mesh(Layout(), torch.device("cpu")), None)
    except UserError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    lines = done.stdout.splitlines()
    assert len(lines) == 2, done.stderr
    for engine, line in zip(("megatron", "deepspeed"), lines, strict=True):
        assert f"pip install 'trainsys[{engine}]'" in line
        assert "engine=native" in line
