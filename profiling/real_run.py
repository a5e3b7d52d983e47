"""One run of ``profiling/blame_real.py``: started, disturbed, and judged by its own record."""

from __future__ import annotations

import os
import random
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from real_faults import DIE_WITH_US, FAULTS, HOG, THREADS, Target, helper, network

from trainsys.data.shards import ShardWriter
from trainsys.data.tokenizer import load_tokenizer
from trainsys.profiler.explain import explain
from trainsys.telemetry.events import Finding, Step
from trainsys.telemetry.reader import event_file, read_events

ROOT = Path(__file__).resolve().parents[1]
STEPS, WARM_UP = 300, 10
PATIENCE_S = 150.0
MODEL = "{n_layers: 2, d_model: 128, n_heads: 4, n_kv_heads: 2, d_ff: 256, vocab: 320, max_seq_len: 128}"
MOE = MODEL[:-1] + ", moe: {n_experts: 4, top_k: 2, d_ff: 128}}"
LAYOUTS = {
    "ddp": (2, "dp_replicate: 2", MODEL, 4, 2), "fsdp": (2, "dp_shard: 2", MODEL, 4, 2), "tp": (2, "tp: 2", MODEL, 4, 4),
    "pp": (2, "pp: 2", MODEL, 4, 2), "cp": (2, "cp: 2", MODEL, 4, 4), "ep": (2, "dp_shard: 2, ep: 2", MOE, 4, 2),
    "ddp3": (3, "dp_replicate: 3", MODEL, 6, 2), "fsdp x tp": (4, "dp_shard: 2, tp: 2", MODEL, 4, 2),
    "ddp x pp": (4, "dp_replicate: 2, pp: 2", MODEL, 4, 1),
}  # fmt: skip
"""Ranks, axes, model, rows of the global batch and of a micro-batch; of these few, for gloo's messages take long."""
OF_THE_DATA = ("ddp", "fsdp", "ep", "ddp3")
"""Layouts in which each rank reads rows of its own."""
TOKENS = 100_000_000
"""Of the file that a starved rank reads."""
WHEN = {
    "lasts": [(80, STEPS)], "ends": [(60, 200)], "comes and goes": [(60, 120), (170, 240)],
    "from the start": [(-1, STEPS)],
}  # fmt: skip
"""Steps that the console has to have told of; it is some tens of them behind."""
ACCUSED = ("rank", "node", "switch", "link")
"""Kinds that accuse a part of the machine. Of a stage it is said that it has too much to do, which may be so."""


@dataclass
class Seen:
    """What came of one run. ``live`` and ``after`` hold what was named, and how far off (``verdict``)."""

    seed: int
    fault: str
    layout: str
    when: str
    busy: bool
    rank: int
    step_ms: float = 0.0
    steps: list[tuple[int, int]] = field(default_factory=list)
    """First and last step of each time that the fault was on."""
    true_ms: float = 0.0
    """By how much it made the median step longer."""
    live: dict[str, Any] = field(default_factory=dict)
    after: dict[str, Any] = field(default_factory=dict)
    said: list[str] = field(default_factory=list)
    problem: str = ""


def train(seed: int, fault: str, busy: bool, shard: Path | None = None, keep: Path | None = None) -> Seen:
    """``shard``: a file of tokens for runs whose rank is starved of data; ``keep``: a folder for the run's record."""
    rng = random.Random(seed)
    layout = rng.choice([n for n in LAYOUTS if fault != "data" or n in OF_THE_DATA])
    # A link that is slow from the first step on has, in its only group, nothing to be compared with.
    when = rng.choice([w for w in WHEN if fault != "link" or w != "from the start"])
    ranks = LAYOUTS[layout][0]
    seen = Seen(seed, fault, layout, when, busy, rng.randrange(ranks))
    with ExitStack() as stack:
        folder = Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="blame-real-", ignore_cleanup_errors=True))
        )
        try:
            spaces = stack.enter_context(network(ranks)) if fault == "link" else []
            if busy:
                core = rng.choice(sorted(os.sched_getaffinity(0)))
                stack.enter_context(helper(HOG, str(core), f"{rng.uniform(0.2, 0.6):.2f}"))
            processes = start(folder, seen, spaces, shard)
            stack.callback(end, processes)
            target = Target([p.pid for p in processes], seen.rank, folder / "flag", spaces, shard)
            times = disturb(folder, processes, seen, target)
            judge(seen, folder, times)
            if keep:
                shutil.copytree(folder / "runs", keep / f"{seed}-{fault}", dirs_exist_ok=True)
        except (OSError, RuntimeError, ValueError, subprocess.SubprocessError) as error:
            seen.problem = f"{type(error).__name__}: {error}"
    return seen


def start(folder: Path, seen: Seen, spaces: list[str], shard: Path | None) -> list[subprocess.Popen[bytes]]:
    """A process a rank."""
    ranks, axes, model, batch, micro = LAYOUTS[seen.layout]
    data = f"source: shards, path: {shard.parent}" if shard else "source: synthetic"
    (folder / "run.yaml").write_text(f"""
name: real
model: {model}
parallel: {{{axes}}}
train: {{steps: {STEPS}, seq_len: 64, global_batch: {batch}, micro_batch: {micro}, device: cpu, dtype: fp32,
        threads: 1}}
data: {{{data}}}
optim: {{lr: 1e-3}}
telemetry: {{console: plain, out: runs, log_every: 1}}
checkpoint: {{every: 0}}
""")
    (folder / "site").mkdir()
    (folder / "site/sitecustomize.py").write_text(THREADS)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = os.environ | {"PYTHONPATH": f"{folder}/site:{ROOT}", "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(ranks),
                        "LOCAL_WORLD_SIZE": str(ranks), "MASTER_PORT": str(port),
                        "MASTER_ADDR": "10.77.0.1" if spaces else "127.0.0.1",
                        "GLOO_SOCKET_IFNAME": "eth0" if spaces else "lo"}  # fmt: skip
    processes = []
    for rank in range(ranks):
        mine = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        if rank == seen.rank and seen.fault in ("pages", "objects"):
            mine["DISTURB"] = f"{seen.fault}:{folder / 'flag'}"
        where = ["nsenter", f"--net=/run/netns/{spaces[rank]}"] if spaces else []
        command = [*DIE_WITH_US, *where, sys.executable, "-u", "-m", "trainsys", "train", "run.yaml"]
        with (folder / f"log{rank}").open("wb") as log:
            processes.append(subprocess.Popen(
                command, cwd=folder, env=env | mine, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            ))  # fmt: skip
    return processes


def end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, 9)
        process.wait()


def disturb(
    folder: Path, processes: list[subprocess.Popen[bytes]], seen: Seen, target: Target
) -> list[tuple[float, float]]:
    """Wall times from when to when the fault was on; returns when the run has ended."""
    deadline = time.monotonic() + PATIENCE_S

    def wait(step: int) -> None:
        # The console's last line, up to a second old, is cheaper to read than events are.
        while all(p.poll() is None for p in processes):
            said = re.findall(rb"^step +(\d+)/", (folder / "log0").read_bytes(), re.M)
            if said and int(said[-1]) >= step:
                return
            if time.monotonic() > deadline:
                raise TimeoutError(f"step {step} was not reached")
            time.sleep(0.1)

    times = []
    for first, last in WHEN[seen.when]:
        if first >= 0:
            wait(first)
        with FAULTS[seen.fault][0](target):
            begun = time.time()
            wait(last)
            times.append((begun, time.time()))
    for rank, process in enumerate(processes):
        if (code := process.wait(max(1.0, deadline - time.monotonic()))) != 0:
            raise RuntimeError(f"rank {rank} ended with {code}: {(folder / f'log{rank}').read_text()[-400:]}")
    return times


def judge(seen: Seen, folder: Path, times: list[tuple[float, float]]) -> None:
    """Fills in what was so, by rank 0's record, and what was said of it."""
    (run_dir,) = folder.glob("runs/real-*")
    events = read_events(event_file(run_dir, 0))[0]
    steps = [e for e in events if isinstance(e, Step)]
    number, began, took = (
        np.array([getattr(s, name) for s in steps]) for name in ("step", "start_s", "step_time_s")
    )
    # A step of which most was disturbed.
    middle = began + took / 2
    spells = [np.flatnonzero((middle >= a) & (middle < b)) for a, b in times]
    hit = np.isin(np.arange(len(steps)), np.concatenate([*spells, []]))
    warm = np.arange(len(steps)) >= WARM_UP
    seen.step_ms = round(1e3 * float(np.median(took[warm & ~hit] if (warm & ~hit).any() else took[warm])), 2)
    if seen.fault != "none":
        seen.steps = [(int(number[s[0]]), int(number[s[-1]])) for s in spells if s.size]
        if (~hit & warm).any() and hit.any():
            seen.true_ms = round(1e3 * float(np.median(took[hit & warm]) - np.median(took[~hit & warm])), 2)
    live = [e for e in events if isinstance(e, Finding)]
    after = explain(run_dir).verdicts
    seen.live, seen.after = verdict(seen, live), verdict(seen, after)
    seen.said = [
        f"live {f.step} {f.news}: {f.title}, since {f.since} until {f.until} [{f.cause}] {f.evidence}"
        for f in live
    ]
    seen.said += [
        f"after: {v.title}, since {v.since} until {v.until} [{v.cause}] {v.evidence}" for v in after
    ]


def verdict(seen: Seen, found: Sequence[Any]) -> dict[str, Any]:
    """``named``: the right rank or link; ``wrong``: how many others; of the costliest right one ``cause``, and
    ``cost`` over the truth; ``onset``: steps between the first spell of the fault and what is said of it; ``end`` the
    same of its end, where it ended and one was told; ``run``: the whole run was said to be slow."""
    accused = [f for f in found if f.kind in ACCUSED and getattr(f, "news", "new") != "over"]
    ended = [f for f in found if f.until is not None]
    mine = [f for f in found if seen.fault != "none" and seen.steps and _right(seen, f)]
    out: dict[str, Any] = {
        "named": bool(mine),
        "wrong": sum(f not in mine for f in accused),
        "stage": any(f.kind == "stage" for f in found),
        "run": any(f.kind == "run" for f in found),
    }
    if out["named"]:
        first = max(mine, key=lambda f: f.cost_s)
        # With pp=2 a rank is a stage, and a stage has no cause.
        out["cause"] = first.cause in FAULTS[seen.fault][1]
        out["said cause"] = first.cause
        out["onset"] = min(f.since for f in mine) - max(seen.steps[0][0], 0)
        if seen.true_ms > 0.02 * seen.step_ms:
            out["cost"] = round(1e3 * first.cost_s / seen.true_ms, 3)
        if seen.steps[-1][1] < STEPS - 20:
            ends = [f.until for f in ended if f in mine]
            out["end"] = max(ends) - seen.steps[-1][1] if ends else None
    return out


def _right(seen: Seen, f: Any) -> bool:
    if seen.fault == "link":
        return f.kind == "link" and seen.rank in f.ranks
    return f.kind in ("rank", "stage", "gc") and list(f.ranks) == [seen.rank]


def make_tokens(folder: Path) -> Path:
    """A shard in ``folder``, of documents of a million random tokens."""
    rng = np.random.default_rng(0)
    with ShardWriter(folder, load_tokenizer("bytes"), 2 * TOKENS) as writer:
        for _ in range(TOKENS // 1_000_000):
            writer.add(rng.integers(0, 256, 1_000_000, dtype=np.uint32))
    return next(folder.glob("*.tok"))
