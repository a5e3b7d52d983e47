"""Pipeline schedules as plain data: what each rank does in which order, how long that takes, how it looks.

No torch here: the runtime (`trainsys.parallel.pipeline`), the planner and ``plan --show-schedule`` share it.
"""

from trainsys.schedules.actions import Action, Op, Schedule
from trainsys.schedules.build import NAMES, build, stages_per_rank
from trainsys.schedules.simulate import Timeline, Times, simulate

__all__ = [
    "NAMES",
    "Action",
    "Op",
    "Schedule",
    "Timeline",
    "Times",
    "build",
    "simulate",
    "stages_per_rank",
]
