"""The attempts of one run: where each began, and which run folders belong together. From files, without torch."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Origin:
    """Where an attempt begins; ``environment.json`` keeps it as ``run``."""

    lineage: str = ""
    """Names the run over all of its attempts; empty: it saves nothing, so there is only this one."""
    source: str = ""
    """The checkpoint or weights that it began with; empty: none."""
    lines: tuple[str, ...] = ()
    """What the user is told about that."""

    def facts(self, attempt: int, first_step: int, steps: int) -> dict[str, Any]:
        return {**asdict(self), "attempt": attempt, "first_step": first_step, "steps": steps}


def facts_of(run_dir: Path) -> dict[str, Any]:
    """What a run folder keeps as ``Origin.facts``; empty where it keeps nothing."""
    try:
        return dict(json.loads((run_dir / "environment.json").read_text(encoding="utf-8"))["run"])
    except (OSError, ValueError, TypeError, KeyError):
        return {}


def lineage_of(run_dir: Path) -> str:
    """The name of a run folder's run; empty where it has none."""
    return str(facts_of(run_dir).get("lineage", ""))


def attempts_of(run_dir: str | Path) -> list[Path]:
    """The folders of all attempts of a run, oldest first, of which ``run_dir`` is one. Those that were moved away are
    not found again."""
    here = Path(run_dir).resolve()
    lineage = lineage_of(here)
    if not lineage:
        return [here]
    # NAME-20250131-142501-3f9a: a run's attempts share its name, and sort by time after it.
    name = here.name.rsplit("-", 3)[0]
    return sorted({here, *(p for p in here.parent.glob(f"{name}-*") if lineage_of(p) == lineage and not p.is_symlink())})
