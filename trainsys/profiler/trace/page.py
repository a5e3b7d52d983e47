"""The report as one HTML file: no network, no dependencies, light and dark, under a megabyte."""

from __future__ import annotations

import html
from importlib import resources
from typing import Any

import msgspec

from trainsys.profiler.trace.diff import RunDiff
from trainsys.profiler.trace.report import Report

MAX_BYTES = 1_000_000
_KERNELS, _STEPS = 120, 60


def page(report: Report, diff: RunDiff | None = None) -> str:
    """The whole file as text. What would take it past ``MAX_BYTES`` is left out, from the back, and said so."""
    content: dict[str, Any] = msgspec.to_builtins(report)
    content["diff"] = msgspec.to_builtins(diff) if diff is not None else None
    first = True
    for rank in content["ranks"]:
        # One rank's kernels are shown; the others' are in --json.
        rank["kernels"] = rank["kernels"][:_KERNELS] if first else []
        rank["products"] = rank["products"] if first else []
        first = first and not rank["kernels"]
        if rank["breakdown"] is not None:
            rank["breakdown"]["steps"] = rank["breakdown"]["steps"][:_STEPS]
    assets = resources.files("trainsys.profiler.trace") / "assets"
    style, script = ((assets / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    for shrink in (_nothing, _fewer_steps, _no_heat_map, _fewer_ranks):
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


def _nothing(content: dict[str, Any]) -> None:
    pass


def _left_out(content: dict[str, Any], what: str) -> None:
    content["unread"].append(
        {"path": "", "why": f"left out of this page for its size, and in --json: {what}"}
    )


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
