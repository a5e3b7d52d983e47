"""The leaderboard as one HTML file: no network, light and dark, with the points as parallel coordinates."""

from __future__ import annotations

import html
from collections.abc import Sequence
from importlib import resources
from typing import Any

_W, _H, _PAD = 1100, 300, 40


def page(name: str, board: Sequence[dict[str, Any]]) -> str:
    """The whole file as text."""
    look = (resources.files("trainsys.profiler.trace") / "assets" / "page.css").read_text(encoding="utf-8")
    dark = look[look.index("{", look.index('data-theme="dark"')) + 1 :].split("}", 1)[0]
    done = [r for r in board if r["status"] == "done"]
    best = (
        f"best: {html.escape(done[0]['candidate'])}, {done[0]['step_time_s']:.4g} s per step"
        if done
        else "none finished"
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f"<title>{html.escape(name)} · trainsys sweep</title>\n<style>\n{look}"
        f"@media (prefers-color-scheme: dark) {{ :root {{{dark}}} }}\n</style>\n</head>\n<body><main>\n"
        f'<header><div><h1>Sweep {html.escape(name)}</h1><p class="sub">{len(done)} of {len(board)} finished; {best}</p>'
        f"</div></header>\n<section><h2>Leaderboard</h2>{_table(board)}</section>\n"
        f"<section><h2>What the settings do</h2>{_parallel(done)}</section>\n</main></body>\n</html>\n"
    )


def _table(board: Sequence[dict[str, Any]]) -> str:
    head = ("candidate", "status", "step s", "predicted s", "tokens/s", "MFU", "GiB", "why")
    cells = []
    for r in board:
        values = (
            r["candidate"], r["status"], _n(r["step_time_s"], ".4g"), _n(r["predicted_s"], ".4g"),
            _n(r["tokens_per_s"], ",.0f"), _n(r["mfu"] and 100 * r["mfu"], ".1f"),
            _n(r["memory_peak_bytes"] and r["memory_peak_bytes"] / 2**30, ".2f"), r["reason"][:90],
        )  # fmt: skip
        cells.append("<tr>" + "".join(f"<td>{html.escape(str(v))}</td>" for v in values) + "</tr>")
    titles = "".join(f"<th>{t}</th>" for t in head)
    return f'<div class="scroll"><table><thead><tr>{titles}</tr></thead><tbody>{"".join(cells)}</tbody></table></div>'


def _n(value: float | None, shape: str) -> str:
    return "–" if value is None else format(value, shape)


def _parallel(done: Sequence[dict[str, Any]]) -> str:
    """One line a finished candidate through an axis a setting, and step time last; the fastest stands out."""
    keys = [
        k
        for k in dict.fromkeys(k for r in done for k in r["point"])
        if len({str(r["point"].get(k)) for r in done}) > 1
    ]
    if not done or not keys:
        return '<p class="sub">Nothing to compare yet.</p>'
    axes = [*keys, "step s"]
    levels = {k: sorted({str(r["point"].get(k, "–")) for r in done}, key=lambda v: (len(v), v)) for k in keys}
    times = [r["step_time_s"] for r in done]
    low, high = min(times), max(times)
    at = {a: _PAD + i * (_W - 2 * _PAD) / (len(axes) - 1) for i, a in enumerate(axes)}

    def y(r: dict[str, Any], axis: str) -> float:
        if axis == "step s":
            share = (r["step_time_s"] - low) / (high - low) if high > low else 0.5
        else:
            n = len(levels[axis])
            share = levels[axis].index(str(r["point"].get(axis, "–"))) / (n - 1)
        return _H - 30 - share * (_H - 70)

    parts = [f'<svg viewBox="0 0 {_W} {_H}">']
    for a in axes:
        parts.append(f'<path d="M{at[a]:.0f} 40V{_H - 30}" stroke="var(--line)"/>')
        parts.append(
            f'<text x="{at[a]:.0f}" y="24" text-anchor="middle">{html.escape(a.rpartition(".")[2])}</text>'
        )
        for i, v in enumerate(levels.get(a, [f"{low:.3g}", f"{high:.3g}"])):
            n = len(levels.get(a, "12"))
            parts.append(
                f'<text x="{at[a] + 6:.0f}" y="{_H - 26 - i / max(n - 1, 1) * (_H - 70):.0f}">{html.escape(v)}</text>'
            )
    for n, r in reversed(list(enumerate(done))):
        line = "L".join(f"{at[a]:.0f} {y(r, a):.0f}" for a in axes)
        look = (
            'stroke="var(--good)" stroke-width="3"'
            if n == 0
            else 'stroke="var(--matmul)" stroke-opacity=".45"'
        )
        parts.append(
            f'<path d="M{line}" fill="none" {look}><title>{html.escape(r["candidate"])}</title></path>'
        )
    return "".join([*parts, "</svg>"])
