"""A dry run in the terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from trainsys.dryrun.meter import PARTS

_GIB = 2.0**30


def render(data: dict[str, Any], console: Console | None = None) -> None:
    """Print ``trainsys.dryrun.main.result``."""
    screen = console or Console(highlight=False)
    if console is None and not screen.is_terminal:
        screen = Console(highlight=False, width=120)
    share = data["model_flops_per_rank"]
    screen.print(
        f"{data['model']}, {data['world']} ranks: {data['layout']}; {data['micro_batches']} micro-batches per step\n"
        f"model FLOPs per step {data['model_flops']:.4g}, {share:.4g} a rank on average; memory as on {data['device']}"
    )
    table = Table(title="a step of each rank: FLOPs, and GiB at the peak")
    for name in ("rank", "at"):
        table.add_column(name)
    parts = [p for p in PARTS if any(r["memory_at_peak"].get(p) for r in data["ranks"])]
    for name in ("FLOPs", "of mean", "peak", *parts):
        table.add_column(name, justify="right")
    for r in data["ranks"]:
        at = " ".join(f"{a}={i}" for a, i in r["coords"].items() if i) or "first"
        gib = [f"{r['memory_at_peak'].get(p, 0) / _GIB:.2f}" for p in parts]
        table.add_row(
            str(r["rank"]),
            at,
            f"{r['flops']:.4g}",
            f"{r['flops'] / share:.1%}",
            f"{r['peak_bytes'] / _GIB:.2f}",
            *gib,
        )
    screen.print(table)
    table = Table(title="what each rank sends in a step")
    for name in ("rank", "axis", "operation"):
        table.add_column(name)
    for name in ("calls", "GB"):
        table.add_column(name, justify="right")
    for r in data["ranks"]:
        for axis, ops in r["traffic"].items():
            for op, t in ops.items():
                if t["sent_bytes"]:
                    table.add_row(str(r["rank"]), axis, op, str(t["calls"]), f"{t['sent_bytes'] / 1e9:.3f}")
    screen.print(table)
    for note in data["notes"]:
        screen.print(f"note: {note}")
    screen.print(f"{data['seconds']:.1f} s and {data['peak_rss_bytes'] / _GIB:.2f} GiB of this machine")
