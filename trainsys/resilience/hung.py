"""Which rank a hang is because of, told to the launcher, which leaves out its node if that happens again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from trainsys.failure import Failure, agreed_file, claim


class State(Protocol):
    """What a rank left behind; ``doing``: the collective it is in, if it is in one."""

    doing: str


def blame(code: int, text: str, states: Mapping[int, State], world: int, hosts: Sequence[str]) -> None:
    """Leave ``text`` as the failure of the rank that is missing, with its node if that is all the missing ranks'.

    ``hosts``: each rank's node; empty: nobody blames nodes.
    """
    ranks, agreed = missing(states, world), agreed_file()
    if agreed is not None and ranks:
        nodes = {hosts[rank] for rank in ranks} if hosts else set()
        claim(agreed, Failure(ranks[0], code, text, nodes.pop() if len(nodes) == 1 else ""))


def missing(states: Mapping[int, State], world: int) -> list[int]:
    """Ranks that left no word; else those that are in no collective while others wait in one."""
    silent = [rank for rank in range(world) if rank not in states]
    idle = [rank for rank, state in sorted(states.items()) if not state.doing]
    return silent or (idle if len(idle) < len(states) else [])
