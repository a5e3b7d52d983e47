"""Bytes that one rank holds from step to step."""

from __future__ import annotations

from trainsys.planner.exact.place import Place
from trainsys.planner.exact.traffic import owned


def states(place: Place) -> dict[str, int]:
    """``parameters``, ``gradients`` and ``optimizer`` (two moments), all fp32 and all of this rank's shards alone.

    Where a parameter does not divide, shards of weights and gradients are padded to equal size, moments are not.
    """
    held = [p for part in place.parts.values() for p in place.parameters(part)]
    padded, own = (4 * sum(owned(place, p, padded=b) for p in held) for b in (True, False))
    return {"parameters": padded, "gradients": padded, "optimizer": 2 * own}
