"""`trainsys jobs`: what was submitted and what runs, from the folders that jobs and runs leave behind."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from pathlib import Path
from typing import Any

from trainsys.errors import UserError
from trainsys.launch import slurm
from trainsys.launch.job import RECORD
from trainsys.launch.tail import Tail
from trainsys.telemetry.attempts import facts_of, lineage_of

_STEP = re.compile(r"step\s+(\d+/\d+)\s")
_MFU = re.compile(r"\bmfu (>?\d+(?:\.\d+)?%)")
_FINAL_MFU = re.compile(r"  mfu +(\d+(?:\.\d+)?%|n/a) ")
"""The report's line, which follows the last step's and is what the run quotes everywhere."""


def ls(folder: str | Path) -> str:
    """A table of the jobs in ``folder``/jobs and of the runs beside them, newest last."""
    root = _root(folder)
    rows = [["job", "on", "name", "ranks", "state", "attempts", "step", "mfu", "folder"]]
    for path, job in _jobs(root):
        step, mfu = _progress(path)
        identity = str(job["id"])
        rows.append(
            [
                identity,
                job["on"],
                job["name"],
                str(job["ranks"]),
                _state(job),
                str(_attempts(path)),
                step,
                mfu,
                os.path.relpath(path),
            ]
        )
    runs: dict[str, list[Path]] = {}
    for path in sorted(root.glob("*/config.yaml")):
        if not path.parent.is_symlink():
            runs.setdefault(lineage_of(path.parent) or path.parent.name, []).append(path.parent)
    rows += [["-", "-", *_run_row(attempts)] for attempts in runs.values()]
    if len(rows) == 1:
        return f"{folder}: no jobs and no runs"
    widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]))]
    return "\n".join(
        "  ".join(f"{c:<{w}}" for c, w in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def logs(job: str, folder: str | Path, rank: int | None, follow: bool) -> int:
    """Print a job's logs, merged; with ``follow`` until it is over. The job's exit code, if it was awaited."""
    path, found = _find(job, folder)
    if follow and found["on"] == "slurm":
        return slurm.follow(str(found["id"]), path, rank)
    if found["on"] != "slurm":
        raise UserError(f"{job}: its logs are with the cluster: {_elsewhere(found, 'logs')}")
    Tail(path, rank).show()
    return 0


def stop(job: str, folder: str | Path) -> str:
    """Cancel a job; what was done, in words."""
    _, found = _find(job, folder)
    identity = str(found["id"])
    if found["on"] == "slurm":
        slurm.ask("scancel", *identity.split(","))
        return f"job {identity} is told to save and end"
    raise UserError(f"{job}: stop it with {_elsewhere(found, 'stop')}")


def _jobs(root: Path) -> list[tuple[Path, dict[str, Any]]]:
    found = []
    for path in root.glob(f"jobs/*/{RECORD}"):
        try:
            found.append((path.parent, json.loads(path.read_text(encoding="utf-8"))))
        except (OSError, ValueError):
            continue
    return sorted(found, key=lambda item: item[1]["submitted_s"])


def _find(job: str, folder: str | Path) -> tuple[Path, dict[str, Any]]:
    """The newest job with this id, name or folder."""
    known = _jobs(_root(folder))
    for path, found in reversed(known):
        if (
            job in (*str(found["id"]).split(","), str(found["id"]), found["name"], path.name)
            or Path(job).resolve() == path.resolve()
        ):
            return path, found
    last = ", ".join(f"{found['id']} ({found['name']})" for _, found in known[-5:]) or "none"
    raise UserError(f"{job}: no job of this id, name or folder in {folder}/jobs; the newest are {last}")


def _root(folder: str | Path) -> Path:
    root = Path(folder)
    if not root.is_dir():
        raise UserError(f"{folder}: no such folder; name the telemetry.out of your runs")
    return root


def _state(job: dict[str, Any]) -> str:
    if job["on"] != "slurm":
        return f"see {_elsewhere(job, 'state')}"
    if shutil.which("scontrol") is None:
        return "unknown: no Slurm here"
    states = [state for state, _ in slurm.states(str(job["id"])).values()]
    if not states:
        return "forgotten by Slurm"
    counts = {state: states.count(state) for state in dict.fromkeys(states)}
    return states[0] if len(states) == 1 else ", ".join(f"{n} {state}" for state, n in counts.items())


def _elsewhere(job: dict[str, Any], what: str) -> str:
    name = job["id"]
    if job["on"] == "skypilot":
        return {"logs": f"`sky jobs logs -n {name}`", "stop": f"`sky jobs cancel -n {name}`"}.get(
            what, "`sky jobs queue`"
        )
    kind = job["kind"]
    at = f"-n {job['namespace']}"
    return {
        "logs": f"`kubectl logs {at} -l jobset.sigs.k8s.io/jobset-name={name} --all-containers --prefix`",
        "stop": f"`kubectl delete {kind} {at} {name}`",
    }.get(what, f"`kubectl get {kind} {at} {name}`")


def _progress(folder: Path) -> tuple[str, str]:
    """The last step that rank 0 has logged in the newest attempt, and the MFU: the report's, where there is one."""
    files = sorted(folder.glob("logs/task-*/attempt-*/train-00000.log"), key=lambda p: p.stat().st_mtime)
    for path in reversed(files):
        found, step = "-", None
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            if at := _STEP.match(line):
                step, mfu = at.group(1), _MFU.search(line)
                found = mfu.group(1) if mfu else "-"
            elif final := _FINAL_MFU.match(line):
                found = final.group(1)
        if step is not None:
            return step, found
    return "-", "-"


def _attempts(folder: Path) -> int:
    """How often a job was started, of its tasks the one that was most often."""
    tasks = folder.glob("logs/task-*")
    return max((len(list(task.glob("attempt-*"))) for task in tasks), default=0)


def _run_row(attempts: list[Path]) -> list[str]:
    """name, ranks, state, attempts, step, mfu and folder of a run, from its newest attempt's summary or from how its
    events grow; the MFU is of the newest attempt that has one."""
    run = attempts[-1]
    summaries = [_summary(attempt) for attempt in attempts]
    summary, facts = summaries[-1], facts_of(run)
    if summary:
        state = str(summary.get("status", "over"))
    else:
        newest = max((p.stat().st_mtime for p in run.glob("events/*")), default=0.0)
        state = "running" if time.time() - newest < 60 else "died"
    mfu = next((s["mfu"] for s in reversed(summaries) if isinstance(s.get("mfu"), int | float)), None)
    done = summary.get("last_step", summary.get("steps")) or _last_shown(run) or facts.get("first_step")
    step = "-" if done is None else f"{done}/{facts['steps']}" if "steps" in facts else str(done)
    ranks = len(list(run.glob("events/rank_*.jsonl")))
    shown = "-" if mfu is None else f"{100 * mfu:.1f}%"
    return [run.name, str(ranks), state, str(len(attempts)), step, shown, os.path.relpath(run)]


def _summary(run: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((run / "summary.json").read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def _last_shown(run: Path) -> int | None:
    """Steps done as of the last whole line of metrics; None: there is none."""
    try:
        with open(run / "metrics.jsonl", "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 65536))
            lines = file.read().rsplit(b"\n", 2)
        return int(json.loads(lines[-2])["step"]) + 1
    except (OSError, ValueError, KeyError, IndexError):
        return None
