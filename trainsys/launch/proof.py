"""The proof that a run has reached its last step, without which exit code 0 does not count as done.

A rank ends with 0 as well where it was asked to stop, where something called ``sys.exit``, where it read another
config. So the launcher names a file by an absolute path, rank 0 writes the last step there once everything has been
done, and who asks for the end of the run compares it with ``train.steps``.
"""

from __future__ import annotations

import json
from pathlib import Path

DONE_FILE = "TRAINSYS_DONE_FILE"
"""Environment variable: where rank 0 writes the proof."""

MARKER = "drained.json"
"""In the checkpoint folder of a run that was asked to stop, and so ends with 0 without a proof."""


def content(step: int) -> bytes:
    """What the file holds of a run that ended at ``step``."""
    return json.dumps({"step": step}).encode() + b"\n"


def last_step(path: Path) -> int | None:
    """The step that the file proves; None where there is no such file, or nothing readable in it."""
    try:
        step = json.loads(path.read_text(encoding="utf-8"))["step"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return step if isinstance(step, int) else None


def doubt(path: Path, steps: int) -> str:
    """Why an exit code of 0 does not mean that ``steps`` steps are done; empty: it does."""
    step = last_step(path)
    if step == steps:
        return ""
    found = "there is no proof that it" if step is None else f"its proof says step {step}, not that it"
    return f"ended without finishing: {found} reached step {steps}"
