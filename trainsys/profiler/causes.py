"""Why a rank is late, by what the kernel counted on its host (``telemetry.events.HostTime``).

Of the seconds per step by which a late rank exceeds its peers, each kind of time it spent without computing is what it
has more of than they have: throttled by its control group, kept from running by its own process's threads, runnable but
waiting for a CPU, or neither. A cause is named when it accounts for half of the excess, the more particular one first;
throttled time is counted as waiting by the kernel too.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from trainsys.profiler.late_phase import PHASE_ADVICE
from trainsys.profiler.steps import Floats, StepTable
from trainsys.telemetry.vectors import HOST

HALF = 0.5
MAJOR_S, MINOR_S = 50e-6, 0.5e-6
"""The least that a page read from a disk, and one just mapped, cost: an SSD's latency, and clearing 4 KiB."""
FAULTY = 50e3
"""Pages per second of CPU that a thread maps that does little else; one that allocates maps a tenth of it."""


@dataclass(frozen=True)
class Cause:
    """``name``: cpu_quota, cpu_contention, page_faults, host_lock, stopped, data, device (it ran all the time), or ""
    where the counters do not tell. ``words``: what the rank does; ``advice``: "" where it is that for its phase."""

    name: str = ""
    evidence: str = ""
    words: str = ""
    advice: str = ""

    @property
    def why(self) -> str:
        """What follows other evidence; "" where there is none."""
        return f"; {self.evidence}" if self.evidence else ""

    def look(self, phase: str) -> str:
        """What to do about a rank or node that is late in ``phase``."""
        return self.advice or f"look at {PHASE_ADVICE.get(phase, PHASE_ADVICE['compute'])}"


UNKNOWN = Cause()
WORDS = {
    "cpu_quota": "is throttled by its CPU quota",
    "cpu_contention": "shares its CPU",
    "page_faults": "spends its time on page faults",
    "host_lock": "waits for another thread of its process",
    "stopped": "stands still for part of each step",
}
ADVICE = {
    "cpu_quota": "raise the CPU limit of the rank's control group (Slurm --cpus-per-task, a pod's limits.cpu)",
    "cpu_contention": "find what else runs on the rank's cores (top, pidstat), give each rank cores of its own "
    "(--cpus-per-task, --cpu-bind=cores), and lower train.threads if ranks share them",
    "page_faults": "look for what maps and frees memory in this process, at swapping and at files that are read page by "
    "page (vmstat 1, perf trace -F all)",
    "host_lock": "find the thread that holds the interpreter or a lock (py-spy dump): loggers, loaders and monitors "
    "belong in a process of their own",
    "stopped": "see what its thread waits for (py-spy dump), or who stops it (kill -STOP, a debugger, a frozen control "
    "group)",
}


def per_step(table: StepTable, since: int, until: int) -> dict[str, Floats]:
    """What each counter grew by per step [R] from row ``since`` to row ``until`` (behind the last); a restart sets the
    counters back, and that jump is left out."""
    first = max(0, since - 1)
    steps = max(1, int(table.steps[until - 1] - table.steps[first]))
    return {
        name: np.maximum(np.diff(table.host[name][first:until], axis=0), 0.0).sum(axis=0) / steps
        for name in HOST if name in table.host
    }  # fmt: skip


def cause_of(
    table: StepTable, work: Floats, columns: npt.NDArray[np.int64], phase: str, since: int, until: int
) -> Cause:
    """Why ranks ``columns`` took longer than their peers in rows ``since`` to ``until``, above all in ``phase``; ``work``
    [T, R] is in seconds."""
    grown = per_step(table, since, until)
    peers = table.peers()
    others = np.setdiff1d(np.flatnonzero(np.isin(peers, peers[columns])), columns)
    found = UNKNOWN
    if grown and grown["cpu_s"].any() and others.size:
        took = work[since:until].mean(axis=0)  # as the counters are
        excess = float(np.median(took[columns]) - np.median(took[others]))
        found = explained(more_of(grown, took, columns, others), excess, table.on_device)
    # It is not the step's thread that reads.
    return (
        Cause("data") if phase == "data" and found.name in ("", "stopped", "host_lock", "device") else found
    )


def more_of(
    grown: dict[str, Floats], took: Floats, late: npt.NDArray[np.int64], others: npt.NDArray[np.int64]
) -> dict[str, float]:
    """What ``late`` has more of per step than ``others``, of each counter and of time that was neither."""
    idle = np.maximum(0.0, took - grown["cpu_s"] - grown["wait_s"])
    return {
        name: max(0.0, float(np.median(values[late]) - np.median(values[others])))
        for name, values in {**grown, "idle_s": idle}.items()
    }


def explained(more: dict[str, float], excess: float, on_device: bool = False) -> Cause:
    """The cause of ``excess`` seconds per step. ``on_device``: the host's thread does not do the work, so that its being
    idle says nothing."""

    def cause(name: str, evidence: str) -> Cause:
        return Cause(name, evidence, WORDS.get(name, ""), ADVICE.get(name, ""))

    if excess <= 0:
        return UNKNOWN
    enough = HALF * excess
    if more["throttled_s"] >= enough:
        return cause(
            "cpu_quota",
            f"its control group was out of CPU quota for {_ms(more['throttled_s'])} more per step",
        )
    if min(more["wait_s"] + more["idle_s"], more["others_s"]) >= enough:
        # Kept from running, and it was this process that ran meanwhile.
        ran = f"other threads of its process ran for {_ms(more['others_s'])} more per step"
        if more["faults"] >= FAULTY * more["others_s"]:
            return cause("page_faults", f"{ran} and mapped {more['faults']:.0f} pages")
        return cause("host_lock", f"{ran}, and its own was kept from running")
    if more["wait_s"] >= enough:
        return cause(
            "cpu_contention",
            f"it waited {_ms(more['wait_s'])} more per step for a CPU that others were using",
        )
    if more["major_faults"] * MAJOR_S >= HALF * enough:
        return cause("page_faults", f"it read {more['major_faults']:.0f} more pages per step from a disk")
    if more["faults"] * MINOR_S >= HALF * enough:
        return cause("page_faults", f"it mapped {more['faults']:.0f} more pages per step")
    if on_device:
        return UNKNOWN
    if more["idle_s"] >= enough:
        return cause(
            "stopped", f"its thread neither ran nor waited for a CPU for {_ms(more['idle_s'])} more per step"
        )
    if more["cpu_s"] >= enough:
        return cause("device", f"its thread computed for {_ms(more['cpu_s'])} more per step")
    return UNKNOWN


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.1f} ms"
