"""The names of the axes."""

from __future__ import annotations

from typing import Literal, get_args

PlacedAxis = Literal["pp", "dp_replicate", "dp_shard", "cp", "tp"]
Axis = Literal[
    "pp", "dp_replicate", "dp_shard", "cp", "tp", "ep", "expert_fsdp", "dp", "fsdp", "loss", "world"
]

PLACED: tuple[PlacedAxis, ...] = get_args(PlacedAxis)
"""The axes whose sizes multiply to the world, outermost first."""
AXES: tuple[Axis, ...] = get_args(Axis)
"""Every axis that has groups."""
SIZED = (*PLACED, "ep")
"""The axes a user gives sizes for."""
