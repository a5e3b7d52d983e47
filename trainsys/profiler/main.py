"""``trainsys explain``: a run folder in; terminal, JSON and HTML out."""

from __future__ import annotations

from pathlib import Path

from trainsys.errors import UserError
from trainsys.profiler.explain import explain_run, to_json
from trainsys.profiler.page import page
from trainsys.profiler.run_steps import read_run
from trainsys.profiler.terminal import print_explanation
from trainsys.telemetry.report import final_report


def run_cli(run_dir: str | Path, html: str | None = None, json: bool = False) -> None:
    """Print the report of ``run_dir`` (``json``: as JSON instead), and write it to ``html`` if that is given.

    Raises UserError where there is no run, or ``html`` cannot be written.
    """
    run, steps = read_run(run_dir)
    explanation = explain_run(run, steps)
    if json:
        print(to_json(explanation).decode())
    else:
        final_report(run, explanation.use)
        print_explanation(explanation)
    if html is None:
        return
    try:
        Path(html).write_text(page(explanation), encoding="utf-8")
    except OSError as error:
        raise UserError(f"--html {html}: {error.strerror or error}") from error
    if not json:
        print(f"wrote {html}")
