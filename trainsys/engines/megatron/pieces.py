"""Flat ranges of Megatron parameters as boxes of ours.

The distributed optimizer cuts each parameter's memory at arbitrary elements. A range of a matrix is at most three
boxes: the end of a row, whole rows, the beginning of a row; all are views, so what fills them fills Megatron's memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from trainsys.engines.base import LocalTensor
from trainsys.engines.megatron.names import Rows
from trainsys.models.shards import ShardSpec


def boxes(data: Tensor, start: int, rows: Sequence[Rows], columns: int) -> Iterator[LocalTensor]:
    """``data [n]`` is the elements ``[start, start + n)`` of a parameter of ``columns`` (1: a vector) whose rows are
    ``rows``. Nothing is copied."""
    stop = start + data.numel()
    for r in rows:
        first, last = max(start, r.first * columns), min(stop, (r.first + r.count) * columns)
        if first < last:
            offset = r.first * columns
            yield from _cut(data[first - start : last - start], first - offset, r, columns)


def _cut(data: Tensor, at: int, rows: Rows, columns: int) -> Iterator[LocalTensor]:
    """``data`` is the elements from ``at`` on of one piece of ours."""
    stop = at + data.numel()
    begin = at
    while at < stop:
        row, column = divmod(at, columns)
        if column or stop - at < columns:
            end = min(stop, (row + 1) * columns)
            place = _narrow(rows.place, row, row + 1, column, column + end - at, columns)
        else:
            end = stop // columns * columns
            place = _narrow(rows.place, row, end // columns, 0, columns, columns)
        yield LocalTensor(rows.name, data[at - begin : end - begin].view(place.local_shape), place)
        at = end


def _narrow(place: ShardSpec, row: int, end: int, column: int, last: int, columns: int) -> ShardSpec:
    if len(place.full_shape) == 1:
        assert columns == 1
        return place.narrow(0, row, end)
    dims = len(place.full_shape)
    return place.narrow(dims - 2, row, end).narrow(dims - 1, column, last)
