"""The explanation of a run as one HTML file: no network, no dependencies, light and dark, under a megabyte."""

from __future__ import annotations

import html
from importlib import resources
from typing import Any

import msgspec

from trainsys.profiler.explain import Explanation

MAX_BYTES = 1_000_000
_RANKS = 512


def page(explanation: Explanation) -> str:
    """The whole file as text. What would take it past ``MAX_BYTES`` is left out, and said so."""
    content: dict[str, Any] = msgspec.to_builtins(explanation)
    for most in (_RANKS, 64, 8):
        _first_ranks(content, most)
        text = _assemble(content)
        if len(text.encode()) <= MAX_BYTES:
            break
    return text


def _first_ranks(content: dict[str, Any], most: int) -> None:
    count = len(content["ranks"])
    if count > most:
        content["ranks"] = content["ranks"][:most]
        content["phases"] = {name: values[:most] for name, values in content["phases"].items()}
        content["missing"].append(f"this page shows the phases of {most} of {count} ranks; --json has all")
        for line in content["timelines"]:
            line["lanes"] = line["lanes"][:most]


def _assemble(content: dict[str, Any]) -> str:
    # The look is that of the trace report; what only this page has is in its own style.
    look = resources.files("trainsys.profiler.trace") / "assets" / "page.css"
    own = resources.files("trainsys.profiler") / "assets"
    style = look.read_text(encoding="utf-8") + (own / "explain.css").read_text(encoding="utf-8")
    script = "".join((own / name).read_text(encoding="utf-8") for name in ("timeline.js", "explain.js"))
    # "</" would end the script element from inside a string, and "<!--" would open a comment in it.
    data = msgspec.json.encode(content).decode().replace("<", "\\u003c")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(content['name'])} · trainsys explain</title>\n<style>\n{style}</style>\n</head>\n"
        f'<body>\n<main></main>\n<script id="run" type="application/json">{data}</script>\n'
        f"<script>\n{script}</script>\n</body>\n</html>\n"
    )
