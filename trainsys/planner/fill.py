"""What a published row leaves out, chosen as its authors would have: the fastest value predicted to fit.

Only the micro-batch, the number of interleaved chunks, the recomputation and the size of a hybrid's shard groups can be
missing from a row that is still used; no measured column is looked at.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import product

import numpy as np

from trainsys.planner.cases import RECOMPUTES, SCHEDULES, Array, Cases
from trainsys.planner.constants import Constants
from trainsys.planner.memory import peak_memory
from trainsys.planner.memory_constants import MemoryConstants
from trainsys.planner.runs_csv import Run
from trainsys.planner.step_time import step_time

UNSAID_ROOM = 2.0
MICRO_BATCHES = (1.0, 2.0, 4.0, 8.0)
# Parameters sharded within groups and replicated over them, without a word on the groups' size.
_HYBRID = re.compile(r"\bfsdp\s*\+\s*dp\b|\bhsdp\b", re.I)


def _options(run: Run, c: Cases, i: int) -> list[dict[str, float]]:
    """Every filling of row ``i``: values by field."""
    micro = [float(c.micro_batch[i])]
    # A default known from the stack stays. Where recomputation is not said either, nothing bounds memory: stay at
    # the common choice, one sequence.
    if not run.n("micro_batch") > 0 and run.text["recompute"] and micro[0] == 1.0:
        per_rank = c.global_batch[i] / c.dp[i]
        micro = [b for b in MICRO_BATCHES if per_rank % b == 0] or micro
    chunks = [float(c.vpp[i])]
    if not run.n("vpp") > 0 and c.pp[i] > 1 and c.schedule[i] == SCHEDULES.index("1f1b"):
        told = "interleaved" in (run.text["schedule"] + run.text["flags"]).lower()
        layers = c.n_layers[i] / c.pp[i]
        deeper = [float(v) for v in range(2, 13) if layers % v == 0]
        chunks = (deeper or [1.0]) if told else [1.0, *deeper]
    shards = [float(c.fsdp_shard[i])]
    if c.zero[i] >= 3 and _HYBRID.search(run.text["flags"]):
        shards = [s for s in np.exp2(np.arange(3, 17)) if shards[0] % s == 0] or shards
    return [
        {
            "micro_batch": b,
            "vpp": v,
            "fsdp_shard": s,
            "schedule": float(SCHEDULES.index("interleaved"))
            if v > 1 and c.schedule[i] <= 0
            else float(c.schedule[i]),
        }
        for b, v, s in product(micro, chunks, shards)
    ]


def fill(c: Cases, runs: Sequence[Run], k: Constants, m: MemoryConstants) -> Cases:
    """``c`` with every missing choice made; rows that miss nothing are unchanged."""
    rows: list[int] = []
    options: list[dict[str, float]] = []
    for i, run in enumerate(runs):
        found = _options(run, c, i)
        if len(found) > 1:
            rows += [i] * len(found)
            options += found
    if rows:
        index = np.asarray(rows)
        trial = c.take(index).replace(**{f: np.asarray([o[f] for o in options]) for f in options[0]})
        seconds = step_time(trial, k).total
        least = at_best(trial, [runs[i] for i in rows])
        memory = peak_memory(least, m)
        # Fastest of those that fit; where none fits, the smallest.
        score = np.where(memory.fits(least, m), seconds, 1e12 + memory.total)
        changed = {f: np.array(getattr(c, f), float) for f in options[0]}
        best: dict[int, int] = {}
        for j, i in enumerate(rows):
            if i not in best or score[j] < score[best[i]]:
                best[i] = j
        for i, j in best.items():
            for f, values in changed.items():
                values[i] = options[j][f]
        filled: dict[str, Array | float] = dict(changed)
        c = c.replace(**filled)
    # Whoever does not mention recomputation seldom uses it, and the memory model is not exact: only far beyond the
    # device is it taken for granted.
    silent_rows = np.asarray([not r.text["recompute"] for r in runs])
    for policy in ("half", "full"):
        over = peak_memory(c, m).total > UNSAID_ROOM * c.mem_bytes
        c = c.replace(recompute=np.where(silent_rows & over, float(RECOMPUTES.index(policy)), c.recompute))
    return c


def at_best(c: Cases, runs: Sequence[Run]) -> Cases:
    """``c`` with full recomputation wherever a row does not say: such a row is only called out of memory when even
    that would not have saved it."""
    silent = np.asarray([not r.text["recompute"] for r in runs])
    return c.replace(recompute=np.where(silent, float(RECOMPUTES.index("full")), c.recompute))
