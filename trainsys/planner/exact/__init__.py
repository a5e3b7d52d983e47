"""What one rank of the native engine computes, sends and holds in a step, counted and not estimated.

The planner's estimates are arrays over thousands of layouts; these are integers for one, and equal what a dry run of
the real step counts (``trainsys dryrun``, tests/planner/test_exact.py).
"""

from trainsys.planner.exact.flops import step_flops
from trainsys.planner.exact.held import states
from trainsys.planner.exact.place import Place
from trainsys.planner.exact.traffic import step_traffic

__all__ = ["Place", "states", "step_flops", "step_traffic"]
