"""Runs that are killed again and again, at random moments and in saves above all: is anything ever lost?

    python profiling/checkpoint_kill.py --n 200

Each event ends a run of the real training process (all of its ranks, forked, in a layout drawn at random) by
SIGKILL of one rank or of all, or damages what the kill left behind (a truncated file, a flipped byte), or
makes the disk refuse writes. The next attempt, in another random layout, must go on from a complete checkpoint.
Checked after every event: some checkpoint verifies once there was one; the attempt resumed no earlier than the
newest save that was complete and undamaged; no more steps are lost than the save interval and the save in
flight. Checked of every step of every attempt: its loss is the uninterrupted run's to 1e-5.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch._dynamo
import torch.distributed.fsdp
import torch.distributed.tensor

from trainsys.checkpoint.folder import Folder, problems
from trainsys.telemetry.events import Step
from trainsys.telemetry.reader import Damage, iter_events
from trainsys.train.main import train

LAYOUTS = {
    "single": {"dp_shard": 1}, "fsdp2": {"dp_shard": 2}, "ddp2": {"dp_replicate": 2, "dp_shard": 1},
    "tp2": {"dp_shard": 1, "tp": 2}, "fsdp2_tp2": {"dp_shard": 2, "tp": 2}, "fsdp4": {"dp_shard": 4},
    "hsdp2x2": {"dp_replicate": 2, "dp_shard": 2},
}  # fmt: skip
EVERY = 3
EVENTS = {
    "kill one rank in a save": 30, "kill all ranks in a save": 25, "kill one rank": 15, "kill all ranks": 10,
    "kill all, then truncate a file of the newest": 8, "kill all, then flip a byte of the newest": 7,
    "disk refuses writes": 5,
}  # fmt: skip
CONFIG = """\
name: kill
hardware: {hardware}
model: {{n_layers: 1, d_model: 64, n_heads: 4, n_kv_heads: 2, d_ff: 128, vocab: 128, max_seq_len: 64}}
data: {{source: synthetic, prefetch: 1}}
optim: {{lr: 5e-3, warmup_steps: 2}}
train: {{steps: {steps}, seq_len: 32, global_batch: 8, micro_batch: 2, dtype: fp32, device: cpu, threads: 1}}
telemetry: {{out: {out}, console: "off", log_every: 50}}
checkpoint: {{every: {every}}}
"""


class Attempt:
    """The ranks of one attempt, forked from this process."""

    def __init__(self, config: Path, layout: str, log: Path, write_limit: int = 0) -> None:
        axes = LAYOUTS[layout]
        self.world = 1
        for n in axes.values():
            self.world *= n
        port = free_port()
        overrides = [f"parallel.{axis}={n}" for axis, n in axes.items()]
        self.pids = [
            self._fork(rank, port, config, overrides, log, write_limit) for rank in range(self.world)
        ]
        self.codes: dict[int, int] = {}

    def _fork(
        self, rank: int, port: int, config: Path, overrides: list[str], log: Path, write_limit: int
    ) -> int:
        pid = os.fork()
        if pid:
            return pid
        code = 1
        try:
            out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(out, 1)
            os.dup2(out, 2)
            os.environ.update(
                RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(self.world), LOCAL_WORLD_SIZE=str(self.world),
                MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
            )  # fmt: skip
            if write_limit:
                resource.setrlimit(resource.RLIMIT_FSIZE, (write_limit, write_limit))
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            code = train(str(config), overrides)
        except BaseException as error:
            os.write(2, f"rank {rank}: {type(error).__name__}: {error}\n".encode()[:2000])
        finally:
            os._exit(code)

    def poll(self) -> bool:
        """Whether some rank is still there."""
        for pid in self.pids:
            if pid not in self.codes:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    self.codes[pid] = os.waitstatus_to_exitcode(status)
        return len(self.codes) < len(self.pids)

    def kill(self, pids: list[int]) -> None:
        for pid in pids:
            if pid not in self.codes:
                os.kill(pid, signal.SIGKILL)

    def end(self) -> None:
        self.kill(self.pids)
        while self.poll():
            time.sleep(0.005)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def losses_of(run_dir: Path) -> dict[int, float]:
    """step -> loss of one attempt, from rank 0's events."""
    path = run_dir / "events" / "rank_00000.jsonl"
    if not path.exists():
        return {}
    return {e.step: e.loss for e in iter_events(path, Damage()) if isinstance(e, Step) and e.loss is not None}


def good_steps(folder: Folder) -> list[int]:
    found, _ = folder.read_all()
    return [m.step for name, m in found if next(problems(folder.root / name, m), None) is None]


def run_dirs(out: Path) -> list[Path]:
    return sorted((p for p in out.glob("kill-*") if p.is_dir()), key=lambda p: p.stat().st_mtime_ns)


def wait_for_event(attempt: Attempt, kind: str, root: Path, rng: random.Random, typical_s: float) -> None:
    """Until the moment that ``kind`` strikes, or the attempt's end."""
    deadline = time.monotonic() + 120
    if "in a save" not in kind:
        deadline = time.monotonic() + rng.uniform(0.1, 1.0) * typical_s
        while attempt.poll() and time.monotonic() < deadline:
            time.sleep(0.005)
        return
    wanted = rng.randint(1, 3)  # the first, second or third save that is seen under way
    seen: set[str] = set()
    while attempt.poll() and time.monotonic() < deadline:
        seen |= {p.name for p in root.glob(".saving-*")}
        if len(seen) >= wanted:
            time.sleep(rng.choice([0.0, rng.uniform(0, 0.004), rng.uniform(0, 0.03)]))
            return
        time.sleep(0.0005)


def damage(root: Path, kind: str, rng: random.Random) -> bool:
    """Truncate or flip in a random file of the newest checkpoint; False where there is no second one to fall
    back to."""
    found, _ = Folder(root).read_all()
    if len(found) < 2:
        return False
    path = rng.choice(sorted((root / found[0][0]).iterdir()))
    data = bytearray(path.read_bytes())
    if "truncate" in kind:
        data = data[: rng.randrange(len(data))]
    else:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    return True


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--n", type=int, default=200, help="events")
    parser.add_argument("--steps", type=int, default=24, help="of each run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the result here, as JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rng = random.Random(args.seed)
    base = Path(tempfile.mkdtemp(prefix="kill-"))
    counts: Counter[str] = Counter()
    failures: list[str] = []
    began = time.monotonic()

    def fresh(name: str) -> tuple[Path, Path, Path]:
        out = base / name
        out.mkdir()
        config = out / "run.yaml"
        config.write_text(CONFIG.format(hardware="H100-SXM-80", steps=args.steps, every=EVERY, out=out))
        return out, config, out / "log.txt"

    out, config, log = fresh("reference")
    t0 = time.monotonic()
    reference_run = Attempt(config, "fsdp2_tp2", log)
    while reference_run.poll():
        time.sleep(0.01)
    typical_s = time.monotonic() - t0
    want = losses_of(run_dirs(out)[0]) if run_dirs(out) else {}
    if len(want) != args.steps or any(reference_run.codes.values()):
        print(log.read_text()[-3000:])
        return 2
    print(
        f"uninterrupted: {args.steps} steps in {typical_s:.1f} s, loss {want[0]:.4f} -> {want[args.steps - 1]:.4f}"
    )

    def summary() -> dict[str, Any]:
        return {
            "events": events, "runs": runs, "attempts": attempts, "by_kind": dict(counts), "seed": args.seed,
            "steps_compared": steps_checked, "worst_relative_loss_gap": worst_gap, "most_steps_repeated": most_lost,
            "damaged_newest": fell_back, "save_interval": EVERY, "seconds": round(time.monotonic() - began, 1),
            "failures": failures,
        }  # fmt: skip

    events = attempts = runs = steps_checked = 0
    worst_gap, most_lost, fell_back = 0.0, 0, 0
    while events < args.n and not failures:
        runs += 1
        out, config, log = fresh(f"run{runs}")
        root = out / "checkpoints" / "kill"
        reached, must_resume_at = -1, 0
        while not failures:
            kind = rng.choices(list(EVENTS), list(EVENTS.values()))[0] if events < args.n else "none"
            layout = rng.choice(list(LAYOUTS))
            before = len(run_dirs(out))
            attempts += 1
            attempt = Attempt(config, layout, log, 4096 if kind == "disk refuses writes" else 0)
            if kind in ("none", "disk refuses writes"):
                limit = time.monotonic() + 180
                while attempt.poll() and time.monotonic() < limit:
                    time.sleep(0.01)
            else:
                wait_for_event(attempt, kind, root, rng, typical_s)
                attempt.poll()
                finished = len(attempt.codes) == len(attempt.pids)
                attempt.kill([rng.choice(attempt.pids)] if "one rank" in kind else attempt.pids)
                if "one rank" in kind and not finished:
                    until = time.monotonic() + rng.uniform(0, 0.3)  # the others go on until the agent comes
                    while attempt.poll() and time.monotonic() < until:
                        time.sleep(0.005)
            attempt.end()
            ok = not any(attempt.codes.values())
            if not ok and kind != "none":  # an attempt that was done before it struck is no event
                events += 1
                counts[kind] += 1
            for run_dir in run_dirs(out)[before:]:
                got = losses_of(run_dir)
                if not got:
                    continue
                first = min(got)
                if first < must_resume_at:
                    failures.append(f"{kind}: resumed at {first}, but {must_resume_at} was complete")
                most_lost = max(most_lost, reached + 1 - first)
                reached = max(got)
                for step, loss in got.items():
                    gap = abs(loss / want[step] - 1)
                    worst_gap, steps_checked = max(worst_gap, gap), steps_checked + 1
                    if gap > 1e-5:
                        failures.append(f"{kind} ({layout}): step {step} has loss {loss}, not {want[step]}")
            if ("truncate" in kind or "flip" in kind) and not ok:
                fell_back += damage(root, kind, rng)
            steps = good_steps(Folder(root))
            if root.exists() and Folder(root).names() and not steps:
                failures.append(f"{kind}: no good checkpoint is left of {Folder(root).names()}")
            must_resume_at = max(steps, default=0)
            # The save in flight may be lost, the one before it never: two intervals behind is too far.
            if (
                "then" not in kind
                and kind != "disk refuses writes"
                and reached + 1 - must_resume_at > 2 * EVERY
            ):
                failures.append(f"{kind}: step {reached} was done, and only {must_resume_at} is saved")
            if ok:
                if reached != args.steps - 1 and kind != "disk refuses writes":
                    failures.append(f"ended well at step {reached}")
                break
            if kind == "none":
                failures.append(f"an undisturbed attempt failed:\n{log.read_text()[-3000:]}")
            if events % 10 == 0:
                if args.out:  # so far, should this be ended from outside
                    args.out.write_text(json.dumps(summary(), indent=1) + "\n")
                print(
                    f"{events} events, {runs} runs, {attempts} attempts, {time.monotonic() - began:.0f} s",
                    flush=True,
                )
    if not failures:
        shutil.rmtree(base)
    result = summary()
    print(json.dumps(result, indent=1))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
