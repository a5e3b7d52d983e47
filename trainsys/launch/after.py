"""How an attempt of a job ended, and whether it is started again: asked by the job script, in its own process.

Prints one line, ``done``, ``again`` or ``fail N``, with the reason. A run that was asked to stop, and saved,
goes on in the next attempt and costs nothing. A failure counts, and so does an attempt that was asked to stop
but saved nothing new: neither may loop for ever. After ``again`` a second line, ``exclude NODES: why``, tells
which nodes the next attempt is to do without.

usage: python -m trainsys.launch.after CHECKPOINT_FOLDER --code N --restarts N --history FILE --failure FILE
           [--blamed FILE --nodes N --usable N]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from trainsys.errors import EXIT_USER_ERROR
from trainsys.launch.blame import read, to_leave
from trainsys.launch.failure import Failure, read_failure

_MARKER = (
    "drained.json"  # trainsys.resilience.drain writes it; that module needs more than this one may import
)


def verdict(
    folder: Path, code: int, asked: str, failure: Failure | None, history: Path, restarts: int
) -> str:
    """The line for an attempt whose ranks ended with ``code`` after the signal ``asked`` ('': none).

    ``history`` holds one line for every attempt that counts against ``restarts``, and the last saved step.
    """
    past = _read(history)
    drained = _drained(folder)
    if code == 0 and drained is None:
        return "done"
    if failure is not None and failure.code == EXIT_USER_ERROR:
        return f"fail {EXIT_USER_ERROR}: rank {failure.rank}: {failure.message}"
    if code != 0 and not asked:
        # Slurm ends the other ranks of a failed one with SIGTERM: their marker is not that of a request.
        drained = None
    step = drained.get("saved_step") if drained else None
    if drained is not None and (step is not None and step != past["step"]):
        _write(history, {**past, "step": step})
        return f"again: asked to stop by {drained.get('signal', asked)}, step {step} is saved"
    if asked == "TERM" and code != 0:
        return "again: preempted before it could save"
    if drained is not None:
        why = "asked to stop, and nothing new was saved"
    elif failure is not None:
        why = f"rank {failure.rank}: {failure.message.splitlines()[0]}"
    else:
        # The highest of the ranks' codes: 143 may be of a rank that Slurm ended after another was killed.
        why = f"a rank was killed (srun: exit code {code})" if code > 128 else f"exit code {code}"
    count = past["failures"] + 1
    _write(history, {**past, "failures": count})
    if count > restarts:
        return f"fail {code or 1}: {why}; that is failure {count}, and launch.max_restarts is {restarts}"
    return f"again: {why}; failure {count} of {restarts} that are started again"


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


def _drained(folder: Path) -> dict[str, object] | None:
    try:
        note = json.loads((folder / _MARKER).read_text(encoding="utf-8"))
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


def _write(history: Path, state: dict[str, object]) -> None:
    beside = history.with_suffix(".new")
    beside.write_text(json.dumps(state), encoding="utf-8")
    beside.replace(history)


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="trainsys.launch.after")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--code", type=int, required=True)
    parser.add_argument("--asked", default="")
    parser.add_argument("--restarts", type=int, required=True)
    parser.add_argument("--history", type=Path, required=True)
    parser.add_argument("--failure", type=Path, required=True)
    parser.add_argument("--blamed", type=Path)
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--usable", type=int, default=0)
    args = parser.parse_args(argv)
    failure = read_failure(args.failure)
    said = verdict(args.folder, args.code, args.asked, failure, args.history, args.restarts)
    print(said)
    if said.startswith("again") and args.blamed and (more := exclusion(args.blamed, args.nodes, args.usable)):
        print(more)


if __name__ == "__main__":
    main(sys.argv[1:])
