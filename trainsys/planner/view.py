"""What ``trainsys plan`` prints: a ranked table of a hundred columns' width, then the reasons."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

_DEGREES = ("pp", "dp_replicate", "dp_shard", "cp", "tp", "ep")
_PARTS = ("parameters", "gradients", "optimizer", "activations", "logits", "buffers")


def render(data: dict[str, Any], console: Console) -> None:
    """Print ``data`` as ``planner.main.result`` made it."""
    console.print()
    console.print(Text(f"{data['model']} on {data['devices']} GPUs of {data['cluster']}", style="bold"))
    console.print(Text(f"MFU: {data['mfu_definition']}", style="dim"))
    console.print(_table(data["ranked"]))
    first = data["ranked"][0]
    parts = [(name, first["memory_gib"][name]) for name in _PARTS]
    held = ", ".join(f"{name} {gib:.1f}" for name, gib in parts if gib >= 0.05)
    gains = ", ".join(f"{s['change']} {s['tokens_per_s_gain_pct']:+.1f}%" for s in data["sensitivity"])
    g = data["goodput"]
    front = "; ".join(f"{e['memory_gib']['total']:.0f} GiB {e['step_time_s']:.3g} s" for e in data["pareto"])
    rows = [
        (
            "considered",
            f"{data['considered']:,} layouts divide; {data['refused_memory']:,} of them refused: more than "
            f"{100 * (1 - data['memory_margin']):.0f}% of usable memory. Shown: the best of each pp, cp, tp, ep and "
            "micro-batch (mb); rep and shard: data parallelism; keep: ZeRO-2",
        ),
        ("memory of the first", f"GiB: {held}"),
        ("why the first wins", data["why_first"]),
        *([("why not", data["why_not"])] if data["why_not"] else []),
        ("sensitivity", f"tokens/s: {gains}"),
        (
            "failures",
            f"one in {g['mtbf_s'] / 3600:,.1f} h; checkpoint every {g['checkpoint_every_s'] / 60:.0f} min; "
            f"{100 * g['share']:.1f}% goodput: effective MFU {100 * g['effective_mfu']:.1f}%",
        ),
        ("time against memory", front),
        ("confidence", data["confidence"]),
    ]
    said = Table.grid(padding=(0, 2))
    said.add_column(style="bold", no_wrap=True)
    said.add_column(overflow="fold")
    for name, text in rows:
        said.add_row(name, Text(text))
    console.print(said)


def _table(ranked: list[dict[str, Any]]) -> Table:
    header = ("#", "layout", "pipeline", "recompute", "MFU", "step s", "GiB", "lost most to")
    rows = [_row(rank, e) for rank, e in enumerate(ranked, 1)]
    table = Table(box=None, padding=(0, 1), header_style="bold", row_styles=["", "dim"])
    for i, name in enumerate(header):
        left = name in ("layout", "pipeline", "recompute", "lost most to")
        # Only the last column gives way on a narrow screen.
        width = None if name == header[-1] else max(len(name), *(len(row[i]) for row in rows))
        table.add_column(
            name, justify="left" if left else "right", no_wrap=width is not None, min_width=width
        )
    for row in rows:
        table.add_row(*row)
    return table


def _row(rank: int, e: dict[str, Any]) -> tuple[str, ...]:
    lay = e["layout"]
    degrees = " ".join(f"{axis}{lay[axis]}" for axis in _DEGREES if lay[axis] != 1) or "one GPU"
    degrees = degrees.replace("dp_replicate", "rep").replace("dp_shard", "shard")
    return (
        str(rank),
        f"{degrees} mb{lay['micro_batch']}" + ("" if lay["reshard"] else " keep")
        + (" each" if lay["reduce_each"] else ""),
        "-" if lay["pp"] == 1 else lay["schedule"] + (f" x{lay['vpp']}" if lay["vpp"] > 1 else ""),
        lay["recompute"],
        f"{100 * e['mfu']:.1f}%",
        f"{e['step_time_s']:.3g}",
        f"{e['memory_gib']['total']:.1f}",
        e["bottleneck"],
    )
