"""Does a layout give the answer that one process gives? One helper for every parallel layout.

``check(cfg, world, ...)`` trains a few steps on ``world`` ranks and on one, from the same seed and so the same
weights and batches, and compares loss, every gradient and the updated weights, within what rounding explains
(``support.rounding``). It also asserts what equality alone cannot: the gradient is not zero, the loss moves, copies
of a shard agree, every element of every parameter is held by somebody, and the axes under test communicated.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from support.ranks import run_ranks
from support.rounding import CEILING, Answer, Reference, in_float64
from trainsys.config.run import RunConfig
from trainsys.data import Loader, build_source
from trainsys.engines.native import NativeEngine
from trainsys.layout import Layout
from trainsys.parallel.mesh import Mesh
from trainsys.telemetry.recorder import Recorder, here

BF16_CEILING = 0.1
"""bf16 keeps 8 bits, one rounding is 4e-3: the noise of a gradient through two layers."""

Pieces = list[tuple[str, tuple[int, ...], tuple[tuple[int, int], ...], np.ndarray]]


@dataclass
class Trace:
    """What one rank saw over a few steps."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    gradients: list[Pieces] = field(default_factory=list)
    parameters: Pieces = field(default_factory=list)
    calls: dict[str, int] = field(default_factory=dict)
    sent_bytes: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Whole(Answer):
    """The same, put together from all ranks."""

    ranks: list[Trace]


def train_on_this_rank(cfg: RunConfig, steps: int) -> Trace:
    """Runs on each rank (and, for the reference, in the test's own process)."""
    torch.manual_seed(1234 + (dist.get_rank() if dist.is_initialized() else 0))  # must not matter
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    layout = Layout.resolve(cfg.parallel, world)
    mesh = Mesh(layout, torch.device("cpu"))
    engine = NativeEngine(
        cfg, mesh, Recorder(None, here(run_id="parity", rank=rank, world=world), watch_gc=False)
    )
    trace = Trace()
    with Loader(build_source(cfg), layout, rank, cfg.train.micro_batch) as loader:
        for step in range(steps):
            result = engine.train_step(step, next(loader))
            loss, norm = result.scalars.tolist()
            trace.losses.append(loss)
            trace.norms.append(norm)
            trace.gradients.append(_pieces(engine.gradients()))
    trace.parameters = _pieces(engine.parameters())
    for (axis, _), traffic in mesh.ledger.traffic.items():
        trace.calls[axis] = trace.calls.get(axis, 0) + traffic.calls
        trace.sent_bytes[axis] = trace.sent_bytes.get(axis, 0) + traffic.sent_bytes
    return trace


def _pieces(tensors: Iterable[Any]) -> Pieces:
    """At least in fp32: what numpy has no type for is widened."""
    wide = torch.promote_types
    return [
        (t.name, t.place.full_shape, t.place.bounds, t.data.to(wide(t.data.dtype, torch.float32)).numpy().copy())
        for t in tensors
    ]


def assemble(by_rank: list[Pieces]) -> dict[str, np.ndarray]:
    """Full tensors from every rank's pieces; copies must agree to the bit, and nothing may be missing."""
    full: dict[str, np.ndarray] = {}
    for pieces in by_rank:
        for name, shape, bounds, data in pieces:
            whole = full.setdefault(name, np.full(shape, np.nan, data.dtype))
            box = tuple(slice(a, b) for a, b in bounds)
            held = whole[box]
            assert held.shape == data.shape, f"{name}: piece {data.shape} at {bounds} of {shape}"
            known = ~np.isnan(held)
            assert np.array_equal(held[known], data[known]), (
                f"{name}: copies of {bounds} differ between ranks"
            )
            whole[box] = data
    for name, whole in full.items():
        assert not np.isnan(whole).any(), f"{name}: some elements are nobody's, or not a number"
    return full


def whole(traces: list[Trace]) -> Whole:
    first = traces[0]
    for rank, trace in enumerate(traces):
        assert trace.losses == first.losses, f"rank {rank} reports another loss than rank 0"
        assert trace.norms == first.norms, f"rank {rank} reports another gradient norm than rank 0"
    steps = range(len(first.losses))
    gradients = [assemble([t.gradients[s] for t in traces]) for s in steps]
    return Whole(first.losses, first.norms, gradients, assemble([t.parameters for t in traces]), traces)


@lru_cache(maxsize=64)
def _alone(cfg_json: str, steps: int, float64: bool) -> Whole:
    with in_float64() if float64 else nullcontext():
        return whole([train_on_this_rank(RunConfig.model_validate_json(cfg_json), steps)])


@lru_cache(maxsize=64)
def _reference(cfg_json: str, steps: int) -> Reference:
    cfg = RunConfig.model_validate_json(cfg_json)
    rows = cfg.model_copy(update={"train": cfg.train.model_copy(update={"micro_batch": 1})})
    rounded = [_alone(c.model_dump_json(), steps, float64=False) for c in (cfg, rows)]
    ceiling = CEILING if cfg.train.dtype == "fp32" else BF16_CEILING
    return Reference.of(_alone(cfg_json, steps, float64=True), rounded, cfg.optim.lr, ceiling)


def plain(cfg: RunConfig) -> RunConfig:
    """One process, whole micro-batches of the same global batch, nothing recomputed: the plainest run there is."""
    return cfg.model_copy(
        update={
            "parallel": type(cfg.parallel)(dp_shard=1),
            "recompute": type(cfg.recompute)(),
            "train": cfg.train.model_copy(update={"micro_batch": cfg.train.global_batch, "compile": False}),
        }
    )


def reference(cfg: RunConfig, steps: int) -> Reference:
    """What ``cfg`` must compute, whatever its layout, and how closely."""
    return _reference(plain(cfg).model_dump_json(), steps)


def check(
    cfg: RunConfig, world: int, *, axes: Iterable[str] = (), steps: int = 5, timeout_s: float = 60.0
) -> Whole:
    """Train under ``cfg.parallel`` on ``world`` ranks and compare with one process; returns the parallel run.

    ``axes``: those that must have communicated.
    """
    want = reference(cfg, steps)
    if world > 1:
        got = whole(run_ranks(world, train_on_this_rank, cfg, steps, timeout_s=timeout_s))
    else:
        got = whole([train_on_this_rank(cfg, steps)])
    losses = want.exact.losses
    assert abs(losses[0] - losses[-1]) > 1e-3, "the loss does not move: this compares dead models"
    for step, gradients in enumerate(want.exact.gradients):
        for name, gradient in gradients.items():
            assert np.any(gradient), f"step {step}: the gradient of {name} is zero"
    gaps = want.check(got)
    for rank, trace in enumerate(got.ranks):
        for axis in axes:
            assert trace.sent_bytes.get(axis, 0) > 0, f"rank {rank} sent nothing on {axis}"
    most = max(gaps.gradients.values()), max(gaps.weights.values())
    RESULTS.append(ParityResult(cfg, world, steps, got.ranks[0].sent_bytes, gaps.loss, *most))
    return got


@dataclass
class ParityResult:
    """How far a layout was from one process, at most: relative, gradients and weights in the 2-norm."""

    cfg: RunConfig
    world: int
    steps: int
    sent_bytes: dict[str, int]
    """By rank 0, by axis, over all steps."""
    loss: float = 0.0
    gradient: float = 0.0
    weight: float = 0.0


RESULTS: list[ParityResult] = []
"""Every comparison of this session that held; ``--parity-table`` makes a page of them."""


def table() -> str:
    """The page ``docs/parity.md`` from this session's results."""
    lines = [
        "# Parity",
        "",
        "Each row: a small model trained under the layout and in one process, from the same weights on the same",
        "batches; the largest relative difference over the steps of the loss, of any gradient and of any updated",
        "weight (2-norm), and the bytes rank 0 sent by axis. Made by",
        "`launchers/test.sh tests/parallel --parity-table docs/parity.md`.",
        "",
        f"{len(RESULTS)} layouts.",
        "",
        "| layout | ranks | with | loss | gradient | weight | sent, KB |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in sorted(RESULTS, key=lambda r: (r.world, _layout(r), _options(r))):
        sent = ", ".join(
            f"{axis} {n / 1e3:.0f}" for axis, n in sorted(r.sent_bytes.items()) if axis != "world"
        )
        lines.append(
            f"| {_layout(r)} | {r.world} | {_options(r)} | {r.loss:.0e} | {r.gradient:.0e} | {r.weight:.0e} | {sent} |"
        )
    return "\n".join(lines) + "\n"


def _layout(r: ParityResult) -> str:
    return Layout.resolve(r.cfg.parallel, r.world).describe(r.cfg.parallel)


def _options(r: ParityResult) -> str:
    """What the run sets beside its layout, of the things that could change the answer."""
    said: list[str] = []
    plain, cfg = type(r.cfg.parallel)(), r.cfg
    for section in ("context", "pipeline", "expert", "shard", "overlap"):
        ours, default = getattr(cfg.parallel, section, None), getattr(plain, section, None)
        if ours is not None and ours != default:
            said += [
                f"{section}.{k}={str(v).lower() if isinstance(v, bool) else v}"
                for k, v in ours.model_dump(mode="json").items()
                if v != getattr(default, k, None)
            ]
    if not cfg.parallel.fsdp.reshard_after_forward:
        said.append("ZeRO-2")
    if cfg.parallel.fsdp.reduce_each_micro_batch:
        said.append("reduced each micro-batch")
    if cfg.parallel.tp > 1 and not cfg.parallel.loss_parallel:
        said.append("whole logits")
    if cfg.recompute.policy != "none":
        said.append(f"recompute {cfg.recompute.policy}")
    said += [
        f"{name}={value}"
        for name in ("stream_ffn", "stream_attention")
        if (value := getattr(cfg.recompute, name))
    ]
    if cfg.train.loss_chunk:
        said.append(f"loss_chunk={cfg.train.loss_chunk}")
    if cfg.model.tied_embeddings:
        said.append("tied")
    if cfg.model.parallel_block:
        said.append("parallel block")
    if cfg.model.moe is not None:
        said.append(f"MoE {cfg.model.moe.n_experts} experts")
    if cfg.model.sliding_window:
        said.append("window")
    if cfg.data.document_mask:
        said.append("documents")
    if cfg.train.dtype != "fp32":
        said.append(cfg.train.dtype)
    if cfg.train.compile:
        said.append("compiled")
    said.append(f"micro-batch {cfg.train.micro_batch} of {cfg.train.global_batch}")
    return ", ".join(said)
