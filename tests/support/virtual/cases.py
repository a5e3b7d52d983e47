"""Layouts of every axis, of a model whose products take long enough to hide communication behind them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from support.apart import apart
from support.dry_cases import run, world
from support.virtual.trace import Trace
from trainsys.config.run import RunConfig
from trainsys.layout import Layout

MODEL = {
    "n_layers": 2, "d_model": 2048, "n_heads": 16, "n_kv_heads": 8, "d_ff": 6144, "vocab": 8192, "max_seq_len": 4096,
}  # fmt: skip
FOUR = {**MODEL, "n_layers": 4}
TRAIN = {"dtype": "bf16", "seq_len": 2048}
ONE_MICRO = {"global_batch": 2}
"""of two data ranks"""


@dataclass(frozen=True)
class Case:
    cfg: RunConfig
    ranks: tuple[int, ...]
    """that are recorded: all that messages go between, and others that run the same program"""


def case(*ranks: int, train: dict[str, Any] | None = None, prefetch: int = 1, **run_of: Any) -> Case:
    """Other keywords are of `support.dry_cases.run`."""
    cfg = run(**{"model": MODEL, **run_of, "train": {**TRAIN, **(train or {})}})
    fsdp = cfg.parallel.fsdp.model_copy(update={"prefetch": prefetch})
    parallel = cfg.parallel.model_copy(update={"fsdp": fsdp})
    return Case(cfg.model_copy(update={"parallel": parallel}), ranks)


CASES = {
    "fsdp": case(0, 3, dp_shard=4, model={**MODEL, "n_layers": 3}),
    "no-prefetch": case(0, dp_shard=4, model={**MODEL, "n_layers": 3}, prefetch=0),
    "hsdp": case(0, 1, dp_replicate=2, dp_shard=2),
    "replicas": case(0, 1, dp_replicate=2),
    "sp": case(0, 1, tp=2, dp_shard=2),
    "cp-ring": case(0, 1, dp_shard=2, cp=2, train=ONE_MICRO),
    "cp-ulysses": case(0, 1, dp_shard=2, cp=2, flavour="ulysses", train=ONE_MICRO),
    "pp-1f1b": case(0, 2, pp=2, dp_shard=2, train={"global_batch": 8}),
    "pp-interleaved": case(0, 1, pp=2, schedule="interleaved_1f1b", model=FOUR),
    "ep": case(0, 1, dp_shard=4, ep=2, moe=True),
    "pp-sp-fsdp": case(0, 4, 5, pp=2, dp_shard=2, tp=2),
    "hsdp-cp": case(0, 1, dp_replicate=2, cp=2, train=ONE_MICRO),
}
SLOW = {
    "zero2": case(0, 1, dp_replicate=2, shard={"optim": "over_replicas", "grads": "over_replicas"}),
    "async-tp": case(0, 1, tp=2, overlap={"tensor": True}),
    "cp-all_gather": case(0, 1, cp=2, flavour="all_gather"),
    "cp-ring4": case(0, 1, 2, 3, cp=4),
    "cp-pass_q": case(0, 1, 2, 3, cp=4, flavour="pass_q"),
    "cp-token_ring": case(0, 1, 2, 3, cp=4, flavour="token_ring"),
    "cp-dist_flash": case(0, 1, 2, 3, cp=4, flavour="dist_flash"),
    "cp-two_d": case(0, 1, 2, 3, cp=4, flavour="two_d", context={"head_degree": 2}),
    "pp-zero_bubble": case(0, 1, pp=2, schedule="zero_bubble"),
    "pp-zbv": case(0, 2, pp=2, dp_shard=2, schedule="zbv", model=FOUR, train={"global_batch": 8}),
    "pp-dualpipev": case(0, 2, pp=2, dp_shard=2, schedule="dualpipev", model=FOUR, train={"global_batch": 8}),
    "pp-blockwise": case(0, 2, pp=2, dp_shard=2, schedule="blockwise", model=FOUR, train={"global_batch": 8}),
    "pp4": case(0, 1, 2, 3, pp=4, model=FOUR),
    "pp-tied": case(0, 1, pp=2, model={**MODEL, "tied_embeddings": True}),
    "pp-cp": case(0, 1, 2, 3, pp=2, cp=2),
    "sp-full": case(0, 1, tp=2, dp_shard=2, recompute="full"),
    "ep-pp": case(0, 2, pp=2, dp_shard=2, ep=2, moe=True),
}


@cache
def traces(name: str) -> list[Trace]:
    """Traces of a case's ranks, in the order in which it names them."""
    found: list[Trace] = apart(recorded, {**CASES, **SLOW}[name])
    return found


def recorded(of: Case) -> list[Trace]:
    """In a process without a process group."""
    from support.virtual.record import record

    size = world(of.cfg)
    assert Layout.resolve(of.cfg.parallel, size).world == size
    return [record(of.cfg, size, rank) for rank in of.ranks]
