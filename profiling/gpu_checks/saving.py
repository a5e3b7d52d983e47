"""A run that is saved and goes on, as `trainsys train` does both."""

from __future__ import annotations

import contextlib
import io
import tempfile
from pathlib import Path
from typing import Any

from gpu_checks import Setting
from gpu_checks.bed import DEMO, ONE_RANK, TINY_DEMO
from trainsys.telemetry.events import Stall, Step
from trainsys.telemetry.reader import event_file, read_events
from trainsys.train.main import train

_SAVED_AT, _STEPS = 2, 4


def save_and_resume(at: Setting) -> dict[str, Any]:
    """Saved after some steps and resumed, a run has the losses of one that was never stopped, to the bit on a CPU."""
    with tempfile.TemporaryDirectory() as folder:
        whole, _ = _losses(at, Path(folder) / "whole", _STEPS)
        first, stalls = _losses(at, Path(folder) / "cut", _SAVED_AT)
        rest, _ = _losses(at, Path(folder) / "cut", _STEPS)
    assert (len(first), len(rest)) == (_SAVED_AT, _STEPS - _SAVED_AT), (first, rest)
    gap = max(abs(a - b) for a, b in zip([*first, *rest], whole, strict=True))
    # Kernels that add in no fixed order make two runs on a GPU differ, resumed or not.
    assert gap <= (1e-3 if at.cuda else 0.0), f"resumed losses are {gap:.2e} off: {[*first, *rest]} for {whole}"
    assert whole[-1] != whole[0], whole
    return {"largest_distance": gap, "stalled_s": stalls}


def _losses(at: Setting, folder: Path, steps: int) -> tuple[list[float], dict[str, float]]:
    """The newest attempt's losses, and for how long its steps were stopped, by cause."""
    overrides = [
        *ONE_RANK, *DEMO, *(TINY_DEMO if at.tiny else ()), f"train.device={at.kind}", f"train.steps={steps}",
        "checkpoint.every=2", f"telemetry.out={folder}", "telemetry.console=off",
    ]  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()):
        assert train("train/demo", overrides) == 0
    newest = max((p for p in folder.iterdir() if (p / "events").is_dir() and not p.is_symlink()), key=_age)
    events, _ = read_events(event_file(newest, 0))
    stalls: dict[str, float] = {}
    for e in events:
        if isinstance(e, Stall):
            stalls[e.kind] = stalls.get(e.kind, 0.0) + e.seconds
    return [e.loss for e in events if isinstance(e, Step) and e.loss is not None], stalls


def _age(run: Path) -> float:
    return run.stat().st_mtime
