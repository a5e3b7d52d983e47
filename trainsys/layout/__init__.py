"""Where each rank stands, and what can stand there: sizes of the axes, their groups, and what is refused.

`axes` is the arithmetic, `resolve` finds sizes for a world, `refused` is the one table of what is not
supported, `advice` says what will run but hardly as meant.
"""

from trainsys.layout.axes import Layout
from trainsys.layout.names import AXES, PLACED, SIZED, Axis, PlacedAxis

__all__ = ["AXES", "PLACED", "SIZED", "Axis", "Layout", "PlacedAxis"]
