"""Random faults on a real Slurm: does every job end in the right state, and is anything ever lost?

    python profiling/cluster_faults.py --n 100 [--resume] [--minutes 30] [--out profiling/results/cluster_faults.json]

Starts a Slurm of four nodes on this machine (tests/support/slurm_cluster.sh; root, for a disk that gets full is a
small tmpfs) and disturbs one job after the other at a random step. Checked of each: the final state of every task; no
task is COMPLETED without its last step; an attempt goes on no further back than the save interval before the last
step that was written down (saves are synchronous here); each step's loss, of every attempt, is to the bit that of the
undisturbed run. One line a fault; each is also appended to the JSON lines beside ``--out``, from which ``--resume``
goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from support.slurm import BAD, CLUSTER, ranks_of, spoil
from trainsys.cli import main as trainsys
from trainsys.launch import slurm
from trainsys.launch.proof import last_step
from trainsys.telemetry.events import RunStart, Step
from trainsys.telemetry.reader import read_events

NODES, STEPS, EVERY = 4, 80, 5
PATIENCE_S = 600.0
DISK = 2**20 * 4
RUN = f"""
name: quiet
model: {{n_layers: 2, d_model: 32, n_heads: 4, n_kv_heads: 2, d_ff: 64, vocab: 320, max_seq_len: 64}}
parallel: {{dp_shard: -1}}
train: {{steps: {STEPS}, seq_len: 32, global_batch: 32, micro_batch: 2, device: cpu, dtype: fp32, threads: 1}}
data: {{source: text, path: corpus.txt, tokenizer: bytes}}
optim: {{lr: 3e-3}}
telemetry: {{console: plain, out: runs}}
checkpoint: {{every: {EVERY}, keep_last: 2, mode: sync}}
resilience: {{grace_s: 25, hang_timeout_s: 30}}
launch: {{nodes: 2, devices_per_node: 1, max_restarts: 2, retry_wait_s: 1, time: "1:00:00"}}
"""
# On the bad node a rank that has come to some step fails as a broken device does, or as anything else.
RAISES = """
import os, sys, threading, time
def fail():
    while "trainsys.train.main" not in sys.modules or not hasattr(sys.modules["trainsys.train.main"], "Session"):
        time.sleep(0.01)
    from trainsys.resilience.session import Session
    before = Session.after
    def after(self, data, result):
        before(self, data, result)
        if self.step % {every} == 0:
            raise RuntimeError("{text}")
    Session.after = after
threading.Thread(target=fail, daemon=True).start()
"""


@dataclass
class Seen:
    """What came of one fault."""

    number: int
    fault: str
    at_step: int = -1
    states: list[str] = field(default_factory=list)
    attempts: int = 0
    false_completed: int = 0
    most_steps_lost: int = 0
    steps_compared: int = 0
    seconds: float = 0.0
    wrong: list[str] = field(default_factory=list)


class Study:
    """A cluster, the folder that its jobs run in, and the losses of the run that nothing disturbs."""

    def __init__(self, slurm: Path, work: Path, rng: random.Random) -> None:
        self.slurm, self.work, self.rng = slurm, work, rng
        self.quiet: dict[int, float] = {}
        self.seen = Seen(0, "none")

    def cluster(self, action: str, *arguments: str) -> None:
        subprocess.run([str(CLUSTER), action, str(self.slurm), *arguments], check=True, timeout=120)

    def submit(self, name: str, *overrides: str, grid: str = "") -> Job:
        known = set(Path("runs/jobs").glob("*"))
        asked = ["launch", "run.yaml", f"name={name}", *overrides, "--on", "slurm", "--detach"]
        with redirect_stdout(sys.stderr):
            assert trainsys([*asked, *(["--grid", grid] if grid else [])]) == 0
        (folder,) = set(Path("runs/jobs").glob("*")) - known
        return Job(str(json.loads((folder / "job.json").read_text())["id"]), folder, name)

    def at(self, job: Job, name: str = "") -> int:
        """Wait for a random step of the job, between its first save and its middle (on an idle machine the second half is
        over in less than a second, before anything can be done to it); that step."""
        self.seen.at_step = wanted = self.rng.randrange(EVERY + 1, STEPS // 2)
        wait("the step", job, lambda: job.step(name) >= wanted or job.ended)
        return wanted

    def end(self, job: Job, *expected: str) -> None:
        """Wait for the end, and check all that holds of a job that ended so."""
        wait("the end", job, lambda: job.ended)
        states = [state for _, (state, _) in sorted(slurm.states(job.id).items())]
        self.seen.states += states
        if states != list(expected):
            self.seen.wrong.append(f"{job.name}: {states} instead of {list(expected)}")
        for task, state in enumerate(states):
            name = job.name if len(states) == 1 else f"{job.name}-{task:04d}"
            done = last_step(job.folder / f"done-{task}.json") == STEPS
            losses = self.check(name)
            if state == "COMPLETED":
                self.seen.false_completed += not done
                if holes := sorted(set(range(STEPS)) - set(losses)):
                    self.seen.wrong.append(f"{name}: COMPLETED, and no attempt has a record of steps {holes}")
        self.seen.attempts += len(list(job.folder.glob("logs/task-*/attempt-*")))

    def check(self, name: str) -> dict[int, float]:
        """Losses of all attempts so far, each compared; and how far each attempt went back."""
        losses: dict[int, float] = {}
        for first, steps in attempts(name):
            if losses:
                self.seen.most_steps_lost = max(self.seen.most_steps_lost, max(losses) + 1 - first)
                if max(losses) + 1 - first > EVERY:
                    self.seen.wrong.append(f"{name}: from step {max(losses)} back to {first}")
            for step, loss in steps.items():
                if self.quiet and loss != self.quiet[step]:
                    self.seen.wrong.append(
                        f"{name}: step {step}: loss {loss}, undisturbed {self.quiet[step]}"
                    )
            losses |= steps
            self.seen.steps_compared += len(steps)
        return losses


@dataclass
class Job:
    id: str
    folder: Path
    name: str

    @property
    def ended(self) -> bool:
        found = slurm.states(self.id)
        return bool(found) and all(slurm.over(state) for state, _ in found.values())

    def step(self, name: str = "") -> int:
        """The newest step that rank 0 has logged, of any attempt."""
        logs = self.folder.glob("logs/task-*/attempt-*/train-00000.log")
        if name:
            logs = self.folder.glob(f"logs/task-{name}/attempt-*/train-00000.log")
        steps = (int(n) for log in logs for n in re.findall(r"^step +(\d+)/", log.read_text(), re.M))
        return max(steps, default=-1)

    def ranks(self, node: str = "") -> list[int]:
        return ranks_of(self.id, node)

    def said(self) -> str:
        return "\n".join(path.read_text() for path in self.folder.glob("logs/slurm-*.out"))


def attempts(name: str) -> list[tuple[int, dict[int, float]]]:
    """(first step, loss by step) of every attempt that came as far as its files, in order."""
    found = []
    for path in Path("runs").glob(f"{name}-2*/events/rank_00000.jsonl"):
        events = read_events(path)[0]
        starts = [e for e in events if isinstance(e, RunStart)]
        if starts:
            losses = {e.step: e.loss for e in events if isinstance(e, Step) and e.loss is not None}
            found.append((path.stat().st_mtime_ns, starts[0].first_step, losses))
    return [(first, losses) for _, first, losses in sorted(found, key=lambda f: f[0])]


def wait(what: str, job: Job, ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not ready():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{job.name}: not seen in {PATIENCE_S:g} s: {what}\n{job.said()}")
        time.sleep(0.05)


# ---- the faults: each leaves the cluster as it found it ----


def no_fault(s: Study, name: str) -> None:
    s.end(s.submit(name), "COMPLETED")


def kill_slurmd(s: Study, name: str) -> None:
    """A node that is gone says nothing any more, not even that a connection is closed."""
    job = s.submit(name)
    s.at(job)
    (where,) = {nodes for _, nodes in slurm.states(job.id).values()}
    node = slurm.ask("scontrol", "show", "hostnames", where).split()[-1]
    frozen = job.ranks(node)
    for pid in frozen:
        os.kill(pid, signal.SIGSTOP)
    s.cluster("kill", node)
    try:
        s.end(job, "COMPLETED")
    finally:
        for pid in frozen:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        subprocess.run(["slurmd", "-N", node], check=True)
        wait(
            "the node",
            job,
            lambda: slurm.ask("sinfo", "-h", "-N", "-n", node, "-o", "%T").split()[0] == "idle",
        )


def signal_rank(number: signal.Signals) -> Callable[[Study, str], None]:
    def fault(s: Study, name: str) -> None:
        job = s.submit(name)
        s.at(job)
        os.kill(s.rng.choice(job.ranks()), number)
        s.end(job, "COMPLETED")
        if number == signal.SIGSTOP and "missing: no word" not in job.said():
            s.seen.wrong.append(f"{name}: the watchdog's report is not in the job's log")

    return fault


def full_disk(s: Study, name: str) -> None:
    """The checkpoints' disk is full from some step on, until an attempt has failed of it."""
    disk = s.work / f"disk-{name}"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(disk)], check=True)
    try:
        job = s.submit(name, f"checkpoint.folder={disk}/checkpoints")
        s.at(job)
        # The ranks stand still until it is full, or they could be done before that; and it stays full, though a
        # checkpoint that was just being deleted makes room for the next.
        held = job.ranks()
        for pid in held:
            os.kill(pid, signal.SIGSTOP)
        filler = disk / "filler"

        def failed() -> bool:
            with suppress(OSError), filler.open("ab", buffering=0) as file:
                while file.write(bytes(4096)):
                    pass
            return "again: " in job.said() or job.ended

        failed()
        for pid in held:
            os.kill(pid, signal.SIGCONT)
        wait("the failure", job, failed)
        filler.unlink()
        s.end(job, "COMPLETED")
        if "No space left on device" not in job.said():
            s.seen.wrong.append(f"{name}: the full disk is not in the job's log")
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def cancel(s: Study, name: str) -> None:
    """CANCELLED; and the same command again goes on from what was saved."""
    job = s.submit(name)
    s.at(job)
    slurm.ask("scancel", job.id)
    s.end(job, "CANCELLED")
    wait("the last rank", job, lambda: not job.ranks())
    time.sleep(1.0)  # a job's name has the second that it was submitted in
    s.end(s.submit(name), "COMPLETED")


def requeue(s: Study, name: str) -> None:
    job = s.submit(name)
    s.at(job)
    slurm.ask("scontrol", "requeue", job.id)
    s.end(job, "COMPLETED")


def warning(s: Study, name: str) -> None:
    """What --signal=B:USR1@… does when the time limit comes near."""
    job = s.submit(name)
    s.at(job)
    slurm.ask("scancel", "--batch", "--signal=USR1", job.id)
    s.end(job, "COMPLETED")
    if "asked to stop by SIGUSR1" not in job.said() and len(attempts(name)) > 1:
        s.seen.wrong.append(f"{name}: started again, but not for the warning")


def time_limit(s: Study, name: str) -> None:
    """Without a warning, as for a job whose limit was shortened: TIMEOUT, and the same command goes on."""
    job = s.submit(name)
    s.at(job)
    slurm.ask("scontrol", "update", f"JobId={job.id}", "EndTime=now")
    s.end(job, "TIMEOUT")
    wait("the last rank", job, lambda: not job.ranks())
    time.sleep(1.0)
    s.end(s.submit(name), "COMPLETED")


def preempt(grace_s: int) -> Callable[[Study, str], None]:
    def fault(s: Study, name: str) -> None:
        slurm.ask("scontrol", "update", "PartitionName=work", f"GraceTime={grace_s}")
        job = s.submit(name)
        s.at(job)
        wanted = f"sbatch --parsable -p urgent -N{NODES} --exclusive -o /dev/null --wrap true"
        slurm.ask(*wanted.split())
        s.end(job, "COMPLETED")

    return fault


def array_with_a_failing_task(s: Study, name: str) -> None:
    """The one that cannot succeed FAILS, one is killed once, and none of the others is started again."""
    job = s.submit(name, "launch.nodes=1", "launch.devices_per_node=2", grid="data.text_key=a,b,c")
    (job.folder / "runs/1.yaml").write_text("model: {}\n")
    s.at(job, "2")
    killed = [pid for pid in job.ranks("") if _task(pid) == "2"]
    if killed:
        os.kill(s.rng.choice(killed), signal.SIGKILL)
    s.end(job, "COMPLETED", "FAILED", "COMPLETED")
    again = {task: len(list(job.folder.glob(f"logs/task-{task}/attempt-*"))) for task in range(3)}
    if again != {0: 1, 1: 1, 2: 2 if killed else 1}:
        s.seen.wrong.append(f"{name}: attempts by task {again}")


def _task(pid: int) -> str:
    found = re.search(rb"(?:^|\0)TRAINSYS_TASK=(\d+)", Path(f"/proc/{pid}/environ").read_bytes())
    return found[1].decode() if found else ""


def bad_node(text: str) -> Callable[[Study, str], None]:
    def fault(s: Study, name: str) -> None:
        (s.work / name).mkdir()
        job = s.submit(name, spoil(s.work / name, RAISES.format(every=EVERY, text=text)))
        s.end(job, "COMPLETED")
        if f"exclude {BAD}: {BAD}: rank " not in job.said():
            s.seen.wrong.append(f"{name}: the node was not left out")

    return fault


def two_jobs_on_one_node(s: Study, name: str) -> None:
    one = ("launch.nodes=1", "launch.devices_per_node=1", "launch.sbatch=[--nodelist=127.0.0.13]")
    quiet, job = s.submit(f"{name}x", *one), s.submit(name, *one)
    s.at(job)
    for pid in job.ranks():
        os.kill(pid, signal.SIGKILL)
    s.end(job, "COMPLETED")
    s.end(quiet, "COMPLETED")
    if len(list(quiet.folder.glob("logs/task-0/attempt-*"))) != 1:
        s.seen.wrong.append(f"{name}: the other job was disturbed")


FAULTS: dict[str, Callable[[Study, str], None]] = {
    "kill a slurmd": kill_slurmd,
    "kill -9 a rank": signal_rank(signal.SIGKILL),
    "SIGSTOP a rank": signal_rank(signal.SIGSTOP),
    "full disk": full_disk,
    "scancel": cancel,
    "requeue": requeue,
    "warning before the time limit": warning,
    "time limit without a warning": time_limit,
    "preemption with grace": preempt(30),
    "preemption without grace": preempt(0),
    "array with a failing task": array_with_a_failing_task,
    "node with a broken device": bad_node("CUDA error: uncorrectable ECC error encountered"),
    "node that raises again and again": bad_node("it does so on this node"),
    "two jobs on one node": two_jobs_on_one_node,
}
ONE_RANK = {"two jobs on one node"}


@contextmanager
def stage(folder: Path) -> Iterator[Study]:
    """The cluster, and the files of a run, in ``folder``; this process works there."""
    slurm, work = folder / "slurm", folder / "a job"  # which may have a space in its name
    work.mkdir()
    (work / "run.yaml").write_text(RUN)
    (work / "corpus.txt").write_text("\n".join(f"{n} and {n + 1} make {2 * n + 1}" for n in range(3000)))
    os.environ["SLURM_CONF"] = str(slurm / "slurm.conf")
    os.environ["SLURM_TEST_PORT"] = str(24000 + os.getpid() % 500 * 10)
    os.environ["PYTHONPATH"] = str(Path(__file__).resolve().parents[1])
    before = Path.cwd()
    os.chdir(work)
    study = Study(slurm, work, random.Random())
    with ExitStack() as stack:
        stack.callback(os.chdir, before)
        stack.callback(study.cluster, "down")
        study.cluster("up", str(NODES))
        yield study


def disturb(study: Study, number: int, fault: str, seed: int) -> Seen:
    study.rng, study.seen = random.Random(f"{seed}.{number}"), Seen(number, fault)
    began = time.monotonic()
    name = f"fault{number:03d}"
    quiet, study.quiet = study.quiet, {} if fault in ONE_RANK else study.quiet
    try:
        FAULTS[fault](study, name)
        if fault in ONE_RANK:
            # One rank adds in another order than two: the undisturbed one of the two jobs is the measure.
            (_, study.quiet), *_ = attempts(f"{name}x")
            study.check(name)
    except Exception as error:
        study.seen.wrong.append(f"{type(error).__name__}: {error}")
        with suppress(Exception):
            slurm.ask("scancel", "--full", "--user", str(os.getuid()))
    study.quiet = quiet
    study.seen.seconds = round(time.monotonic() - began, 1)
    return study.seen


def summary(seen: list[Seen], seed: int) -> dict[str, object]:
    kinds = {fault: [s for s in seen if s.fault == fault] for fault in FAULTS}
    return {
        "faults": len(seen),
        "seed": seed,
        "steps": STEPS,
        "save_interval": EVERY,
        "right": sum(not s.wrong and not s.false_completed for s in seen),
        "false_completed": sum(s.false_completed for s in seen),
        "most_steps_lost": max((s.most_steps_lost for s in seen), default=0),
        "attempts": sum(s.attempts for s in seen),
        "steps_compared_to_the_bit": sum(s.steps_compared for s in seen),
        "seconds": round(sum(s.seconds for s in seen), 1),
        "by_fault": {
            fault: {"n": len(s), "right": sum(not x.wrong for x in s)} for fault, s in kinds.items()
        },
        "wrong": [f"{s.number}: {s.fault}: {line}" for s in seen for line in s.wrong],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--n", type=int, default=100, help="faults in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no fault after these")
    parser.add_argument("--resume", action="store_true", help="go on after what the lines beside --out hold")
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=[*FAULTS], metavar="FAULT")
    parser.add_argument("--out", type=Path, default=Path("profiling/results/cluster_faults.json"))
    args = parser.parse_args()
    out, lines = args.out.resolve(), args.out.resolve().with_suffix(".jsonl")
    seen: list[Seen] = []
    if args.resume and lines.exists():
        seen = [Seen(**json.loads(line)) for line in lines.read_text().splitlines()]
    elif not args.resume:
        lines.unlink(missing_ok=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * args.minutes
    work = Path(tempfile.mkdtemp(prefix="cluster-faults-"))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the cluster is taken down
    try:
        with stage(work) as study:
            no_fault(study, "quiet")
            study.quiet = study.check("quiet")
            if study.seen.wrong or sorted(study.quiet) != list(range(STEPS)):
                sys.exit(f"the undisturbed run is not done: {study.seen.wrong}")
            for number in range(len(seen), args.n):
                if time.monotonic() > end:
                    break
                result = disturb(study, number, args.faults[number % len(args.faults)], args.seed)
                seen.append(result)
                with lines.open("a") as file:
                    file.write(json.dumps(asdict(result)) + "\n")
                state = "WRONG: " + "; ".join(result.wrong) if result.wrong else "right"
                at = f" at step {result.at_step}" if result.at_step >= 0 else ""
                print(
                    f"{number:3d} {result.fault}{at}: {', '.join(result.states)}, {result.attempts} attempts, "
                    f"{result.most_steps_lost} steps lost, {result.seconds:g} s: {state}",
                    flush=True,
                )
                out.write_text(json.dumps(summary(seen, args.seed), indent=1) + "\n")
    finally:
        shutil.rmtree(work, ignore_errors=True)
    whole = summary(seen, args.seed)
    print(json.dumps({key: value for key, value in whole.items() if key != "by_fault"}))
    return 0 if whole["right"] == len(seen) else 1


if __name__ == "__main__":
    sys.exit(main())
