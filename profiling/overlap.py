"""What each switch of overlap hides: exposed seconds on and off, beside what arithmetic says.

    python profiling/overlap.py --json profiling/results/overlap.json

Links are throttled and work sleeps (tests/support/overlap): ranks, process groups and the code that starts and waits
are real. Each figure is the median of five attempts of the average rank. The machine should do nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.setdefault("OMP_NUM_THREADS", "1")

from support.overlap import CASES, Switch  # noqa: E402
from support.ranks import run_ranks  # noqa: E402

TIMES = ((0.08, 0.03), (0.03, 0.06))
"""Seconds of a message, and of the work that it can hide behind."""


def exposed(switch: Switch, on: bool, comm_s: float, compute_s: float) -> float:
    by_rank = run_ranks(switch.world, switch.measure, on, comm_s, compute_s)
    return statistics.median(sum(waits) / len(waits) for waits in zip(*by_rank, strict=True))


def measured(switch: Switch, comm_s: float, compute_s: float) -> dict[str, Any]:
    row: dict[str, Any] = {
        "switch": switch.name, "setting": switch.setting, "on": switch.on, "off": switch.off, "ranks": switch.world,
        "comm_s": comm_s, "compute_s": compute_s,
    }  # fmt: skip
    for state, on in (("on", True), ("off", False)):
        row[f"exposed_{state}_s"] = round(exposed(switch, on, comm_s, compute_s), 4)
        row[f"arithmetic_{state}_s"] = round(switch.predict(on, comm_s, compute_s), 4)
    row["on_over_off"] = round(row["exposed_on_s"] / row["exposed_off_s"], 3)
    return row


def table(rows: list[dict[str, Any]]) -> str:
    head = [
        "| what | switch | message, work (ms) | exposed on (arithmetic) | exposed off (arithmetic) | on / off |",
        "|---|---|---|---|---|---|",
    ]
    return "\n".join([*head, *(_line(r) for r in rows)])


def _line(r: dict[str, Any]) -> str:
    on, off = (
        f"{1e3 * r[f'exposed_{state}_s']:.0f} ({1e3 * r[f'arithmetic_{state}_s']:.0f})"
        for state in ("on", "off")
    )
    return (
        f"| {r['switch']} | `{r['setting']}={r['on']}`, off: `{r['off']}` "
        f"| {1e3 * r['comm_s']:.0f}, {1e3 * r['compute_s']:.0f} | {on} | {off} | {r['on_over_off']:.2f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the rows here")
    args = parser.parse_args()
    rows = [measured(switch, *times) for switch in CASES for times in TIMES]
    print(table(rows))
    if args.json is not None:
        args.json.write_text(json.dumps({"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
