"""Diagnosis: from files alone, without torch (``capture`` excepted), so it works on a dead run and any framework.

- ``trace``: profiler traces: breakdown by rank and step, collectives across ranks, critical path, diff.
- ``hang``: flight-recorder dumps: who stopped, where, and who merely waits.
- ``memory_snapshot``: allocator snapshots: what holds the peak, fragmentation, would it have fitted.
- ``straggler``: the statistics of "who is slow", shared by traces and the live profiler.
"""
