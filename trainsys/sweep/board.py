"""The leaderboard: what each candidate did, beside what the planner says of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from trainsys.errors import UserError
from trainsys.planner import learned
from trainsys.planner.cluster import load_cluster
from trainsys.planner.learned import Learned
from trainsys.planner.machine import Machine
from trainsys.planner.one import case_of, predict_run
from trainsys.sweep.points import Candidate
from trainsys.sweep.store import Result


def rows(
    found: Sequence[tuple[Candidate, Result]], machine: Machine | None, known: Learned | None
) -> list[dict[str, Any]]:
    """Plain data, fastest first, then what did not finish. Predicted where a machine is named."""
    made = []
    for candidate, result in found:
        row: dict[str, Any] = {
            "candidate": candidate.label,
            "point": candidate.point,
            "status": result.status,
            "reason": result.reason,
            "step_time_s": result.step_time_s,
            "tokens_per_s": result.tokens_per_s,
            "mfu": result.mfu,
            "memory_peak_bytes": result.memory_peak_bytes,
            "run_dir": result.run_dir,
            "predicted_s": None,
        }
        if machine is not None and candidate.run is not None and result.world:
            k = None if known is None else known.constants
            scale = 1.0 if known is None else known.scale
            row["predicted_s"] = scale * predict_run(candidate.run, result.world, machine, k).step_time_s
        made.append(row)
    return sorted(made, key=lambda r: (r["status"] != "done", r["step_time_s"] or 0.0))


def machine_of(cluster: str | None, known: Learned | None) -> Machine | None:
    if cluster is None:
        return None
    machine = load_cluster(cluster).machine()
    return machine if known is None else known.machine(machine)


def refit(found: Sequence[tuple[Candidate, Result]], machine: Machine, path: str | Path) -> Learned:
    """Learn from the finished runs and write ``path``. UserError where none has finished."""
    done = [(c.run, r) for c, r in found if c.run is not None and r.status == "done" and r.step_time_s]
    if not done:
        raise UserError(
            f"--calibration {path}: no run of this sweep has finished; there is nothing to learn from"
        )
    cases = [case_of(run, result.world, machine) for run, result in done]
    first = cases[0]
    joined = {
        name: np.concatenate([np.atleast_1d(getattr(c, name)) for c in cases])
        for name in first.__dataclass_fields__
    }
    seconds = np.array([result.step_time_s for _, result in done], float)
    made = learned.learn(type(first)(**joined), seconds)
    learned.save(path, made)
    return made


def render(name: str, board: Sequence[dict[str, Any]], console: Console) -> None:
    """Print the leaderboard."""
    table = Table(title=f"sweep {name}", box=None, padding=(0, 1), header_style="bold")
    table.add_column("#", justify="right")
    table.add_column("candidate", overflow="fold")
    table.add_column("status")
    for title in ("step s", "predicted", "off", "tokens/s", "MFU", "GiB"):
        table.add_column(title, justify="right")
    for n, r in enumerate(board, 1):
        step, predicted = r["step_time_s"], r["predicted_s"]
        table.add_row(
            str(n) if r["status"] == "done" else "-",
            r["candidate"],
            r["status"],
            _cell(step, "{:.4g}"),
            _cell(predicted, "{:.4g}"),
            f"{100 * (predicted / step - 1):+.0f}%" if step and predicted else "-",
            _cell(r["tokens_per_s"], "{:,.0f}"),
            "-" if r["mfu"] is None else f"{100 * r['mfu']:.1f}%",
            "-" if r["memory_peak_bytes"] is None else f"{r['memory_peak_bytes'] / 2**30:.2f}",
        )
    console.print(table)
    for r in board:
        if r["reason"]:
            console.print(f"{r['candidate']}: {r['status']}: {r['reason']}", highlight=False, markup=False)


def _cell(value: float | None, shape: str) -> str:
    return "-" if value is None else shape.format(value)
