"""docs/capabilities.md from the tables: ``python -m trainsys.capabilities.page > docs/capabilities.md``."""

from __future__ import annotations

from trainsys.capabilities import LIMITS
from trainsys.capabilities.base import Limit
from trainsys.config.text import in_code


def page() -> str:
    lines = [
        "# What each engine can run",
        "",
        "Each engine runs every configuration that is not in its table; the same model on the same batches, to the same",
        "loss. What is in it is refused before anything starts, with this reason. What no engine can run is in",
        "[refusals.md](refusals.md). From the tables in `trainsys/capabilities`, by",
        "`python -m trainsys.capabilities.page > docs/capabilities.md`.",
    ]
    for engine, limits in LIMITS.items():
        lines += ["", f"## {engine}", ""]
        if not limits:
            lines.append("Everything.")
            continue
        lines += ["| refused | for example | why, and what works |", "|---|---|---|"]
        lines += [_row(limit) for limit in limits]
    return "\n".join(lines) + "\n"


def _row(limit: Limit) -> str:
    return f"| {limit.what} | {in_code(limit.example)} | {limit.reason} |"


if __name__ == "__main__":
    print(page(), end="")
