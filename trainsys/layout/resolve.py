"""From the sizes a user wrote, one of them perhaps -1, to sizes whose product is the world."""

from __future__ import annotations

import math

from trainsys.config.run import ParallelConfig
from trainsys.errors import UserError
from trainsys.layout.names import PLACED, SIZED, PlacedAxis
from trainsys.layout.words import around, divisors, listed, ranks


def required_world(parallel: ParallelConfig) -> int | None:
    """As :meth:`trainsys.layout.Layout.required_world`."""
    sizes = _given(parallel)
    return None if -1 in sizes.values() else math.prod(sizes.values())


def resolved_sizes(parallel: ParallelConfig, world: int) -> dict[str, int]:
    """Every size, ``ep`` too, with the -1 filled in for ``world`` ranks; UserError where none fits."""
    assert world >= 1, world
    sizes = _given(parallel)
    fixed = {name: size for name, size in sizes.items() if size != -1}
    product = math.prod(fixed.values())
    text = " × ".join(f"{name}={size}" for name, size in fixed.items() if size > 1) or "every axis at 1"
    for name in sizes.keys() - fixed.keys():
        if world % product:
            raise UserError(
                f"parallel: {text} needs a multiple of {product} ranks for {name}=-1 to take the rest, "
                f"but the world has {world}; start {around(world, product)} ranks{_shrink(fixed, world)}"
            )
        sizes[name] = world // product
    if math.prod(sizes.values()) != world:
        divides = world % (product // sizes["dp_shard"]) == 0
        free = ", or set parallel.dp_shard=-1 for the rest" if divides else ""
        raise UserError(
            f"parallel: {text} is {ranks(product)}, but the world has {world}; start {ranks(product)}{free}"
        )
    resolved: dict[str, int] = dict(sizes.items())
    resolved["ep"] = sizes["dp_shard"] * sizes["cp"] if parallel.ep == -1 else parallel.ep
    return resolved


def _given(parallel: ParallelConfig) -> dict[PlacedAxis, int]:
    """The sizes as written, by placed axis; UserError for those that no world can serve."""
    for name in SIZED:
        size = getattr(parallel, name)
        if size == 0 or size < -1:
            raise UserError(f"parallel.{name}={size}: a size is 1 or more, or -1 for the ranks that are left")
    rest = [name for name in SIZED if getattr(parallel, name) == -1]
    if len(rest) > 1:
        raise UserError(
            f"{' and '.join(f'parallel.{name}' for name in rest)} are -1: only one axis can take the ranks "
            "that are left; give the others a size"
        )
    return {name: getattr(parallel, name) for name in PLACED}


def _shrink(fixed: dict[PlacedAxis, int], world: int) -> str:
    """Other sizes of a fixed axis with which ``world`` would do."""
    product = math.prod(fixed.values())
    for name, size in sorted(fixed.items(), key=lambda item: -item[1]):
        others = product // size
        if size > 1 and world % others == 0:
            return f", or set parallel.{name}={listed(divisors(world // others))}"
    return ""
