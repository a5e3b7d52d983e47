"""Allocator snapshots (``torch.cuda.memory._dump_snapshot``): what holds the peak, and would it have fitted."""

from trainsys.profiler.memory_snapshot.analyse import analyse_snapshot
from trainsys.profiler.memory_snapshot.report import MemoryReport

__all__ = ["MemoryReport", "analyse_snapshot"]
