"""Flight-recorder dumps: who stopped, where, and who merely waits."""

from trainsys.profiler.hang.analyse import analyse_dumps
from trainsys.profiler.hang.report import HangReport

__all__ = ["HangReport", "analyse_dumps"]
