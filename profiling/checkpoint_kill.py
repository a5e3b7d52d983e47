"""Runs that are killed again and again, at random moments and in saves above all: is anything ever lost?

    python profiling/checkpoint_kill.py --n 200 --out profiling/results/checkpoint_kill.json [--minutes 20]

Each event ends a run of the real training process (all of its ranks, forked, in a layout drawn at random) by
SIGKILL of one rank or of all, or damages what the kill left behind (a truncated file, a flipped byte), or
makes the disk refuse writes. The next attempt, in another random layout, must go on from a complete checkpoint.
Checked after every event: some checkpoint verifies once there was one; the attempt resumed no earlier than the
newest save that was complete and undamaged; no more steps are lost than the save interval and the save in
flight. Checked of every step of every attempt: its loss is the uninterrupted run's to 1e-5.

``--minutes`` ends it in between; the same command then goes on from what ``--out`` holds.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import torch

from support.jobs import Job
from trainsys.checkpoint.folder import Folder, problems
from trainsys.telemetry.events import Step
from trainsys.telemetry.reader import Damage, iter_events

# Layout: axes, and the ranks that read different rows.
LAYOUTS: dict[str, tuple[dict[str, int], int]] = {
    "single": ({"dp_shard": 1}, 1), "fsdp2": ({"dp_shard": 2}, 2), "tp2": ({"dp_shard": 1, "tp": 2}, 1),
    "ddp2": ({"dp_replicate": 2, "dp_shard": 1}, 2), "fsdp2_tp2": ({"dp_shard": 2, "tp": 2}, 2),
    "fsdp4": ({"dp_shard": 4}, 4), "hsdp2x2": ({"dp_replicate": 2, "dp_shard": 2}, 4),
}  # fmt: skip
EVERY, BATCH = 3, 4
EVENTS = {
    "kill one rank in a save": 30, "kill all ranks in a save": 25, "kill one rank": 15, "kill all ranks": 10,
    "kill all, then truncate a file of the newest": 8, "kill all, then flip a byte of the newest": 7,
    "disk refuses writes": 5,
}  # fmt: skip
REFUSES, NOTHING = "disk refuses writes", "none"
CONFIG = """\
name: kill
hardware: H100-SXM-80
model: {{n_layers: 1, d_model: 64, n_heads: 4, n_kv_heads: 2, d_ff: 128, vocab: 128, max_seq_len: 64}}
data: {{source: synthetic, prefetch: 1}}
optim: {{lr: 5e-3, warmup_steps: 2}}
train: {{steps: {steps}, seq_len: 32, global_batch: {batch}, dtype: fp32, device: cpu, threads: 1}}
telemetry: {{out: {out}, console: "off", log_every: 50}}
checkpoint: {{every: {every}}}
"""


@dataclass
class Tally:
    """What has been seen so far; the file that ``--out`` names."""

    seed: int
    steps: int
    save_interval: int = EVERY
    events: int = 0
    runs: int = 0
    attempts: int = 0
    by_kind: dict[str, int] = field(default_factory=lambda: dict.fromkeys(EVENTS, 0))
    steps_compared: int = 0
    worst_relative_loss_gap: float = 0.0
    most_steps_repeated: int = 0
    """Steps done again after an event: at most the interval and the save in flight, but for damaged newest ones."""
    damaged_newest: int = 0
    seconds: float = 0.0
    sittings: int = 0
    failures: list[str] = field(default_factory=list)

    @staticmethod
    def of(path: Path | None, seed: int, steps: int) -> Tally:
        if path is None or not path.exists():
            return Tally(seed, steps)
        before = Tally(**json.loads(path.read_text()))
        if (before.seed, before.steps, before.save_interval) != (seed, steps, EVERY):
            sys.exit(
                f"{path} is of another study (seed {before.seed}, {before.steps} steps); name another file"
            )
        return before

    def save(self, path: Path | None) -> None:
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(asdict(self), indent=1) + "\n")


def start(config: Path, layout: str, log: Path, write_limit: int = 0) -> Job:
    axes, readers = LAYOUTS[layout]
    world = 1
    for n in axes.values():
        world *= n
    overrides = [f"parallel.{axis}={n}" for axis, n in axes.items()]

    def prepare(rank: int) -> None:
        if write_limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (write_limit, write_limit))
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    return Job(world, config, [*overrides, f"train.micro_batch={BATCH // readers}"], log, prepare)


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


def damage(root: Path, kind: str, rng: random.Random) -> bool:
    """Truncate or flip in a random file of the newest checkpoint; False where there is no second one to fall
    back to."""
    found, _ = Folder(root).read_all()
    if len(found) < 2:
        return False
    files = sorted(p for p in (root / found[0][0]).iterdir() if p.name != "health.json")
    path = rng.choice(files)
    data = bytearray(path.read_bytes())
    if "truncate" in kind:
        data = data[: rng.randrange(len(data))]
    else:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    return True


class Study:
    """Kills runs and looks what is left of them."""

    def __init__(self, tally: Tally, base: Path) -> None:
        self.tally, self.base = tally, base
        self.rng = random.Random(f"{tally.seed}/{tally.events}")
        out, config, log = self._fresh("reference")
        began = time.monotonic()
        codes = start(config, "fsdp2", log).wait(180)
        self.typical_s = time.monotonic() - began
        self.want = losses_of(run_dirs(out)[0])
        assert not any(codes), log.read_text()[-3000:]
        assert len(self.want) == tally.steps
        first, last = self.want[0], self.want[tally.steps - 1]
        print(f"uninterrupted: {tally.steps} steps in {self.typical_s:.1f} s, loss {first:.4f} -> {last:.4f}")

    def _fresh(self, name: str) -> tuple[Path, Path, Path]:
        out = self.base / name
        out.mkdir()
        config = out / "run.yaml"
        config.write_text(CONFIG.format(steps=self.tally.steps, every=EVERY, batch=BATCH, out=out))
        return out, config, out / "log.txt"

    def fail(self, why: str) -> None:
        self.tally.failures.append(why)

    def one_run(self, n: int, deadline: float) -> None:
        """One run from its first step to its last, however often it is ended in between."""
        tally, rng = self.tally, self.rng
        tally.runs += 1
        out, config, log = self._fresh(f"run{tally.runs}")
        root = out / "checkpoints" / "kill"
        reached, saved = -1, 0
        while not tally.failures and time.monotonic() < deadline:
            kind = rng.choices(list(EVENTS), list(EVENTS.values()))[0] if tally.events < n else NOTHING
            before = len(run_dirs(out))
            layout = rng.choice(list(LAYOUTS))
            ok = self._attempt(kind, layout, config, log, root)
            for run_dir in run_dirs(out)[before:]:
                reached = self._compare(run_dir, f"{kind} ({layout})", reached, saved)
            if ("truncate" in kind or "flip" in kind) and not ok:
                tally.damaged_newest += damage(root, kind, rng)
            saved = self._look(root, kind, reached)
            if ok:
                self._check_end(root, saved)
                break
            if kind == NOTHING:
                self.fail(f"an undisturbed attempt failed:\n{log.read_text()[-3000:]}")
        shutil.rmtree(out, ignore_errors=not tally.failures)

    def _check_end(self, root: Path, saved: int) -> None:
        """A run is over when its last step is saved; its record may have died with the attempt that did it."""
        newest = Folder(root).read_all()[0][0][1]
        if saved != self.tally.steps or newest.step != saved:
            self.fail(f"ended well, but step {saved} is the newest that is saved")
        elif abs((newest.loss or 0) / self.want[self.tally.steps - 1] - 1) > 1e-5:
            self.fail(f"the final loss is {newest.loss}, not {self.want[self.tally.steps - 1]}")

    def _attempt(self, kind: str, layout: str, config: Path, log: Path, root: Path) -> bool:
        """Whether it ended well: before the event struck, or in spite of it."""
        job = start(config, layout, log, 4096 if kind == REFUSES else 0)
        self.tally.attempts += 1
        if kind in (NOTHING, REFUSES):
            job.wait(180)
        else:
            self._wait_for_moment(job, kind, root)
            job.poll()
            running = len(job.codes) < len(job.pids)
            job.kill([self.rng.choice(job.pids)] if "one rank" in kind else job.pids)
            if "one rank" in kind and running:
                until = time.monotonic() + self.rng.uniform(0, 0.3)  # the others go on until the agent comes
                while job.poll() and time.monotonic() < until:
                    time.sleep(0.005)
        job.end()
        ok = not any(job.codes.values())
        if not ok and kind != NOTHING:  # an attempt that was done before it struck is no event
            self.tally.events += 1
            self.tally.by_kind[kind] += 1
        return ok

    def _wait_for_moment(self, job: Job, kind: str, root: Path) -> None:
        """Until ``kind`` strikes, or the attempt's end."""
        rng = self.rng
        if "in a save" not in kind:
            deadline = time.monotonic() + rng.uniform(0.1, 1.0) * self.typical_s
            while job.poll() and time.monotonic() < deadline:
                time.sleep(0.005)
            return
        wanted = rng.randint(1, 3)  # the first, second or third save that is seen under way
        seen: set[str] = set()
        deadline = time.monotonic() + 120
        while job.poll() and time.monotonic() < deadline:
            seen |= {p.name for p in root.glob(".saving-*")}
            if len(seen) >= wanted:
                time.sleep(rng.choice([0.0, rng.uniform(0, 0.004), rng.uniform(0, 0.03)]))
                return
            time.sleep(0.0005)

    def _compare(self, run_dir: Path, what: str, reached: int, saved: int) -> int:
        """Each step's loss with the uninterrupted run's, and where the attempt began; the last step it did."""
        got = losses_of(run_dir)
        if not got:
            return reached
        first = min(got)
        if first < saved:
            self.fail(f"{what}: resumed at {first}, but {saved} was complete")
        self.tally.most_steps_repeated = max(self.tally.most_steps_repeated, reached + 1 - first)
        for step, loss in got.items():
            gap = abs(loss / self.want[step] - 1)
            self.tally.worst_relative_loss_gap = max(self.tally.worst_relative_loss_gap, gap)
            self.tally.steps_compared += 1
            if gap > 1e-5:
                self.fail(f"{what}: step {step} has loss {loss}, not {self.want[step]}")
        return max(got)

    def _look(self, root: Path, kind: str, reached: int) -> int:
        """The newest step that is complete and undamaged: there is one, and it is not too far behind."""
        steps = good_steps(Folder(root))
        if root.exists() and Folder(root).names() and not steps:
            self.fail(f"{kind}: no good checkpoint is left of {Folder(root).names()}")
        newest = max(steps, default=0)
        # The save in flight may be lost, the one before it never: two intervals behind is too far.
        if "then" not in kind and kind != REFUSES and reached + 1 - newest > 2 * EVERY:
            self.fail(f"{kind}: step {reached} was done, and only {newest} is saved")
        return newest


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--n", type=int, default=200, help="events")
    parser.add_argument("--steps", type=int, default=24, help="of each run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=1e9, help="end after this time")
    parser.add_argument("--out", type=Path, help="the result, as JSON, and what to go on from")
    args = parser.parse_args()
    torch.set_num_threads(1)
    tally = Tally.of(args.out, args.seed, args.steps)
    tally.sittings += 1
    base = Path(tempfile.mkdtemp(prefix="kill-"))
    began, before = time.monotonic(), tally.seconds
    deadline = began + 60 * args.minutes
    study = Study(tally, base)
    while tally.events < args.n and not tally.failures and time.monotonic() < deadline:
        study.one_run(args.n, deadline)
        tally.seconds = round(before + time.monotonic() - began, 1)
        tally.save(args.out)
        print(f"{tally.events} events, {tally.runs} runs, {tally.attempts} attempts", flush=True)
    if not tally.failures:
        shutil.rmtree(base)
    print(json.dumps(asdict(tally), indent=1))
    return 1 if tally.failures else 0


if __name__ == "__main__":
    sys.exit(main())
