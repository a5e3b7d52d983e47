"""The way of rows from the rank that holds a token to the one that holds its expert, in one leg or in two.

Flat: one all-to-all over the whole group. Two levels: first to the member of the own node whose place in
its node is that of the expert's rank, then across nodes between ranks of one place (the two-level all-to-all of
HetuMoE, Nie et al. 2022, and Tutel, Hwang et al. 2023). Every rank then sends (nodes - 1) messages across
instead of (nodes - 1) * (ranks of a node), of the same bytes in all; rows arrive in the same order either way.

In the names here: ``e`` the experts of one rank, ``o`` nodes, ``i`` ranks of a node, ``c`` chunks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trainsys.comm.group import AxisGroup
from trainsys.ops.grouped import balanced, has_values
from trainsys.ops.permute import block_order, invert, reorder
from trainsys.parallel.expert.trip import Trip, exchange_counts


@dataclass(frozen=True)
class Turn:
    """A new order of rows, and the way back from it."""

    order: Tensor
    inverse: Tensor

    @classmethod
    def of(cls, sizes: Tensor, dims: tuple[int, ...], total: int) -> Turn:
        """Rows lie in blocks of ``sizes [a, b, ...]``, the last dim fastest; afterwards as ``sizes.permute(dims)``."""
        blocks = torch.arange(sizes.numel(), device=sizes.device).view(sizes.shape).permute(dims).flatten()
        order = block_order(sizes.flatten(), blocks, total)
        return cls(order, invert(order))

    def there(self, x: Tensor) -> Tensor:
        return reorder(x, self.order, self.inverse)

    def back(self, x: Tensor) -> Tensor:
        return reorder(x, self.inverse, self.order)


class Route:
    """Routing of one chunk of rows. A :class:`trainsys.models.moe.Part` of it.

    ``legs``: how rows are turned before each all-to-all (None: not), and the all-to-all. ``last``: from the
    order in which they arrive, by source, to expert by expert.
    """

    def __init__(self, legs: list[tuple[Turn | None, Trip]], last: Turn, counts: Tensor) -> None:
        self._legs = legs
        self._home = [trip.home() for _, trip in legs]
        self._last = last
        self.counts = counts

    def depart(self, x: Tensor) -> Tensor:
        """Start the first leg."""
        turn, trip = self._legs[0]
        return trip.start(x if turn is None else turn.there(x))

    def arrive(self, rows: Tensor) -> Tensor:
        x = self._legs[0][1].finish(rows)
        for turn, trip in self._legs[1:]:
            x = trip.finish(trip.start(x if turn is None else turn.there(x)))
        return self._last.there(x)

    def leave(self, rows: Tensor) -> Tensor:
        x = self._last.back(rows)
        for (turn, _), home in zip(self._legs[:0:-1], self._home[:0:-1], strict=True):
            x = home.finish(home.start(x))
            x = x if turn is None else turn.back(x)
        return self._home[0].start(x)

    def come_home(self, rows: Tensor) -> Tensor:
        """Wait for what ``leave`` started: rows as they departed."""
        turn = self._legs[0][0]
        x = self._home[0].finish(rows)
        return x if turn is None else turn.back(x)


class FlatRouter:
    """One all-to-all over ``group``."""

    def __init__(self, group: AxisGroup) -> None:
        self.group = group

    def routes(self, counts: Tensor, totals: list[int]) -> list[Route]:
        """``counts [c, E]``: rows for each expert of each chunk, ``totals[c]`` in all, as the host knows."""
        n = self.group.size
        outgoing = counts.view(len(counts), n, -1)
        incoming = exchange_counts(outgoing.transpose(0, 1), self.group).transpose(0, 1)
        sends, receives = _read([outgoing.sum(2), incoming.sum(2)], totals)
        return [
            Route(
                [(None, Trip(self.group, sends[c], receives[c]))],
                Turn.of(incoming[c], (1, 0), sum(receives[c])),
                incoming[c].sum(0),
            )
            for c in range(len(counts))
        ]


class TwoLevelRouter:
    """``node``: the ranks of this rank's node, ``across``: those of its place in every node."""

    def __init__(self, node: AxisGroup, across: AxisGroup) -> None:
        self.node, self.across = node, across

    def routes(self, counts: Tensor, totals: list[int]) -> list[Route]:
        """As :meth:`FlatRouter.routes`."""
        o, i, chunks = self.across.size, self.node.size, len(counts)
        outgoing = counts.view(chunks, o, i, -1)
        # [c, source's place, node of the expert, e], and then [c, source's node, source's place, e]
        between = exchange_counts(outgoing.permute(2, 0, 1, 3), self.node).transpose(0, 1)
        incoming = exchange_counts(between.permute(2, 0, 1, 3), self.across).transpose(0, 1)
        sizes = [outgoing.sum((1, 3)), between.sum((2, 3)), between.sum((1, 3)), incoming.sum((2, 3))]
        to_node, from_node, to_across, from_across = _read(sizes, totals)
        return [
            Route(
                [
                    (Turn.of(outgoing[c], (1, 0, 2), totals[c]), Trip(self.node, to_node[c], from_node[c])),
                    (
                        Turn.of(between[c], (1, 0, 2), sum(from_node[c])),
                        Trip(self.across, to_across[c], from_across[c]),
                    ),
                ],
                Turn.of(incoming[c], (2, 0, 1), sum(from_across[c])),
                incoming[c].sum((0, 1)),
            )
            for c in range(chunks)
        ]


def _read(tables: list[Tensor], totals: list[int]) -> list[list[list[int]]]:
    """Each ``[c, parts]`` as Python numbers, with one wait for the device. A dry run sees even shares."""
    if not has_values(tables[0]):
        return [[balanced(total, table.shape[1]) for total in totals] for table in tables]
    widths = [table.shape[1] for table in tables]
    rows = torch.cat(tables, dim=1).tolist()
    ends = [sum(widths[: k + 1]) for k in range(len(widths))]
    return [[row[end - width : end] for row in rows] for end, width in zip(ends, widths, strict=True)]
