"""What a machine did, as a file in the layout of PyTorch's profiler, with what such files lack and lose."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from support.whatif.machine import Machine

_ARGS = {"ncclDevKernel": {"Collective name": "allreduce", "In msg nelems": 1 << 20, "Out msg nelems": 1 << 20,
                           "Group size": 8, "dtype": "BFloat16", "Process Group Name": "1",
                           "Process Group Description": "dp"}}  # fmt: skip


def write(machine: Machine, path: Path, *, lost: float = 0.0, operators: bool = True, seed: int = 0) -> None:
    """``lost``: share of activities whose launch is not in the file. ``operators``: host operators are."""
    rng = np.random.default_rng((seed, 77))
    activities = {e.correlation for e in machine.seen if e.category in ("kernel", "gpu_memcpy")}
    gone = {c for c in activities if rng.random() < lost}
    events = []
    for e in machine.seen:
        on_device = e.category in ("kernel", "gpu_memcpy")
        if (e.category == "cpu_op" and not operators) or (not on_device and e.correlation in gone):
            continue
        args: dict[str, object] = {"correlation": e.correlation} if e.correlation else {}
        if on_device:
            args |= {"device": 0, "stream": e.lane}
            args |= next((a for prefix, a in _ARGS.items() if e.name.startswith(prefix)), {})
        events.append({"ph": "X", "cat": e.category, "name": e.name, "pid": 0 if on_device else 4000, "tid": e.lane,
                       "ts": e.start / 1000, "dur": (e.end - e.start) / 1000, "args": args})  # fmt: skip
    head = {
        "schemaVersion": 1,
        "deviceProperties": [{"id": 0, "name": "NVIDIA H100 80GB HBM3"}],
        "distributedInfo": {"backend": "nccl", "rank": 0, "world_size": 8},
    }
    path.write_text(json.dumps({**head, "traceEvents": events}))
