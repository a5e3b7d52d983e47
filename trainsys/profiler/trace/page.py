"""The report as one HTML file: no network, no dependencies, light and dark, under a megabyte."""

from __future__ import annotations

import html
from importlib import resources
from typing import Any

import msgspec

from trainsys.profiler.trace.diff import RunDiff
from trainsys.profiler.trace.kernel_names import short_names
from trainsys.profiler.trace.report import Report
from trainsys.profiler.trace.text import health

MAX_BYTES = 1_000_000
_KERNELS, _STEPS = 120, 60
_NAME = 74
"""Characters of a kernel's name; the whole name is under the pointer."""


def page(report: Report, diff: RunDiff | None = None) -> str:
    """The whole file as text. What would take it past ``MAX_BYTES`` is left out, from the back, and said so."""
    content: dict[str, Any] = msgspec.to_builtins(report)
    content["diff"] = msgspec.to_builtins(diff) if diff is not None else None
    content["health"] = health(report)
    if content["diff"] is not None:
        _name(content["diff"]["kernels"])
    first = True
    for rank in content["ranks"]:
        # One rank's kernels are shown; the others' are in --json.
        rank["kernels"] = rank["kernels"][:_KERNELS] if first else []
        rank["products"] = rank["products"] if first else []
        first = first and not rank["kernels"]
        _name(rank["kernels"])
        if rank["breakdown"] is not None:
            rank["breakdown"]["steps"] = rank["breakdown"]["steps"][:_STEPS]
    assets = resources.files("trainsys.profiler.trace") / "assets"
    style, own = ((assets / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    # The page of a run draws its timeline by the same script.
    script = (resources.files("trainsys.profiler") / "assets/timeline.js").read_text(encoding="utf-8") + own
    for shrink in (_nothing, _fewer_lanes, _fewer_steps, _no_heat_map, _fewer_ranks):
        shrink(content)
        text = _assemble(content, style, script)
        if len(text.encode()) <= MAX_BYTES:
            break
    return text


def _assemble(content: dict[str, Any], style: str, script: str) -> str:
    # "</" would end the script element from inside a string, and "<!--" would open a comment in it.
    data = msgspec.json.encode(content).decode().replace("<", "\\u003c")
    title = html.escape(content["verdicts"][0]["title"] if content["verdicts"] else "trainsys trace")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main></main>\n"
        f'<script id="report" type="application/json">{data}</script>\n<script>\n{script}</script>\n</body>\n</html>\n'
    )


def _name(kernels: list[dict[str, Any]]) -> None:
    for kernel, shown in zip(kernels, short_names([k["name"] for k in kernels], _NAME), strict=True):
        kernel["shown"] = shown


def _nothing(content: dict[str, Any]) -> None:
    pass


def _left_out(content: dict[str, Any], what: str) -> None:
    content["unread"].append(
        {"path": "", "why": f"left out of this page for its size, and in --json: {what}"}
    )


def _fewer_lanes(content: dict[str, Any]) -> None:
    line = content["timeline"]
    if line is not None and len(line["lanes"]) > 2:
        line["lanes"] = line["lanes"][:2]
        _left_out(content, "the timeline of ranks but the slowest and a typical one")


def _fewer_steps(content: dict[str, Any]) -> None:
    for rank in content["ranks"][1:]:
        if rank["breakdown"] is not None:
            rank["breakdown"]["steps"] = []
    _left_out(content, "the steps of all ranks but the first")


def _no_heat_map(content: dict[str, Any]) -> None:
    if content["across"] is not None:
        waits = content["across"]["wait_map"]
        content["across"]["wait_map"] = {r: waits[r] for r in list(waits)[:128]}
    _left_out(content, "waiting of ranks past the first 128")


def _fewer_ranks(content: dict[str, Any]) -> None:
    content["ranks"] = content["ranks"][:512]
    if content["across"] is not None:
        content["across"]["ranks"] = content["across"]["ranks"][:512]
        content["across"]["bandwidth"] = content["across"]["bandwidth"][:200]
    _left_out(content, "ranks past the first 512")
