"""Pictures of a pipeline schedule: text for a terminal, SVG for a page."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from rich.console import Console

from trainsys.errors import UserError
from trainsys.planner.constants import shipped
from trainsys.planner.search import Found
from trainsys.planner.settings import config_name
from trainsys.planner.space import to_cases
from trainsys.planner.step_time import stage_times
from trainsys.schedules.build import build
from trainsys.schedules.simulate import Timeline, Times, simulate

_COLOURS = {"F": "#4c78a8", "B": "#54a24b", "I": "#88c779", "W": "#e8b04a"}
_NAMES = {"F": "forward", "B": "backward", "I": "gradient of input", "W": "gradient of weights"}


def text(sim: Timeline, width: int = 100) -> str:
    """One line a rank, ``width`` characters for the whole span: what most of each slot goes to, ``.`` idle."""
    step = sim.step_time / width
    lines = []
    for r, ops in enumerate(sim.ranks):
        # Slots may be longer than operations: what counts is how much of a slot each kind takes in all.
        busy = {kind: np.zeros(width) for kind in _COLOURS}
        for t in ops:
            for x in range(int(t.start / step), min(int(np.ceil(t.end / step)), width)):
                busy[t.action.op][x] += min(t.end, (x + 1) * step) - max(t.start, x * step)
        kinds = [*busy, "."]
        idle = step * (1.0 + 1e-9) - sum(busy.values())
        row = [kinds[i] for i in np.argmax(np.stack([*busy.values(), idle]), axis=0)]
        lines.append(f"{r:>3} " + "".join(row) + f"  in flight {sim.in_flight_rank[r]}")
    return "\n".join(lines) + f"\nbubble {100 * sim.bubble:.1f}%, span {sim.step_time:.4g} s"


def svg(sim: Timeline, width: int = 1200, row: int = 26) -> str:
    """A self-contained picture: a row a rank, micro-batch numbers where there is room."""
    p = len(sim.ranks)
    scale = (width - 60) / sim.step_time
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{p * row + 44}" '
        'font-family="sans-serif" font-size="11">',
        f'<text x="4" y="14">{sim.schedule.name}: bubble {100 * sim.bubble:.1f}%, span {sim.step_time:.4g} s</text>',
    ]
    for r, ops in enumerate(sim.ranks):
        y = 22 + r * row
        parts.append(f'<text x="4" y="{y + row - 10}">rank {r}</text>')
        for t in ops:
            x, w = 56 + t.start * scale, max((t.end - t.start) * scale, 0.2)
            does = f"{t.action.op} stage {t.action.stage} micro-batch {t.action.micro}"
            parts.append(
                f'<rect x="{x:.2f}" y="{y}" width="{w:.2f}" height="{row - 4}" fill="{_COLOURS[t.action.op]}" '
                f'stroke="white" stroke-width="0.4"><title>{does}: '
                f"{t.start:.4g} to {t.end:.4g} s</title></rect>"
            )
            if w > 14:
                parts.append(
                    f'<text x="{x + w / 2:.1f}" y="{y + row - 10}" text-anchor="middle" fill="white">'
                    f"{t.action.micro}</text>"
                )
    x = 56.0
    for kind, colour in _COLOURS.items():
        parts.append(f'<rect x="{x}" y="{26 + p * row}" width="10" height="10" fill="{colour}"/>')
        parts.append(f'<text x="{x + 14}" y="{35 + p * row}">{_NAMES[kind]}</text>')
        x += 150
    return "\n".join([*parts, "</svg>"]) + "\n"


def of_layout(found: Found, i: int = 0) -> Timeline:
    """The predicted pipeline of layout ``i``: first and last stage with embedding and head.

    Raises:
        UserError: the layout has no pipeline.
    """
    lay = found.layout(i)
    p, v = int(lay["pp"]), int(lay["vpp"])
    if p == 1:
        raise UserError("the first pick has no pipeline to show; try --limit 'pp>=2'")
    case = to_cases(found.job, {k: x[i : i + 1] for k, x in found.layouts.items()})
    times = stage_times(case, shipped())
    first, middle, last = ([float(np.ravel(x.fwd)[0]), float(np.ravel(x.bwd)[0])] for x in times[:3])
    hop = float(np.ravel(times[3])[0])
    m = int(
        found.job.global_batch // (int(lay["dp_replicate"]) * int(lay["dp_shard"]) * int(lay["micro_batch"]))
    )
    stages = p * v
    fwd, bwd = [middle[0] / v] * stages, [middle[1] / v] * stages
    fwd[0], bwd[0] = fwd[0] + (first[0] - middle[0]), bwd[0] + (first[1] - middle[1])
    fwd[-1], bwd[-1] = fwd[-1] + (last[0] - middle[0]), bwd[-1] + (last[1] - middle[1])
    half = [0.5 * b for b in bwd]
    made = build(config_name(str(lay["schedule"])), p, m, v)
    return simulate(made, Times(forward=fwd, backward_input=half, backward_weight=half, send=hop))


def show_winner(found: Found, target: str | Path | bool, console: Console) -> None:
    """Print the winner's pipeline, or write it to ``target``.svg."""
    sim = of_layout(found)
    if target is True:
        console.print(text(sim, max(min(console.width - 22, 160), 40)), highlight=False, markup=False)
        return
    try:
        Path(str(target)).write_text(svg(sim), encoding="utf-8")
    except OSError as error:
        raise UserError(f"--show-schedule {target}: {error.strerror or error}") from error
    console.print(f"wrote {target}", highlight=False)
