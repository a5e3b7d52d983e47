"""``trainsys sweep``: run the candidates that have not run yet, and show all."""

from __future__ import annotations

import json as jsonlib
from pathlib import Path
from typing import Any

from rich.console import Console

from trainsys.errors import UserError
from trainsys.sweep import array, board, local
from trainsys.sweep.config import load_sweep
from trainsys.sweep.page import page
from trainsys.sweep.points import candidates
from trainsys.sweep.store import Result, Store


def sweep(
    path: str,
    *,
    on: str = "local",
    cluster: str | None = None,
    calibration: str | None = None,
    html: str | None = None,
    json: bool = False,
    dry_run: bool = False,
    detach: bool = False,
    show: bool = False,
) -> int:
    """The command. Candidates that have ended are not run again; ``show`` runs none.

    ``cluster``: predict beside what is measured; with ``calibration`` refit the planner to what finished, into that
    file. Raises UserError for a sweep that cannot be read; what goes wrong in a run is that run's result.
    """
    cfg = load_sweep(path)
    if calibration is not None and cluster is None:
        raise UserError("--calibration: which machine is it of? name it by --cluster")
    store = Store(cfg.folder)
    console = Console(highlight=False, stderr=json)
    found = candidates(cfg)
    for candidate in found:
        if candidate.run is None:
            store.write(candidate, Result("refused", reason=candidate.refused))
    todo = [c for c in found if store.result(c) is None]
    console.print(f"{len(found)} candidates, {len(found) - len(todo)} have ended; results in {cfg.folder}")
    code = 0
    if todo and not show and on == "local":
        if dry_run:
            for candidate in todo:
                print(" ".join(candidate.overrides))
            return 0
        local.run_all(cfg, todo, store, lambda text: console.print(text, markup=False))
    elif todo and not show:
        array.collect(todo, store, ended=False)
        todo = [c for c in todo if store.result(c) is None]
        if todo:
            code = array.submit(cfg, todo, store, dry_run=dry_run, detach=detach)
            if dry_run:
                return code
            array.collect(todo, store, ended=not detach)
    else:
        array.collect(todo, store, ended=False)
    results = [(c, store.result(c) or Result("pending")) for c in found]
    machine = board.machine_of(cluster, None)
    known = None
    if calibration is not None and machine is not None:
        known = board.refit(results, machine, calibration)
        console.print(f"{calibration}: {known.confidence}")
    rows = board.rows(results, machine, known)
    _show(cfg.name, rows, html, json, console)
    return code


def _show(name: str, rows: list[dict[str, Any]], html: str | None, json: bool, console: Console) -> None:
    if json:
        print(jsonlib.dumps({"sweep": name, "candidates": rows}, indent=1))
    else:
        board.render(name, rows, console)
    if html is not None:
        try:
            Path(html).write_text(page(name, rows), encoding="utf-8")
        except OSError as error:
            raise UserError(f"--html {html}: {error.strerror or error}") from error
        console.print(f"wrote {html}")
