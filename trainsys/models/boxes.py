"""Arithmetic of boxes: ``((start, stop), ...)``, one pair for each dim of a full tensor. No torch here."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

Box = tuple[tuple[int, int], ...]


def volume(box: Box) -> int:
    """Elements in the box; 1 for the box of a scalar."""
    return math.prod(stop - start for start, stop in box)


def whole(shape: Sequence[int]) -> Box:
    return tuple((0, n) for n in shape)


def shape_of(box: Box) -> tuple[int, ...]:
    return tuple(stop - start for start, stop in box)


def intersect(a: Box, b: Box) -> Box | None:
    """The elements in both, or None where there are none."""
    out = []
    for (a0, a1), (b0, b1) in zip(a, b, strict=True):
        start, stop = max(a0, b0), min(a1, b1)
        if start >= stop:
            return None
        out.append((start, stop))
    return tuple(out)


def within(box: Box, outer: Box) -> tuple[slice, ...]:
    """Slices that cut ``box`` out of an array that holds ``outer``."""
    return tuple(
        slice(start - origin, stop - origin) for (start, stop), (origin, _) in zip(box, outer, strict=True)
    )


def tile(shape: Sequence[int], boxes: Iterable[Box]) -> bool:
    """Whether ``boxes`` cover a tensor of ``shape`` with no gap and no overlap."""
    held = list(boxes)
    if sum(map(volume, held)) != math.prod(shape):
        return False
    # With the volumes right, it is enough that no two overlap. Sorted by the first dim, only a few are compared.
    held = sorted(box for box in held if volume(box))
    for i, box in enumerate(held):
        for other in held[i + 1 :]:
            if box and other[0][0] >= box[0][1]:
                break
            if intersect(box, other) is not None:
                return False
    return True
