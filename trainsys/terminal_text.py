"""Text that fits its width: numbers whole, labels cut where they are alike, nothing that acts on a terminal."""

from __future__ import annotations

import os
import re
import sys
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

PIPED = 120
"""Columns of a table whose output goes to a file or a pipe, where ``COLUMNS`` says nothing else."""
LEAST = 16
"""A label is not cut below this: a narrower terminal wraps the line instead."""
SHOWN = 0.0005
"""A share below this would read 0.0%."""
GAP = ".."
SEEN = 10
"""So many characters from where two names differ are to be seen."""
_ESCAPE = re.compile(
    r"\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)?"  # a title or a link: up to the bell or the terminator
    r"|\x1b[\[(][0-9;?<=>]*[ -/]*[@-~]|\x1b."
    # Control characters, and those that reverse the direction of what follows.
    r"|[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]",
    re.S,
)


def clean(text: str) -> str:
    """Without escapes and control characters, which would act on the reader's terminal; each is a blank."""
    return text if text.isprintable() else _ESCAPE.sub(" ", text).strip()


def too_small(parts: Sequence[float], whole: float) -> list[int]:
    """Which of ``parts``, by place, would read 0.0% of ``whole`` and are one row together; none where it is only one."""
    small = [i for i, part in enumerate(parts) if part < SHOWN * whole]
    return small if len(small) > 1 else []


def columns() -> int | None:
    """What ``COLUMNS`` says, else the terminal's width; None: the output is no terminal, and nobody named a width."""
    told = os.environ.get("COLUMNS", "")
    if told.isdecimal() and int(told) > 0:
        return int(told)
    try:
        return os.get_terminal_size(sys.stdout.fileno()).columns or None
    except (OSError, ValueError, AttributeError):
        return None


def wrap(text: str, width: int | None, indent: str = "", hang: str | None = None) -> list[str]:
    """``text`` behind ``indent``, further lines behind ``hang`` (``indent`` where left out). Words stay whole; None: one
    line."""
    if width is None:
        return [indent + text]
    return textwrap.wrap(
        text, max(width, len(indent) + LEAST), initial_indent=indent, subsequent_indent=indent if hang is None else hang,
        break_long_words=False, break_on_hyphens=False,
    ) or [indent.rstrip()]  # fmt: skip


def tell_apart(names: Sequence[str], width: int) -> list[str]:
    """Each in at most ``width`` characters. Those that begin alike keep their beginning and go on where they differ."""
    width = max(width, 2 * len(GAP) + 1)
    unlike = sorted({n for n in names if len(n) > width})
    shown = {name: name[: width - len(GAP)] + GAP for name in unlike}
    for i, name in enumerate(unlike):
        near = unlike[max(0, i - 1) : i] + unlike[i + 1 : i + 2]
        at = max((_alike(name, other) for other in near), default=0)
        if at + SEEN > width - len(GAP) and width >= LEAST:
            shown[name] = _around(name, at, width)
    taken = {n for n in names if len(n) <= width}
    for name in unlike:
        # The same pieces of different names: a number is all that is left.
        again, base = 1, shown[name]
        while shown[name] in taken:
            again += 1
            mark = f"{GAP}#{again}"
            shown[name] = base[: width - len(mark)] + mark
        taken.add(shown[name])
    return [shown.get(name, name) for name in names]


def _alike(a: str, b: str) -> int:
    """Characters until they differ."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _around(name: str, at: int, width: int) -> str:
    """The beginning of ``name``, and what stands about its character ``at``."""
    head = 2 * width // 5
    room = width - head - len(GAP)
    begin = at
    while begin > max(head, at - room // 2) and (name[begin - 1].isalnum() or name[begin - 1] in "_:"):
        begin -= 1
    begin = min(begin, max(len(name) - room, head))
    tail = name[begin : begin + room]
    if begin + room < len(name):
        tail = tail[: -len(GAP)] + GAP if begin + room - len(GAP) > at else tail
    return name[:head] + GAP + tail


@dataclass(frozen=True)
class Table:
    """Columns aligned, the first to the left, the others to the right.

    Where they do not fit, headings take several lines, then the columns in ``labels`` and ``tails`` are shortened, each
    as far as it goes before the next; those in ``tails``, such as paths, keep their ends. The others are numbers and
    never cut: a line that is too long even so is left to the terminal.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    labels: Sequence[int] = (0,)
    tails: Sequence[int] = ()

    def lines(self, width: int | None = None) -> list[str]:
        """In ``width`` characters; None: in ``PIPED``."""
        width = PIPED if width is None else width
        cells = [[clean(c) for c in row] for row in self.rows]
        widest = [max((len(row[i]) for row in cells), default=0) for i in range(len(self.head))]
        widths = [max(w, len(title)) for w, title in zip(widest, self.head, strict=True)]
        if _length(widths) > width:
            widths = [max(w, *map(len, title.split() or [""])) for w, title in zip(widest, self.head, strict=True)]
        cut = [*self.labels, *self.tails]
        for i in cut:
            widths[i] = min(widths[i], max(LEAST, widths[i] + width - _length(widths)))
        for i in cut:
            column = [row[i] for row in cells]
            short = [_end(c, widths[i]) for c in column] if i in self.tails else tell_apart(column, widths[i])
            for row, label in zip(cells, short, strict=True):
                row[i] = label
        titles = [
            textwrap.wrap(title, w, break_long_words=False) or [""]
            for title, w in zip(self.head, widths, strict=True)
        ]
        tall = max(map(len, titles))
        heads = [[([""] * (tall - len(t)) + t)[n] for t in titles] for n in range(tall)]
        return [_line(row, widths) for row in heads + cells]


def _end(text: str, width: int) -> str:
    return text if len(text) <= width else GAP + text[len(GAP) - width :]


_MARK = re.compile(r" *(?:\d+\. |-> |why: |try: )?")


def layout(parts: Iterable[str | Table], width: int | None) -> str:
    """Paragraphs and tables as text of ``width`` columns (None: paragraphs are one line each). A paragraph's further
    lines stand under its first word."""
    lines: list[str] = []
    for part in parts:
        if isinstance(part, Table):
            lines += part.lines(width)
            continue
        mark = _MARK.match(part)
        indent = mark.group() if mark else ""
        hang = " " * (len(indent) if indent.strip() else len(indent) + 2)
        lines += wrap(clean(part[len(indent) :]), width, indent, hang)
    return "\n".join(line.rstrip() for line in lines).rstrip() + "\n"


def _length(widths: Sequence[int]) -> int:
    return 2 + sum(widths) + 2 * (len(widths) - 1)


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    cells = [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
    return "  " + "  ".join(cells).rstrip()
