"""What a late rank or node is late in, and what to look at then."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from trainsys.profiler.steps import StepTable
from trainsys.profiler.waits import work_phases

COMPUTE = ("forward", "backward", "recompute", "optimizer")
DATA = ("data", "h2d")
ENOUGH = 256
"""Ranks that tell what a phase usually takes; of more, some are taken."""

PHASE_ADVICE = {
    "data": "its loader: workers, storage, a page cache that thrashes; raise data.prefetch; try it on another host",
    "compute": "its clocks, thermals, ECC errors and neighbours; trainsys preflight times matmul and memory on all",
    "optimizer": "what its optimizer step does that the others' does not: offload, a larger share of parameters",
    "other": "its host: another process on the cores, swapping, logging in the step",
}


def late_phase(table: StepTable, columns: npt.NDArray[np.int64]) -> tuple[str, dict[str, float]]:
    """Which phase the ``columns`` are late in, and each phase's slowdown over the other ranks' median."""
    peers = table.peers()
    others = np.setdiff1d(np.flatnonzero(np.isin(peers, np.unique(peers[columns]))), columns)
    others = others[:: max(1, others.size // ENOUGH)]
    excess: dict[str, float] = {}
    ratio: dict[str, float] = {}
    for name in work_phases(table):
        values = table.phases[name]
        mine = float(np.median(values[:, columns]))
        rest = float(np.median(values[:, others])) if others.size else mine
        excess[name] = max(0.0, mine - rest)
        ratio[name] = mine / rest - 1 if rest > 0 else 0.0
    total = sum(excess.values())
    if total <= 0:
        return "compute", ratio
    data, compute = (sum(excess.get(n, 0.0) for n in names) for names in (DATA, COMPUTE))
    if data > 0.5 * total:
        return "data", ratio
    single = max(excess, key=lambda n: excess[n])
    # One phase alone slow is code or input; all of compute slow alike is the hardware.
    if single in COMPUTE and excess[single] > 0.85 * total:
        others_of = [n for n in ("forward", "backward") if n != single and n in ratio]
        if all(ratio[n] < 0.25 * ratio[single] for n in others_of):
            return single, ratio
    return ("compute" if compute >= 0.5 * total else single), ratio
