"""Training under every context-parallel flavour, alone and with the other axes, is training in one process."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from support.parity import check
from trainsys.config.model import ModelConfig
from trainsys.config.run import (
    ContextConfig,
    DataConfig,
    OptimConfig,
    ParallelConfig,
    RecomputeConfig,
    RunConfig,
    TrainConfig,
)
from trainsys.errors import UserError
from trainsys.layout import Layout

SEQ = 32


@dataclass(frozen=True)
class Case:
    flavour: str
    cp: int
    other: dict[str, Any] = field(default_factory=dict)
    """the other axes"""
    context: dict[str, Any] = field(default_factory=dict)
    window: int | None = None
    docs: bool = False
    recompute: str = "none"
    kv_heads: int = 2
    train: dict[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> str:
        parts = [f"{self.flavour}{self.cp}", *(f"{k}{v}" for k, v in {**self.other, **self.context}.items())]
        parts += [f"window{self.window}"] * (self.window is not None) + ["docs"] * self.docs
        return "-".join(parts + [self.recompute] * (self.recompute != "none") + [f"kv{self.kv_heads}"])

    def config(self, text: Path) -> RunConfig:
        data = DataConfig(source="synthetic", prefetch=0)
        if self.docs:
            data = DataConfig(
                source="jsonl", path=str(text), document_mask=True, prefetch=0, cache_dir=str(text.parent)
            )
        parallel = {"dp_shard": 1, "cp": self.cp, **self.other}
        rows = parallel["dp_shard"] * parallel.get("dp_replicate", 1)
        train = {"global_batch": 2 * rows, "micro_batch": 2, **self.train}
        return RunConfig(
            model=ModelConfig(
                n_layers=2, d_model=32, n_heads=4, n_kv_heads=self.kv_heads, d_ff=48, max_seq_len=SEQ,
                vocab=264 if self.docs else 72, qk_norm=True, init_std=0.1, sliding_window=self.window,
            ),
            parallel=ParallelConfig(
                **parallel, context=ContextConfig(flavour=self.flavour, **self.context)  # type: ignore[arg-type]
            ),
            data=data,
            optim=OptimConfig(lr=2e-3, warmup_steps=2, z_loss=1e-3),
            recompute=RecomputeConfig(policy=self.recompute),  # type: ignore[arg-type]
            train=TrainConfig(seq_len=SEQ, dtype="fp32", device="cpu", steps=3, **train),
        )  # fmt: skip


FLAVOURS = ("ring", "all_gather", "pass_q", "token_ring", "dist_flash", "ulysses")
TP, TP_SP = {"tp": 2, "sequence_parallel": False}, {"tp": 2}
CASES = [
    *(Case(f, 2) for f in FLAVOURS),
    *(Case(f, 4, docs=True, recompute="full") for f in FLAVOURS),
    *(Case(f, 2, {"dp_shard": 2}, window=6, docs=True) for f in FLAVOURS),
    *(Case(f, 2, TP_SP, kv_heads=4) for f in FLAVOURS),
    Case("ring", 4, context={"balance": "contiguous"}, window=6),
    Case("ring", 2, TP),
    Case("ring", 2, {"dp_replicate": 2}),
    Case("ring", 2, {"dp_shard": 2}, recompute="selective", train={"micro_batch": 1}),
    Case("all_gather", 2, {"dp_shard": 2, "tp": 2}, docs=True),
    Case("ring", 2, {"dp_replicate": 2, "tp": 2}, window=9),
    Case("ulysses", 4, kv_heads=1),
    Case("two_d", 4, context={"head_degree": 2}, docs=True),
    Case("two_d", 4, context={"head_degree": 2, "placement": "context_first"}, recompute="full", window=6),
    Case("two_d", 8, context={"head_degree": 2, "inner_ring": 2}, docs=True),
    Case("two_d", 4, TP_SP, {"head_degree": 2}),
    Case("dist_flash", 8),
    # What is started is waited for at once.
    *(Case(f, 4, {"overlap": {"context": False}}) for f in FLAVOURS),
    Case("two_d", 8, {"overlap": {"context": False}}, {"head_degree": 2, "inner_ring": 2}),
]
COMPILED = [Case("ring", 2, train={"compile": True}), Case("ulysses", 2, {"dp_shard": 2}, train={"compile": True})]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of 3 to 40 bytes: several in most rows, borders anywhere."""
    rng, path = random.Random(3), tmp_path_factory.mktemp("text") / "text.jsonl"
    lines = ["".join(rng.choices("abcdefgh ", k=rng.randint(3, 40))) for _ in range(200)]
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return path


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_same_answer_as_one_process(case: Case, text: Path) -> None:
    cfg = case.config(text)
    world = Layout.required_world(cfg.parallel)
    assert world is not None
    assert not Layout.resolve(cfg.parallel, world).validate(cfg.model, cfg.train, cfg.parallel)
    axes = ["cp", "fsdp", *(axis for axis in ("tp", "dp_replicate") if axis in case.other)]
    check(cfg, world, axes=axes, steps=3)


@pytest.mark.timeout(400)
@pytest.mark.parametrize("case", COMPILED, ids=lambda c: c.id)
def test_compiled_blocks_give_the_same_answer(case: Case, text: Path) -> None:
    """Attention is where graphs break: what moves keys and heads runs as it is."""
    cfg = case.config(text)
    check(cfg, Layout.required_world(cfg.parallel) or 0, axes=("cp",), steps=2, timeout_s=300)


def test_validate_refuses_by_flavour() -> None:
    """The table itself is tested in tests/context; here, that a run is refused by it, and warned."""
    cfg = Case("ulysses", 3).config(Path())
    with pytest.raises(
        UserError, match=r"cp=3 ranks cannot share the 4 query heads.*\n.*seq_len=32 does not"
    ):
        Layout(cp=3).validate(cfg.model, cfg.train, cfg.parallel)
    with pytest.raises(UserError, match="cannot share the 1 query heads"):  # what tp leaves
        Layout(cp=2, tp=4).validate(cfg.model.model_copy(update={"n_kv_heads": 4}), cfg.train, cfg.parallel)
    (warning,) = Layout().validate(cfg.model, cfg.train, cfg.parallel)
    assert "parallel.context is set but parallel.cp=1" in warning
