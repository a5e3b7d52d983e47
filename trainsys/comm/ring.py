"""An all-gather and a reduce-scatter in as many steps as there are members, with room for work in each.

Both go round the ring of a group and send what the collective would: (n - 1) parts a member.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

from trainsys.comm.p2p import Link


def gathered(part: Tensor, link: Link) -> Iterator[tuple[int, Tensor]]:
    """(member, its part), the own one first. While the caller works on one, the next is on its way."""
    g = link.group
    part = part.contiguous()
    for hop in range(g.size):
        coming = None
        if hop < g.size - 1:
            coming = link.swap("send_part", [part], to=(g.index + 1) % g.size, source=(g.index - 1) % g.size)
        yield (g.index - hop) % g.size, part
        if coming is not None:
            (part,) = coming.wait()


def summed(make: Callable[[int], Tensor], link: Link) -> Tensor:
    """The sum over all members of ``make(i)``, i this member's index. ``make`` gives a fresh contiguous tensor, of one
    shape everywhere; while it works, the sum it is added to is on its way."""
    g = link.group
    coming = None
    for hop in range(g.size):
        # The sum of member i's part starts at i + 1 and goes round, home.
        total = make((g.index - 1 - hop) % g.size)
        if coming is not None:
            total += coming.wait()[0]
        if hop < g.size - 1:
            coming = link.swap("send_sum", [total], to=(g.index + 1) % g.size, source=(g.index - 1) % g.size)
    return total
