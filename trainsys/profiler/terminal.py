"""The explanation of a run as text for a terminal or a file."""

from __future__ import annotations

from rich.console import Console

from trainsys.profiler.explain import Explanation
from trainsys.profiler.waterfall import STALL, Waterfall
from trainsys.telemetry import text as say
from trainsys.telemetry.events import COMM
from trainsys.telemetry.paper import Paper, Row
from trainsys.terminal_text import too_small

WIDTH = 110
_COLOURS = {
    "useful": "green", "compute": "green", "straggler": "red", "data": "yellow", "bubble": "bright_magenta",
    "launch": "yellow", "gc": "bright_blue", "unattributed": "bright_black", "padding": "bright_yellow",
    "recompute": "bright_cyan", "optimizer": "blue",
}  # fmt: skip


def _colour(term: str) -> str:
    # Stalls, stragglers and garbage collection are three things to act on: only one of them is red.
    if term.startswith(STALL):
        return "bright_white"
    return "magenta" if term.startswith(COMM) else _COLOURS.get(term, "white")


def print_explanation(e: Explanation, console: Console | None = None) -> None:
    """Waterfall, verdicts, advice, goodput and memory; plain ASCII where the output is no UTF-8 terminal."""
    page = _Page(Paper(console, WIDTH))
    for line in e.missing:
        page.line(f"! {line}", "yellow")
    if e.waterfall is not None:
        page.waterfall(e.waterfall)
    page.verdicts(e)
    page.what_if(e)
    page.advice(e)
    page.rest(e)


class _Page:
    def __init__(self, paper: Paper) -> None:
        self.line, self.head, self._bars = paper.line, paper.head, paper.bars

    def waterfall(self, fall: Waterfall) -> None:
        self.head(
            "Where the time goes",
            f"{1e3 * fall.wall_s:,.1f} ms of wall time per step, mean of {fall.steps:,} steps, {fall.clock} clock",
        )
        known = fall.mfu is not None
        whole = sum(max(0.0, t.seconds) for t in fall.terms)
        small = [fall.terms[i] for i in too_small([t.seconds for t in fall.terms], whole)]
        shown = [t for t in fall.terms if t not in small]
        # Those that would be 0.0% are nothing to read; their sum keeps the column adding up.
        rest = sum(t.seconds for t in small)
        shares = say.percents([max(0.0, s) for s in [*(t.seconds for t in shown), rest]])
        longest = max(t.seconds for t in fall.terms) or 1.0
        rows = []
        for term, share in zip(shown, shares, strict=False):
            cells = [f"{1e3 * term.seconds:,.2f}", share]
            if known:
                cells.append("" if term.mfu_without is None else f"{100 * term.mfu_without:.1f}%")
            label = term.label + (" ~" if term.estimated else "")
            rows.append(Row(label, cells, term.seconds / longest, _colour(term.name)))
        if small:
            cells = [f"{1e3 * rest:,.2f}", shares[-1]] + [""] * known
            rows.append(Row(f"{len(small)} others", cells, rest / longest))
        for name, seconds in (("step", fall.step_s), ("step and stalls", fall.wall_s)):
            cells = [f"{1e3 * seconds:,.2f}", f"{100 * seconds / (fall.wall_s or 1.0):.1f}%"]
            if fall.mfu is not None:
                # Stalls between steps cost goodput, not MFU.
                cells.append(f"mfu {100 * fall.mfu:.1f}%" if name == "step" else "")
            if name == "step" or fall.wall_s > fall.step_s:
                rows.append(Row(name, cells, None, bold=True))
        self._bars(["", "ms", "% of wall"] + ["mfu without it"] * known, rows, 3 if known else 2)
        if small:
            self.line("others: " + ", ".join(t.label for t in small), "dim", hang=4)
        if any(t.estimated for t in fall.terms):
            self.line("~ split by a formula or a capture, not timed in each step", "dim")
        for note in fall.notes:
            self.line(note, "dim", hang=4)

    def verdicts(self, e: Explanation) -> None:
        self.head("Stragglers")
        if not e.verdicts:
            ranks = len(e.ranks)
            self.line("no rank, node or link stands out" if ranks > 1 else "one rank: nobody to compare with")
        for v in e.verdicts:
            until = "" if v.until is None else f" to {v.until}"
            self.line(f"{1e3 * v.cost_s:,.1f} ms per step ({100 * v.share:.1f}%)  {v.title}", "bold red", hang=6)
            self.line(f"since step {v.since}{until}: {v.evidence}", "", 6, 8)
            self.line(f"-> {v.advice}", "green", 6, 9)
        for said in e.said_live:
            self.line(f"step {said.at_step}, while it trained: {said}", "" if said.confirmed else "dim", hang=6)

    def what_if(self, e: Explanation) -> None:
        if not e.what_if:
            return
        self.head("What if", "the step, replayed with one thing ideal")
        for w in e.what_if[:6]:
            self.line(f"{1e3 * w.step_s:,.1f} ms per step ({-100 * w.gain:+.1f}%)  {w.what}", hang=6)

    def advice(self, e: Explanation) -> None:
        if not e.advice and not e.fit:
            return
        self.head("What to change", "upper bounds: each takes its term away whole")
        for a in e.advice:
            mfu = "" if a.mfu is None else f", mfu {100 * a.mfu:.1f}%"
            self.line(f"up to {100 * a.gain:4.1f}%{mfu}  {a.what}", hang=12)
            self.line(f"({a.basis})", "dim", 12, 13)
        for fit in e.fit:
            self.line(f"to fit: {fit}", hang=10)

    def rest(self, e: Explanation) -> None:
        good = e.goodput
        lost = ", ".join(f"{k} {say.duration(s)}" for k, s in good.lost.items() if s >= 0.001 * good.wall_s)
        told = f"{100 * good.share:.1f}% of {say.duration(good.wall_s)}"
        self.head("Goodput", told + (f"; lost: {lost}" if lost else ""))
        if good.attempts > 1:
            again = f", {good.lost_steps} of which were trained again" if good.lost_steps else ""
            self.line(f"over {good.attempts} attempts and {good.steps + good.lost_steps} steps{again}")
        m = e.memory
        if m is None:
            return
        self.head("Memory", f"peak {say.size(m.peak)} on rank {m.rank}"
                  + (f" of {say.size(m.capacity)}" if m.capacity else "")
                  + (f", predicted {say.size(m.predicted_total)}" if m.predicted_total is not None else ""))  # fmt: skip
        self.line(", ".join(f"{name} {say.size(held)}" for name, held in m.parts if held), hang=4)
        for part in m.compared:
            if part.measured is not None and part.predicted is not None:
                self.line(f"{part.name}: predicted {say.size(part.predicted)}, measured {say.size(part.measured)}")
        if m.fragmentation > 0.02 * m.peak:
            self.line(f"{say.size(m.fragmentation)} more are reserved in pieces (fragmentation)")
        if m.would_have_fitted:
            self.line(m.would_have_fitted, "bold red")
        if m.leak_bytes_per_step:
            self.line(f"memory grows by {say.size(m.leak_bytes_per_step)} per step", "bold red")
        for note in m.notes:
            self.line(note, "dim")
