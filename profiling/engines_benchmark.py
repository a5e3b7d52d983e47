"""Every engine, and plain torch, on one tiny model: tokens/s side by side at equal layouts, and their losses.

Each runner is a group of forked processes that stay, one thread each; runners take turns, a few steps a turn, so that
whatever else the machine does hits all alike. What counts are ratios of medians at one layout, not tokens/s.

    python profiling/engines_benchmark.py --rounds 7 --out profiling/results/engines.json

A runner that can't be made is in the result with its reason. torchtitan is taken where it can be imported
(``pip install --no-deps --target DIR torchtitan spmd_types torch_checkpointing tyro ...``, then PYTHONPATH=DIR).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import os
import platform
import statistics
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import fully_shard

from trainsys.capabilities import refuse_unable
from trainsys.config.run import RunConfig
from trainsys.data import Loader, build_source
from trainsys.engines import build
from trainsys.errors import UserError
from trainsys.layout import Layout
from trainsys.models.decoder import Decoder
from trainsys.models.init import init_weights
from trainsys.optim.schedule import learning_rate
from trainsys.parallel.mesh import Mesh
from trainsys.telemetry.recorder import Recorder, here

ROWS, SEQ = 16, 256
TOKENS = ROWS * SEQ
MODEL = {"n_layers": 4, "d_model": 256, "n_heads": 8, "d_ff": 768, "vocab": 2048, "max_seq_len": SEQ}

# layout -> (ranks, our axes, sequences a micro-batch)
LAYOUTS: dict[str, tuple[int, dict[str, Any], int]] = {
    "one process": (1, {}, 16),
    "replicas": (2, {"dp_replicate": 2}, 8),
    "sharded": (2, {"dp_shard": 2}, 8),
    # ZeRO-2: weights whole everywhere, gradients and optimizer states sharded.
    "sharded states": (
        2, {"dp_replicate": 2, "shard": {"grads": "over_replicas", "optim": "over_replicas"}}, 8,
    ),
    "tp": (2, {"tp": 2, "sequence_parallel": False}, 16),
    "tp+sp": (2, {"tp": 2}, 16),
    "pp": (2, {"pp": 2}, 4),
}
# (layout, runner, settings of the engine beside the layout)
RUNNERS: list[tuple[str, str, dict[str, Any]]] = [
    *((layout, "native", {}) for layout in LAYOUTS if layout != "pp"),
    # The schedule that has no bubble to speak of is one of ours alone; beside it the one that both have.
    ("pp", "native", {"parallel": {"dp_shard": 1, "pp": 2, "pipeline": {"schedule": "zero_bubble"}}}),
    ("pp", "native 1F1B", {}),
    *((layout, "megatron", {}) for layout in LAYOUTS if not layout.startswith("sharded")),
    # What its distributed optimizer shards: Megatron-Core keeps weights whole.
    ("sharded states", "megatron", {"parallel": {"dp_shard": 2}}),
    *((layout, "deepspeed", {}) for layout in LAYOUTS),
    ("one process", "torch", {}),
    ("replicas", "torch DDP", {}),
    ("sharded", "torch FSDP2", {}),
    *((layout, "torchtitan", {}) for layout in ("one process", "sharded", "tp+sp")),
]
Step = Callable[[int], float]
"""0-based step -> loss"""


def config(layout: str, engine: str, settings: dict[str, Any]) -> RunConfig:
    _, axes, micro = LAYOUTS[layout]
    return RunConfig.model_validate(
        {
            "engine": engine,
            "model": MODEL,
            "parallel": {"dp_shard": 1, **axes},
            "data": {"source": "synthetic", "prefetch": 0},
            "optim": {"lr": 1e-3, "warmup_steps": 2},
            "train": {
                "seq_len": SEQ, "global_batch": ROWS, "micro_batch": micro, "dtype": "fp32", "device": "cpu",
                "steps": 1000,
            },
            **settings,
        }
    )  # fmt: skip


def engine_step(cfg: RunConfig) -> Step:
    """One of ours, called as the training loop calls it."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    layout = Layout.resolve(cfg.parallel, world)
    refuse_unable(cfg, layout)
    layout.validate(cfg.model, cfg.train, cfg.parallel)
    mesh = Mesh(layout, torch.device("cpu"))
    recorder = Recorder(None, here(run_id="bench", rank=rank, world=world), watch_gc=False)
    mesh.ledger.recorder = recorder
    engine = build(cfg, mesh, recorder)
    loader = Loader(build_source(cfg), layout, rank, cfg.train.micro_batch, prefetch=0)

    def step(number: int) -> float:
        with recorder.phase("data"):
            data = next(loader)
        loss = float(engine.train_step(number, data).scalars[0])
        recorder.end_step(number)
        return loss

    return step


def torch_step(cfg: RunConfig, kind: str) -> Step:
    """What one writes by hand: the plain model, torch's own data parallelism, AdamW and clipping."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    with torch.device("meta"):
        plain = Decoder(cfg.model)
    if kind == "torch FSDP2":
        for block in plain.layers.values():
            fully_shard(block)
        fully_shard(plain)
    init_weights(plain, cfg.model, cfg.train.seed, device="cpu")
    model: nn.Module = nn.parallel.DistributedDataParallel(plain) if kind == "torch DDP" else plain
    return by_hand(cfg, model, lambda tokens, positions: model(tokens, positions), rank, world)


def by_hand(
    cfg: RunConfig, model: nn.Module, logits_of: Callable[..., torch.Tensor], rank: int, world: int
) -> Step:
    """The loop around a model whose gradients are means over ranks that read different rows."""
    readers = Layout.resolve(cfg.parallel, world).data_world
    loader = Loader(
        build_source(cfg), Layout.resolve(cfg.parallel, world), rank, cfg.train.micro_batch, prefetch=0
    )
    groups = [
        {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": cfg.optim.weight_decay},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        groups, lr=cfg.optim.lr, betas=cfg.optim.betas, eps=cfg.optim.eps, fused=True
    )

    def step(number: int) -> float:
        total = torch.zeros(())
        for batch in next(loader).micro_batches:
            tokens, labels, positions = map(torch.from_numpy, (batch.tokens, batch.labels, batch.positions))
            loss = F.cross_entropy(logits_of(tokens, positions).flatten(0, 1).float(), labels.flatten())
            loss.backward()
            total += loss.detach() / readers
        if readers > 1:
            dist.all_reduce(total)
        nn.utils.clip_grad_norm_(model.parameters(), cfg.optim.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(cfg.optim, number, cfg.train.steps)
        optimizer.step()
        optimizer.zero_grad()
        return float(total)

    return step


def make(layout: str, runner: str, settings: dict[str, Any]) -> Step:
    if runner == "torchtitan":
        from engines_torchtitan import titan_step

        return titan_step(config(layout, "native", {}))
    if runner.startswith("torch"):
        return torch_step(config(layout, "native", {}), runner)
    return engine_step(config(layout, runner.split()[0], settings))


# ---- processes ---------------------------------------------------------------------------------------


def serve(index: int, rank: int, world: int, folder: str, pipe: Connection) -> None:
    """A rank of a runner: builds it when told, then runs the steps it is told to."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world)
    )
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(29600 + index))
    try:
        if world > 1 or RUNNERS[index][1] == "torchtitan":
            dist.init_process_group(
                "gloo", store=dist.FileStore(f"{folder}/{index}", world), rank=rank, world_size=world
            )
        step = make(*RUNNERS[index])
        pipe.send(("ready", None))
        number = 0
        while (count := pipe.recv()) > 0:
            losses, began = [], time.perf_counter()
            for _ in range(count):
                losses.append(step(number))
                number += 1
            pipe.send(("ran", (time.perf_counter() - began, losses)))
    except (UserError, ImportError) as error:
        pipe.send(("cannot", f"{type(error).__name__}: {error}".splitlines()[0]))
    except BaseException:
        pipe.send(("cannot", traceback.format_exc().strip().splitlines()[-1]))
    os._exit(0)


class Runner:
    def __init__(self, index: int, folder: str) -> None:
        self.layout, self.name, _ = RUNNERS[index]
        world = LAYOUTS[self.layout][0]
        context = mp.get_context("fork")
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(world):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(index, rank, world, folder, theirs), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)
        self.problem = ""
        self.losses: list[float] = []
        self.rates: list[float] = []
        self._hear(240)

    def _hear(self, timeout_s: float) -> list[Any]:
        answers = []
        for pipe in self.pipes:
            if not pipe.poll(timeout_s):
                self.problem = self.problem or f"no answer within {timeout_s:.0f} s"
                continue
            try:
                kind, value = pipe.recv()
            except EOFError:
                kind, value = "cannot", "the process died"
            if kind == "cannot":
                self.problem = self.problem or value
            answers.append(value)
        if self.problem:
            self.stop()
        return answers

    def run(self, steps: int, *, counted: bool) -> None:
        for pipe in self.pipes:
            pipe.send(steps)
        answers = self._hear(120)
        if self.problem:
            return
        self.losses += answers[0][1]
        if counted:
            self.rates.append(steps * TOKENS / max(seconds for seconds, _ in answers))

    def stop(self) -> None:
        for process in self.processes:
            if process.is_alive():
                process.kill()
            process.join(10)


def taken_turns(layout: str, rounds: int, steps: int, folder: str, only: list[str]) -> list[Runner]:
    """All runners of one layout, alternating; the first turn of each warms it up."""
    wanted = [
        i for i, (of, name, _) in enumerate(RUNNERS) if of == layout and (not only or {of, name} & {*only})
    ]
    runners = [Runner(i, folder) for i in wanted]
    for round_ in range(rounds + 1):
        ready = [r for r in runners if not r.problem]
        for runner in ready[:: 1 if round_ % 2 else -1]:
            runner.run(steps if round_ else 2, counted=round_ > 0)
    for runner in runners:
        if not runner.problem:
            runner.stop()
    return runners


def compared(runners: list[Runner]) -> dict[str, Any]:
    """Tokens/s of each (median, all rounds), and how many times as fast native is."""
    ran = {r.name: r for r in runners if not r.problem and r.rates}
    native = ran.get("native")
    return {
        "tokens_per_s": {n: round(statistics.median(r.rates)) for n, r in ran.items()},
        "rounds": {n: [round(x) for x in r.rates] for n, r in ran.items()},
        # Of rounds, not of medians: turns next to each other had the same machine.
        "native_is_times": {
            n: round(statistics.median(a / b for a, b in zip(native.rates, r.rates, strict=True)), 3)
            for n, r in ran.items()
            if native is not None and n != "native"
        },
        "loss": {n: [round(x, 6) for x in r.losses[:4]] for n, r in ran.items()},
        "cannot": {r.name: r.problem for r in runners if r.problem},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3, help="a turn")
    parser.add_argument("--only", nargs="*", default=[], help="layouts or runners")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    for module in ("trainsys.engines.megatron", "trainsys.engines.deepspeed", "torch._dynamo"):
        try:  # before the forks: each would spend seconds on it
            __import__(module)
        except ImportError:
            continue
    result: dict[str, Any] = {
        "model": MODEL,
        "tokens_a_step": TOKENS,
        "rounds": args.rounds,
        "steps_a_round": args.steps,
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}",
        "load_average_before": os.getloadavg(),
        "layouts": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        for layout in LAYOUTS:
            result["layouts"][layout] = compared(
                taken_turns(layout, args.rounds, args.steps, folder, args.only)
            )
            print(layout, json.dumps(result["layouts"][layout]["native_is_times"]), flush=True)
            if args.out:  # a run that is cut short leaves what it has
                args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
