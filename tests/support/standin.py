"""A run whose compute sleeps: real ranks, real collectives, real recorder, so that times can be known beforehand.

Two cores serve eight sleeping ranks. Faults are put in here, around the stand-in, never in the product. What was
really injected is measured where it is injected: a loaded machine sleeps longer than it was asked to.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist

from trainsys.comm import ops
from trainsys.comm.ledger import Ledger
from trainsys.layout import Layout
from trainsys.parallel.mesh import Mesh
from trainsys.telemetry.events import Flops, RunStart
from trainsys.telemetry.recorder import Recorder

RANKS_A_NODE = 2


@dataclass(frozen=True)
class Fault:
    """``kind``: compute (``amount``: share of all work, forward and backward), forward, data, optimizer (seconds),
    gc (seconds, every ``every`` steps), link (seconds a call on ``axis``), save (a stall every ``every`` steps).

    ``ranks``: whom it hits; None: all. ``first``: the step from which it does.
    """

    kind: str
    amount: float
    ranks: tuple[int, ...] | None = None
    axis: str = ""
    first: int = 0
    every: int = 1


@dataclass(frozen=True)
class Standin:
    """A step: data, then per micro-batch and layer forward and backward with a tp and an fsdp collective each."""

    layout: tuple[tuple[str, int], ...]
    steps: int = 40
    micro_batches: int = 2
    layers: int = 2
    data_s: float = 0.0005
    forward_s: float = 0.002
    backward_s: float = 0.004
    optimizer_s: float = 0.002
    noise: float = 0.01
    seed: int = 0
    padded_share: float = 0.0
    """Share of each step's tokens that are padding; compute sleeps for them too."""
    recompute_share: float = 0.0
    """Share of forward's time that backward sleeps again; the FLOPs say so."""
    faults: tuple[Fault, ...] = field(default=())
    peak_flops: float | None = 1e9
    timed_recompute: bool = False
    """Whether recomputation is a phase of its own."""


class _Throttled(Ledger):
    """A ledger that makes the group of some axis slow, from inside the span as a slow link would."""

    def __init__(self) -> None:
        super().__init__()
        self.slow: dict[str, float] = {}
        self.slept: list[float] = []

    @contextmanager
    def span(self, axis: str, op: str, sent_bytes: int) -> Iterator[None]:
        with super().span(axis, op, sent_bytes):
            if axis in self.slow:
                self.slept.append(_sleep(self.slow[axis]))
            yield


def _sleep(seconds: float) -> float:
    t0 = time.perf_counter()
    if seconds > 0:
        time.sleep(seconds)
    return time.perf_counter() - t0


@lru_cache(maxsize=32)
def _mesh(layout: Layout) -> Mesh:
    return Mesh(layout, torch.device("cpu"), _Throttled())


def run(spec: Standin, run_dir: str) -> dict[str, list[float]]:
    """Run ``spec`` on this rank, writing events to ``run_dir``; injected seconds by kind, a value a step (of a slow
    link also by call, from the first step that has it)."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    layout = Layout(**dict(spec.layout))
    mesh = _mesh(layout)
    ledger: Any = mesh.ledger
    ledger.slow, ledger.slept = {}, []
    recorder = Recorder(
        run_dir,
        RunStart(
            run_id="standin", rank=rank, world=layout.world, t0_wall=time.time(), t0_mono=time.perf_counter(),
            hostname=f"node{rank // RANKS_A_NODE}", layout={a: getattr(layout, a) for a in (
                "pp", "dp_replicate", "dp_shard", "cp", "tp", "ep")}, coords=dict(layout.coords(rank)),
            peak_flops=spec.peak_flops, peak_label="of a stand-in", steps=spec.steps,
        ),
    )  # fmt: skip
    ledger.recorder = recorder
    rng = random.Random(spec.seed * 1009 + rank)
    small = torch.ones(8)
    gc.collect()
    gc.disable()  # only the collections that are injected
    told: dict[str, list[float]] = {}
    if dist.is_initialized():
        dist.barrier()
    recorder.begin()
    for step in range(spec.steps):
        mine = [f for f in spec.faults if step >= f.first and (f.ranks is None or rank in f.ranks)]
        injected = dict.fromkeys({f.kind for f in spec.faults}, 0.0)
        ledger.slow = {f.axis: f.amount for f in mine if f.kind == "link"}
        ledger.slept = []
        _step(spec, mesh, recorder, rng, mine, injected, small, step)
        if ledger.slept:
            injected["link"] = sum(ledger.slept)
            injected.update((f"link/{call}", seconds) for call, seconds in enumerate(ledger.slept))
        tokens = round(1000 * (1 - spec.padded_share))
        # As the engine counts: forward is a third of model FLOPs and of those of padding; then what is repeated.
        model = 3e6 * (1 - spec.padded_share)
        hardware = 3e6 + spec.recompute_share * 1e6
        recorder.end_step(step, tokens=tokens, tokens_padded=1000 - tokens, loss=1.0 / (step + 1),
                          flops=Flops(model=model, palm=None, hardware=hardware))  # fmt: skip
        for kind, seconds in injected.items():
            told.setdefault(kind, []).append(seconds)
    recorder.finish("done")
    ledger.recorder = None
    gc.enable()
    return told


def _step(
    spec: Standin, mesh: Mesh, recorder: Recorder, rng: random.Random, faults: list[Fault],
    injected: dict[str, float], small: torch.Tensor, step: int,
) -> None:  # fmt: skip
    amount = {f.kind: f.amount for f in faults}
    slow = 1.0 + amount.get("compute", 0.0)

    def work(seconds: float) -> float:
        return _sleep(seconds * slow * max(0.0, rng.gauss(1.0, spec.noise)))

    def inject(kind: str) -> None:
        if kind in amount:
            injected[kind] += _sleep(amount[kind])

    for f in faults:
        if f.kind == "save" and step % f.every == 0:
            with recorder.stall("checkpoint"):
                injected["save"] += _sleep(f.amount)
    with recorder.phase("data"):
        work(spec.data_s)
        inject("data")
    for _ in range(spec.micro_batches):
        with recorder.phase("forward"):
            inject("forward")
            for _ in range(spec.layers):
                ops.all_reduce_(small, mesh["tp"])
                work(spec.forward_s)
        with recorder.phase("backward"):
            for _ in range(spec.layers):
                if spec.recompute_share:
                    with recorder.phase("recompute") if spec.timed_recompute else nullcontext():
                        again = work(spec.forward_s * spec.recompute_share)
                    injected["recompute"] = injected.get("recompute", 0.0) + again
                work(spec.backward_s)
                ops.all_reduce_(small, mesh["fsdp"])
    for f in faults:
        if f.kind == "gc" and (step + 7 * mesh.rank) % f.every == 0:
            injected["gc"] += _collect(f.amount)
    with recorder.phase("optimizer"):
        work(spec.optimizer_s)
        inject("optimizer")
        ops.all_reduce_(small, mesh["world"])


def _collect(seconds: float) -> float:
    """A real collection that lasts about so long: a callback of the collector's own, run within it, sleeps."""
    spent = 0.0

    def pause(phase: str, info: dict[str, int]) -> None:
        nonlocal spent
        if phase == "start":
            spent += _sleep(seconds)

    gc.callbacks.append(pause)  # after the recorder's, so its clock runs already
    gc.collect(0)
    gc.callbacks.remove(pause)
    return spent
