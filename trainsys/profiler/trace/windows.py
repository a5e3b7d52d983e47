"""Whose each capture is: a file is one rank's window of time, and several captures of a rank are its windows.

A rank is what the file says, else what its name says, else a number by order; files without any number whose names
differ only by a time stamp are captures of one process. A rank's windows are numbered in order of time, and windows
of several ranks are one where they hold the same steps, or the same time.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trainsys.profiler.trace.report import Unread

if TYPE_CHECKING:
    from trainsys.profiler.trace.analyse import Analysed

_STAMP = re.compile(r"[._-]\d{8,}(?=\.|$)")


@dataclass(slots=True)
class Placed:
    """``captures``: by (rank, window), in order. ``unread``: files that are no further capture, and why."""

    captures: list[Analysed]
    unread: list[Unread]


def place(found: list[Analysed]) -> Placed:
    """Number ranks and windows, in the reports themselves."""
    _settle_ranks(found)
    out = Placed([], [])
    by_rank: dict[int, list[Analysed]] = {}
    for capture in sorted(found, key=lambda c: (c.report.rank, c.span)):
        mine = by_rank.setdefault(capture.report.rank, [])
        if mine and capture.span[0] < mine[-1].span[1]:
            out.unread.append(Unread(capture.report.path, _clash(mine[-1], capture)))
        else:
            mine.append(capture)
    _number_windows(by_rank)
    out.captures = sorted(
        (c for mine in by_rank.values() for c in mine), key=lambda c: (c.report.rank, c.report.window)
    )
    return out


def _clash(first: Analysed, second: Analysed) -> str:
    path, rank = second.report.path, second.report.rank
    if (first.span, first.report.events) == (second.span, second.report.events):
        return f"{path}: the same capture as {first.report.path}; counted once"
    return (
        f"{path}: it is of rank {rank} as {first.report.path} is, and of the same time: two jobs' files together? "
        "Give one job's"
    )


def _settle_ranks(found: list[Analysed]) -> None:
    world = max((c.report.world for c in found), default=0)
    stated = {c.report.rank for c in found if c.stated}
    named = [c for c in found if not c.stated and c.report.rank >= 0]
    doubtful = (
        any(world and c.report.rank >= world for c in named)
        or bool({c.report.rank for c in named} & stated)
        or _overlap(named)
    )
    numbered = [c for c in found if not c.stated and (c.report.rank < 0 or doubtful)]
    taken = stated | {c.report.rank for c in named if not doubtful}
    ranks: dict[str, int] = {}
    for c in numbered:
        if doubtful and c.report.rank >= 0:
            c.report.said["assumed: the file's name gives no rank of its own; numbered by order"] = 1
        worker = _STAMP.sub("", c.report.path)
        if worker not in ranks:
            ranks[worker] = next(r for r in range(len(taken) + 1) if r not in taken)
            taken.add(ranks[worker])
        c.report.rank = ranks[worker]


def _overlap(captures: list[Analysed]) -> bool:
    """Whether two different recordings would be of one rank at one time."""
    last: dict[int, Analysed] = {}
    for c in sorted(captures, key=lambda c: (c.report.rank, c.span)):
        before = last.get(c.report.rank)
        if before is not None and c.span[0] < before.span[1] and c.span != before.span:
            return True
        last[c.report.rank] = c
    return False


def _number_windows(by_rank: dict[int, list[Analysed]]) -> None:
    """Equal windows get equal numbers on all ranks."""
    everything = [c for mine in by_rank.values() for c in mine]
    if max((len(mine) for mine in by_rank.values()), default=0) < 2:
        return
    if all(c.steps for c in everything):
        bounds = [(min(c.steps), max(c.steps) + 1) for c in everything]
    elif len({len(mine) for mine in by_rank.values()}) == 1:
        for mine in by_rank.values():
            for i, c in enumerate(mine):
                c.report.window = i
        return
    else:
        bounds = [c.span for c in everything]
    order = sorted(range(len(everything)), key=lambda i: bounds[i])
    window, reach = -1, None
    for i in order:
        if reach is None or bounds[i][0] >= reach:
            window, reach = window + 1, bounds[i][1]
        reach = max(reach, bounds[i][1])
        everything[i].report.window = window
    for mine in by_rank.values():
        # Clocks that are far apart may put two of a rank's windows into one: then only their order is left.
        if len({c.report.window for c in mine}) < len(mine):
            for other in by_rank.values():
                for n, c in enumerate(other):
                    c.report.window = n
            return
