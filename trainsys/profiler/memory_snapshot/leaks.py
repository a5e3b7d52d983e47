"""Leaks: one line of code whose allocations survive, in every stretch of a history in which all else comes and goes."""

from __future__ import annotations

from typing import Any

import numpy as np

from trainsys.profiler.memory_snapshot.report import Leak
from trainsys.profiler.memory_snapshot.stacks import Stacks

_STRETCHES = 8
_FEWEST = 2 * _STRETCHES
_FREED = 0.3
"""What must be freed of what is allocated for the history to be of steps, not of a model being built."""


def find_leaks(events: list[dict[str, Any]], stacks: Stacks, peak: int) -> list[Leak]:
    """The lines that kept allocating what nobody freed, most bytes first."""
    n = len(events)
    alive: dict[int, tuple[int, int, Any]] = {}
    allocated, freed = np.zeros(_STRETCHES), np.zeros(_STRETCHES)
    for i, event in enumerate(events):
        action, address, size = event.get("action"), int(event.get("addr", 0)), int(event.get("size", 0))
        if action == "alloc":
            alive[address] = (i, size, event.get("frames"))
            allocated[i * _STRETCHES // n] += size
        elif action == "free_completed":
            alive.pop(address, None)
            freed[i * _STRETCHES // n] += size
    if not n or bool((freed[1:] < _FREED * allocated[1:]).any()):
        return []
    by_site: dict[str, list[tuple[int, int]]] = {}
    for i, size, frames in alive.values():
        by_site.setdefault(stacks.name(frames)[0], []).append((i * _STRETCHES // n, size))
    out = []
    for where, kept in by_site.items():
        grown = np.bincount([s for s, _ in kept], [b for _, b in kept], _STRETCHES)
        # The last stretch also holds what is merely in use at the end.
        steady = grown[:-1]
        if len(kept) >= _FEWEST and (steady > 0).all() and steady.max() <= 3 * np.median(steady):
            total = int(grown.sum())
            if total >= 0.001 * peak:
                out.append(Leak(where, total, len(kept)))
    return sorted(out, key=lambda leak: -leak.bytes)
