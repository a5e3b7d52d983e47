"""A range of a flattened tensor as boxes, for engines that shard parameters flat. No torch here.

ZeRO and Megatron's distributed optimizer lay parameters end to end and cut the whole at equal lengths, so a rank
holds elements ``[start, stop)`` of a parameter in row-major order. Of a matrix that is up to three boxes: the end of
a row, whole rows, the start of a row. Each is contiguous, so each can be a view into the flat memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from trainsys.models.boxes import Box, whole
from trainsys.models.shards import ShardSpec


def places_of_range(part: ShardSpec, start: int, stop: int) -> Iterator[ShardSpec]:
    """The boxes of the full parameter that tile elements ``[start, stop)`` of its ``part``, in row-major order."""
    for box in boxes_of_range(part.local_shape, start, stop):
        bounds = tuple((at + a, at + b) for (a, b), (at, _) in zip(box, part.bounds, strict=True))
        yield ShardSpec(part.full_shape, bounds)


def boxes_of_range(shape: Sequence[int], start: int, stop: int) -> Iterator[Box]:
    """The boxes that tile elements ``[start, stop)`` of a tensor of ``shape`` in row-major order, in that order.

    At most ``2 len(shape) - 1`` of them; none for an empty range.
    """
    assert 0 <= start <= stop <= math.prod(shape), f"[{start}, {stop}) of {tuple(shape)}"
    if start == stop:
        return
    if not shape:
        yield ()
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row  # the whole rows [first, last)
    if first > last:  # within one row
        yield from _in_row(shape, last, start, stop)
        return
    if start < first * row:
        yield from _in_row(shape, first - 1, start, first * row)
    if first < last:
        yield ((first, last), *whole(shape[1:]))
    if last * row < stop:
        yield from _in_row(shape, last, last * row, stop)


def _in_row(shape: Sequence[int], index: int, start: int, stop: int) -> Iterator[Box]:
    row = math.prod(shape[1:])
    for box in boxes_of_range(shape[1:], start - index * row, stop - index * row):
        yield ((index, index + 1), *box)
