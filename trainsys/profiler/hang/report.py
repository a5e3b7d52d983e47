"""What a set of flight-recorder dumps says."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Root:
    """A rank that others wait for and that waits for no one itself.

    ``kind``: ``never_arrived`` (its host did not enqueue what its peers wait in), ``device_stalled`` (it
    enqueued, its peers finished, it did not), ``no_dump`` (others wait for it and it left no dump).
    """

    rank: int
    kind: str
    evidence: str
    outstanding: int
    """Operations enqueued and not finished: a stalled device's host runs ahead."""
    where: str
    """The newest user frame recorded on it, empty if the dump has no stacks."""


@dataclass(frozen=True, slots=True)
class Waiter:
    """A rank that merely waits: the operation at the head of its queue, and whom it waits for."""

    rank: int
    operation: str
    on: list[int]


@dataclass(frozen=True, slots=True)
class Mismatch:
    """One position of a group's sequence at which its members do different things.

    ``what`` differs: ``operation``, ``dtype`` or ``size``. ``variants``: what the ranks issued, with their ranks.
    ``where``: the line of code that issued each, where it was recorded.
    """

    group: str
    sequence: int
    what: str
    variants: dict[str, list[int]]
    where: dict[str, str]


@dataclass(slots=True)
class HangReport:
    ranks: list[int] = field(default_factory=list)
    missing: list[int] = field(default_factory=list)
    """Members of known groups that left no dump."""
    roots: list[Root] = field(default_factory=list)
    waiting: list[Waiter] = field(default_factory=list)
    mismatches: list[Mismatch] = field(default_factory=list)
    together: list[str] = field(default_factory=list)
    """Operations that all members entered and none finished: the link or the library, not one rank."""
    cycles: list[list[int]] = field(default_factory=list)
    """Ranks that wait for each other in a ring."""
    verdict: str = ""
    said: dict[str, int] = field(default_factory=dict)
