"""Leave-one-source-out back-test of the planner as a report: scores, plots, and the constants it used.

    python profiling/backtest/report.py RUNS.csv [--refit]

Writes beside this file: results.json, report.md, predicted.svg, errors.svg and leave_one_out.yaml. Fitting takes some
minutes of one core; without --refit the constants in leave_one_out.yaml are used again.
"""

from __future__ import annotations

import argparse
import html
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from trainsys.planner.backtest import Predictions, predict, report
from trainsys.planner.calibrate import leave_one_out
from trainsys.planner.constants import Constants
from trainsys.planner.memory_constants import MemoryConstants
from trainsys.planner.runs_csv import Run, read

HERE = Path(__file__).parent
_MEANS = "mape_mean_of_sources_pct"
Fitted = dict[str, tuple[Constants, MemoryConstants]]
COLOURS = (
    "#4c78a8", "#f58518", "#e45756", "#72b7b2", "#54a24b", "#eeca3b", "#b279a2", "#ff9da6", "#9d755d",
    "#bab0ac", "#1f77b4", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#17becf",
)  # fmt: skip


def load(path: Path) -> Fitted:
    data = yaml.safe_load(path.read_text(encoding="utf-8"))
    return {n: (Constants(**v["time"]), MemoryConstants(**v["memory"])) for n, v in data.items()}


def save(path: Path, fitted: Fitted) -> None:
    def rounded(values: Constants | MemoryConstants) -> dict[str, float]:
        return {n: float(f"{v:.5g}") for n, v in asdict(values).items()}

    body = {n: {"time": rounded(k), "memory": rounded(m)} for n, (k, m) in sorted(fitted.items())}
    head = "# Constants for each source, fitted without any of its rows, by profiling/backtest/report.py --refit.\n"
    path.write_text(head + yaml.safe_dump(body, sort_keys=False), encoding="utf-8")


def scatter(p: Predictions) -> str:
    """Predicted against measured seconds, both logarithmic, one colour a source; lines at +-10%."""
    ok = np.isfinite(p.measured)
    x, y = np.log10(p.measured[ok]), np.log10(p.seconds[ok])
    sources = np.asarray([r.source for r in p.runs])[ok]
    low, high, size, pad = min(x.min(), y.min()), max(x.max(), y.max()), 640, 46
    scale = (size - 2 * pad) / (high - low)

    def at(v: float) -> float:
        return pad + (v - low) * scale

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{size + 190}" height="{size}" '
        'font-family="sans-serif" font-size="11">'
    ]
    out.append(f'<rect width="{size + 190}" height="{size}" fill="white"/>')
    for tick in range(math.ceil(low), math.floor(high) + 1):
        out.append(
            f'<path d="M{at(tick):.1f} {pad}V{size - pad}M{pad} {size - at(tick):.1f}H{size - pad}" stroke="#ddd"/>'
        )
        out.append(f'<text x="{at(tick):.1f}" y="{size - 28}" text-anchor="middle">{10**tick:g}</text>')
        out.append(f'<text x="{pad - 6}" y="{size - at(tick) + 4:.1f}" text-anchor="end">{10**tick:g}</text>')
    for shift, dash in ((0.0, ""), (math.log10(1.1), "4 3"), (math.log10(0.9), "4 3")):
        out.append(
            f'<path d="M{at(low):.1f} {size - at(low + shift):.1f}L{at(high):.1f} {size - at(high + shift):.1f}" '
            f'stroke="#888" stroke-dasharray="{dash}" fill="none"/>'
        )
    for i, name in enumerate(sorted(set(sources))):
        mine = np.flatnonzero(sources == name)
        # A big sweep's points lie on top of each other: every fourth is enough to see it.
        step = 4 if len(mine) > 600 else 1
        dots = "".join(f"M{at(x[j]):.1f} {size - at(y[j]):.1f}h0" for j in mine[::step])
        colour = COLOURS[i % len(COLOURS)]
        out.append(
            f'<path d="{dots}" stroke="{colour}" stroke-width="4" stroke-linecap="round" stroke-opacity="0.6"/>'
        )
        out.append(f'<circle cx="{size + 8}" cy="{60 + 18 * i}" r="4" fill="{colour}"/>')
        out.append(f'<text x="{size + 18}" y="{64 + 18 * i}">{html.escape(name)} ({len(mine)})</text>')
    out.append(f'<text x="{size / 2}" y="{size - 8}" text-anchor="middle">measured step, s</text>')
    out.append(
        f'<text transform="translate(12 {size / 2}) rotate(-90)" text-anchor="middle">predicted step, s</text>'
    )
    return "\n".join([*out, "</svg>"]) + "\n"


def bars(none: dict[str, Any], one: dict[str, Any]) -> str:
    """MAPE by source, without and with an anchor."""
    names = [n for n, s in none["sources"].items() if s["mape_pct"] is not None]
    top = max(none["sources"][n]["mape_pct"] for n in names)
    width, row = 760, 26
    scale = (width - 260) / top
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{row * len(names) + 40}" '
        'font-family="sans-serif" font-size="11">'
    ]
    out.append(f'<rect width="{width}" height="{row * len(names) + 40}" fill="white"/>')
    out.append(
        '<text x="150" y="14">mean absolute error of step time, %: without anchor (dark), with one (light)</text>'
    )
    for i, n in enumerate(names):
        y = 24 + i * row
        out.append(f'<text x="144" y="{y + 14}" text-anchor="end">{html.escape(n)}</text>')
        for data, dy, colour in ((none, 0, "#4c78a8"), (one, 10, "#9ecae9")):
            value = data["sources"][n]["mape_pct"]
            if value is not None:
                out.append(
                    f'<rect x="150" y="{y + dy}" width="{value * scale:.1f}" height="9" fill="{colour}"/>'
                )
                out.append(
                    f'<text x="{154 + value * scale:.1f}" y="{y + dy + 8}" font-size="9">{value:.1f}</text>'
                )
    return "\n".join([*out, "</svg>"]) + "\n"


def _cell(value: Any, digits: int = 1) -> str:
    return "-" if value is None else f"{value:.{digits}f}" if isinstance(value, float) else str(value)


def markdown(none: dict[str, Any], one: dict[str, Any]) -> str:
    columns = (
        "used", "refused", "mape_pct", "median_error_pct", "groups", "spearman", "regret_mean_pct", "regret_max_pct",
        "first_pick_oom_pct", "oom_balanced_accuracy_pct", "ran_called_oom_pct", "memory_mape_pct",
    )  # fmt: skip
    titles = (
        "used|refused|MAPE|median|groups|Spearman|regret|max|pick OOM|OOM bal. acc.|ran, called OOM|memory"
    )
    lines = [
        "# Back-test, leave-one-source-out",
        "",
        "Each source is predicted by constants fitted to the other sources only. Percent, but for counts and Spearman.",
        "Reproduce: `python profiling/backtest/report.py RUNS.csv --refit` (definitions: docs/planner.md).",
        "",
        f"| source|{titles}|MAPE, one anchor |",
        "|---" * 14 + "|",
    ]
    for part in ("sources", "slices"):
        for name, s in none[part].items():
            cells = [_cell(s[c], 2 if c == "spearman" else 1) for c in columns]
            lines.append(f"| {name} | " + " | ".join([*cells, _cell(one[part][name]["mape_pct"])]) + " |")
    total = [_cell(none["overall"][c], 2 if c == "spearman" else 1) for c in columns]
    lines.append("| **overall** | " + " | ".join([*total, _cell(one["overall"]["mape_pct"])]) + " |")
    lines += [
        "",
        "One sweep holds half of all rows. Mean over sources of their MAPE, without and with an anchor:",
        "",
    ]
    both = [(n, none["slices"][n], one["slices"][n]) for n in none["slices"]] + [
        ("all", none["overall"], one["overall"])
    ]
    lines += [f"- {n}: {_cell(a[_MEANS])}, {_cell(b[_MEANS])}" for n, a, b in both]
    lines += [
        "",
        "![predicted against measured](predicted.svg)",
        "",
        "![error by source](errors.svg)",
        "",
        "Refused rows:",
        "",
    ]
    for name, s in none["sources"].items():
        lines += [f"- {name}: {n} x {why}" for why, n in s["refused_reasons"].items()]
    return "\n".join(lines) + "\n"


def write(runs: Sequence[Run], fitted: Fitted, where: Path = HERE) -> dict[str, Any]:
    """All files but the constants; returns what results.json holds."""
    plain, anchored = predict(runs, "none", fitted), predict(runs, "one", fitted)
    none, one = report(plain, "none", ()), report(anchored, "one", ())
    (where / "predicted.svg").write_text(scatter(plain), encoding="utf-8")
    (where / "errors.svg").write_text(bars(none, one), encoding="utf-8")
    (where / "report.md").write_text(markdown(none, one), encoding="utf-8")
    data = {"leave_one_source_out": True, "none": none, "one": one}
    (where / "results.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    return data


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("csv", type=Path)
    parser.add_argument("--refit", action="store_true", help="fit again rather than use leave_one_out.yaml")
    args = parser.parse_args(argv)
    runs = read(args.csv)
    path = HERE / "leave_one_out.yaml"
    if args.refit or not path.exists():
        save(path, leave_one_out(runs))
    write(runs, load(path))


if __name__ == "__main__":
    main()
