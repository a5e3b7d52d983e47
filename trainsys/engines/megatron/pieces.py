"""Flat ranges of Megatron parameters as boxes of ours.

The distributed optimizer cuts each parameter's memory at arbitrary elements. A range of a matrix is at most three
boxes: the end of a row, whole rows, the beginning of a row; all are views, so what fills them fills Megatron's memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from torch import Tensor

from trainsys.engines.base import LocalTensor
from trainsys.engines.megatron.names import Rows
from trainsys.models.flat import places_of_range


def boxes(data: Tensor, start: int, rows: Sequence[Rows], columns: int) -> Iterator[LocalTensor]:
    """``data [n]`` is the elements ``[start, start + n)`` of a parameter of ``columns`` (1: a vector) whose rows are
    ``rows``. Nothing is copied."""
    stop = start + data.numel()
    for r in rows:
        first, last = max(start, r.first * columns), min(stop, (r.first + r.count) * columns)
        if first < last:
            at = first - start
            for place in places_of_range(r.place, first - r.first * columns, last - r.first * columns):
                end = at + math.prod(place.local_shape)
                yield LocalTensor(r.name, data[at:end].view(place.local_shape), place)
                at = end
