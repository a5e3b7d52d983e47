"""Where a report is printed: a terminal, or a file of so many columns. Plain ASCII where it is no UTF-8 terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.text import Text

from trainsys.telemetry import text as say
from trainsys.terminal_text import LEAST, clean, columns, tell_apart, wrap

BAR = 26
_EIGHTHS = " ▏▎▍▌▋▊▉"
_LEAST_BAR, _LEAST_NOTE = 4, 20


@dataclass(frozen=True)
class Row:
    """A line of a table with bars. ``share`` (0..1) is the bar's length, None: no bar. ``cells`` behind the label, by
    column."""

    label: str
    cells: Sequence[str]
    share: float | None
    colour: str = ""
    bold: bool = False


class Paper:
    """Paragraphs are broken where the width is known: on a terminal, or as ``COLUMNS`` says."""

    def __init__(self, console: Console | None, most: int) -> None:
        """``most`` columns are used. None: standard output."""
        known = columns()
        if console is None:
            console = Console(highlight=False)
            if not console.is_terminal:
                console = Console(highlight=False, width=known or most)
        self.console = console
        self.fancy = console.is_terminal and console.encoding.startswith("utf")
        self.width = min(most, console.width)
        self._broken = self.width if console.is_terminal or known else None

    def text(self, text: str) -> str:
        """What may be shown of it here."""
        text = clean(text)
        return text if self.fancy else say.ascii_only(text)

    def line(self, text: str, style: str = "", indent: int = 2, hang: int | None = None) -> None:
        """A paragraph, ``indent`` columns in; its further lines ``hang`` columns in (``indent`` where left out)."""
        pad = " " * (indent if hang is None else hang)
        for line in wrap(self.text(text), self._broken, " " * indent, pad):
            self._put(Text(line, style=style))

    def head(self, title: str, note: str = "") -> None:
        """A heading; its note beside it, or below where it does not fit."""
        self.blank()
        shown = Text("  " + self.text(title), style="bold")
        note = self.text(note)
        if note and self._broken is not None and len(shown) + 3 + len(note) > self._broken:
            self._put(shown)
            self.line(note, "dim")
            return
        if note:
            shown.append("   " + note, style="not bold dim")
        self._put(shown)

    def title(self, name: str) -> None:
        """A name, and a rule behind it."""
        self.blank()
        shown = Text(f" {self.text(name)} ", style="bold cyan")
        rule = ("━" if self.fancy else "=") * (self.width - len(shown))
        self._put(shown.append(rule, style="not bold cyan"))

    def blank(self) -> None:
        self.console.print()

    def facts(self, rows: Sequence[tuple[str, str, str]]) -> None:
        """What it is, its value, and a note that is broken within its column, or below where that is too narrow."""
        rows = [(self.text(a), self.text(b), self.text(c)) for a, b, c in rows]
        name, value = (max(len(row[i]) for row in rows) for i in (0, 1))
        place = 6 + name + value
        for what, number, note in rows:
            out = Text.assemble("  ", (what.ljust(name), "dim"), "  ", (number.ljust(value), "bold"))
            fits = self._broken is None or place + _LEAST_NOTE <= self._broken
            first, *more = wrap(note, self._broken, " " * (place if fits else 4)) if note else [""]
            if fits:
                out.append(first[len(out) :], style="dim")
            else:
                more = [first, *more] if note else []
            out.rstrip()
            self._put(out)
            for line in more:
                self._put(Text(line, style="dim"))

    def bars(self, head: Sequence[str], rows: Sequence[Row], after: int) -> None:
        """A table: label, numbers, after the first ``after`` of them a bar, then the rest, to the left.

        Numbers are never cut: the bar gets shorter, then the label.
        """
        rows = [
            Row(self.text(r.label), [self.text(c) for c in r.cells], r.share, r.colour, r.bold) for r in rows
        ]
        head = [self.text(h) for h in head]
        numbers = [max(len(head[i + 1]), *(len(r.cells[i]) for r in rows)) for i in range(len(head) - 1)]
        label = max(len(head[0]), *(len(r.label) for r in rows))
        room = self.width - 2 - sum(n + 2 for n in numbers)
        bar = max(0, min(BAR, room - label - 2))
        bar = bar if bar >= _LEAST_BAR else 0
        label = min(label, max(LEAST, room - (bar + 2 if bar else 0)))
        shown = tell_apart([r.label for r in rows], label)
        empty = Row(head[0], head[1:], None)
        for row, name in zip([empty, *rows], [head[0], *shown], strict=True):
            style = "dim" if row is empty else "bold" if row.bold else ""
            out = Text("  " + name.ljust(label), style=style)
            for i, (cell, n) in enumerate(zip(row.cells, numbers, strict=True)):
                out.append("  " + (cell.rjust(n) if i < after else cell))
                if i == after - 1 and bar:
                    out.append("  ")
                    out.append(self._bar(row.share or 0.0, bar).ljust(bar), style=row.colour)
            out.rstrip()
            self._put(out)

    def _bar(self, share: float, width: int) -> str:
        cells = max(0.0, min(1.0, share)) * width
        if not self.fancy:
            return "#" * round(cells)
        return "█" * int(cells) + _EIGHTHS[int((cells - int(cells)) * 8)].strip()

    def _put(self, what: Any) -> None:
        # What is too long even so is left to the terminal: rich would cut it.
        self.console.print(what, soft_wrap=True)
