"""How an attempt of a job ended, and whether it is started again: asked by the job script, in its own process.

Prints one line, ``done``, ``again`` or ``fail N``, with the reason. Exit code 0 is done only with the proof that the
last step was reached. A run that was asked to stop, and saved, goes on in the next attempt and costs nothing, and so
does one that was preempted. Failures count until a newer step is saved. After ``again`` may follow ``exclude NODES:
why``, the nodes that the next attempt is to do without, and ``wait S: why``, the seconds until it may start.

usage: python -m trainsys.launch.after RUN.yaml --job FOLDER --code N [--asked SIGNAL] [--srun FILE]
           [--nodes N --usable N]          and the files that TRAINSYS_FAILURE_FILE and the like name
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trainsys.blame import BLAME_FILE, read, to_leave
from trainsys.config.loader import load_run
from trainsys.errors import EXIT_MACHINE_FAULT, EXIT_USER_ERROR, MachineFault, UserError, fault_of
from trainsys.failure import FAILURE_FILE, Failure, accuse, read_failure
from trainsys.launch.proof import DONE_FILE, MARKER, doubt

_CHECKPOINT = re.compile(r"step_(\d+)(?:\.\d+)?/manifest\.json")  # trainsys.checkpoint.folder: the same holds
_DIED = re.compile(
    r"^srun: error: (\S+): (tasks? \S+): (Killed|Segmentation fault|Bus error|Aborted|Illegal instruction)",
    re.M,
)
_LONGEST_WAIT_S = 3600
_UNREAD = 3
"""Attempts that may follow one whose config could not be read, and so not its launch.max_restarts."""


@dataclass(frozen=True)
class Attempt:
    """What an attempt has left behind."""

    code: int
    """The highest of its ranks' exit codes."""
    doubt: str = ""
    """Why exit code 0 would not mean that all is done."""
    asked: str = ""
    """The signal that the job script was sent: USR1 is a warning, TERM a preemption; empty: none."""
    failure: Failure | None = None
    drained: dict[str, object] | None = None
    saved: int = -1
    """The newest step on disk."""
    number: int = 0
    """Attempts before this one."""


@dataclass(frozen=True)
class Verdict:
    line: str
    counted: bool = False
    """A failure, and so perhaps a node's."""
    wait_s: int = 0

    @property
    def again(self) -> bool:
        return self.line.startswith("again")


def verdict(
    attempt: Attempt,
    history: Path,
    restarts: int,
    retry_wait_s: int = 0,
    setting: str = "launch.max_restarts",
) -> Verdict:
    """What becomes of the job. ``history`` keeps the failures since a newer step was saved, and that step;
    ``setting`` is the name of ``restarts``, how many of them are started again."""
    if attempt.code == 0 and not attempt.doubt:
        return Verdict("done")
    failure, drained = attempt.failure, attempt.drained
    if attempt.code != 0 and failure is not None and failure.code == EXIT_USER_ERROR:
        return Verdict(f"fail {EXIT_USER_ERROR}: rank {failure.rank}: {failure.message}")
    if attempt.code != 0 and not attempt.asked:
        # Slurm ends the other ranks of a failed one with SIGTERM: their marker is not that of a request.
        drained = None
    past = _read(history)
    step = drained.get("saved_step") if drained else None
    saved = max(attempt.saved, step if isinstance(step, int) else -1)
    newer = saved > past["step"]
    if drained is not None and newer:
        _write(history, {"failures": 0, "step": saved})
        return Verdict(
            f"again: asked to stop by {drained.get('signal', attempt.asked)}, step {saved} is saved"
        )
    if attempt.asked == "TERM":
        return Verdict("again: preempted before it could save a new step")
    count = 1 if newer else past["failures"] + 1
    if not _write(history, {"failures": count, "step": max(saved, past["step"])}):
        count = attempt.number + 1  # where nothing can be written Slurm's own count bounds it
    why = _why(attempt, drained)
    if count > restarts:
        since = f" since step {saved} was saved" if saved >= 0 else ""
        return Verdict(
            f"fail {attempt.code or 1}: {why}; that is failure {count}{since}, and {setting} is {restarts}",
            counted=True,
        )
    nobodys = failure is not None and failure.code == EXIT_MACHINE_FAULT and not failure.host
    wait = min(_LONGEST_WAIT_S, retry_wait_s * 2 ** (count - 1)) if nobodys else 0
    return Verdict(f"again: {why}; failure {count} of {restarts} that are started again", True, wait)


def _why(attempt: Attempt, drained: dict[str, object] | None) -> str:
    if attempt.code == 0:
        return "asked to stop, and nothing new was saved" if drained is not None else attempt.doubt
    if attempt.failure is not None:
        at = f" on {attempt.failure.host}" if attempt.failure.host else ""
        return f"rank {attempt.failure.rank}{at}: {attempt.failure.line}"
    # The highest of the ranks' codes: 143 may be of a rank that Slurm ended after another was killed.
    if attempt.code > 128:
        return f"a rank was killed (exit code {attempt.code})"
    return f"exit code {attempt.code}"


def cause(failure: Failure | None, srun: str, code: int) -> Failure | None:
    """The failure to blame: of a rank that was killed srun alone knows, the others only see it gone."""
    if failure is not None and not failure.lost_peer:
        return failure
    if died := _DIED.search(srun):
        host, tasks, how = died.groups()
        rank = int(re.findall(r"\d+", tasks)[0])
        return Failure(rank, code, f"{how.lower()} (srun: exit code {code})", host)
    return failure


def exclusion(blamed: Path, nodes: int, usable: int) -> str:
    """The line about blamed nodes; empty: none. ``usable`` nodes may be used by a job that needs ``nodes``."""
    leave = to_leave(read(blamed))
    spare = max(0, usable - nodes)
    kept, left = dict(list(leave.items())[spare:]), dict(list(leave.items())[:spare])
    lines = []
    if left:
        why = "; ".join(f"{host}: {reason}" for host, reason in left.items())
        lines.append(f"exclude {','.join(left)}: {why}")
    if kept:
        lines.append(
            f"keep {','.join(kept)}: blamed, but of {usable} nodes that may be used the job needs {nodes}"
        )
    return "\n".join(lines)


def newest_saved(folder: Path) -> int:
    """The newest step that has a checkpoint in ``folder``; -1: none."""
    found = (_CHECKPOINT.search(path.as_posix()) for path in folder.glob("step_*/manifest.json"))
    return max((int(match[1]) for match in found if match), default=-1)


def _drained(folder: Path) -> dict[str, object] | None:
    try:
        note = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return {}
    return note if isinstance(note, dict) else {}


def _read(history: Path) -> dict[str, int]:
    try:
        return {"failures": 0, "step": -1, **json.loads(history.read_text(encoding="utf-8"))}
    except (OSError, ValueError):
        return {"failures": 0, "step": -1}


def _write(history: Path, state: dict[str, int]) -> bool:
    beside = history.with_suffix(".new")
    try:
        beside.write_text(json.dumps(state), encoding="utf-8")
        beside.replace(history)
    except OSError:
        return False
    return True


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="trainsys.launch.after")
    parser.add_argument("run")
    parser.add_argument("--job", type=Path, required=True)
    parser.add_argument("--code", type=int, required=True)
    parser.add_argument("--asked", default="")
    parser.add_argument("--srun", type=Path, default=Path(os.devnull))
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--usable", type=int, default=0)
    args = parser.parse_args(argv)
    env = os.environ
    number = int(env.get("SLURM_RESTART_COUNT", "0"))
    try:
        run = load_run(args.run)
    except UserError as error:
        # The ranks could not read it either; a file system that fails may not do so for ever.
        again = isinstance(fault_of(error), MachineFault) and number < _UNREAD
        print(f"{'again' if again else f'fail {EXIT_USER_ERROR}'}: {str(error).splitlines()[0]}")
        return
    folder, blamed = Path(run.checkpoint_folder), Path(env[BLAME_FILE])
    said = args.srun.read_text(encoding="utf-8", errors="replace") if args.srun.exists() else ""
    attempt = Attempt(
        code=args.code,
        doubt=doubt(Path(env[DONE_FILE]), run.train.steps),
        asked=args.asked,
        failure=cause(read_failure(Path(env[FAILURE_FILE])), said, args.code),
        drained=_drained(folder),
        saved=newest_saved(folder),
        number=number,
    )
    history = args.job / f"history-{env.get('TRAINSYS_TASK', '0')}.json"
    told = verdict(attempt, history, run.launch.max_restarts, run.launch.retry_wait_s)
    print(told.line)
    if told.counted and attempt.failure is not None:
        accuse(attempt.failure)
    if told.again:
        if more := exclusion(blamed, args.nodes, args.usable):
            print(more)
        if told.wait_s:
            print(f"wait {told.wait_s}: seconds, for what is no node's fault to pass")


if __name__ == "__main__":
    main(sys.argv[1:])
