"""What context parallelism refuses: the table of `trainsys.context.refusals`, on the heads that tp leaves it."""

from __future__ import annotations

from trainsys.context import refusals as flavours
from trainsys.layout.refused.case import Case, Refusal


def _request(c: Case) -> flavours.Request:
    tp = c.layout.tp
    return flavours.Request(c.parallel.context, c.layout.cp, c.model.n_heads // tp, c.model.kv_heads // tp)


def _asked(c: Case) -> bool:
    """Where heads do not split over tp, that is what has to change first."""
    tp = c.layout.tp
    return c.layout.cp > 1 and c.model.n_heads % tp == 0 and c.model.kv_heads % tp == 0


def _entry(of: flavours.Refusal) -> Refusal:
    return Refusal(
        of.name,
        lambda c: _asked(c) and of.applies(_request(c)),
        lambda c: of.says(_request(c)),
        {f"parallel.{key}": value for key, value in of.example.items()},
    )


TABLE = tuple(_entry(of) for of in flavours.TABLE)
