"""What failures and checkpoints leave of a run's time: Young-Daly interval and effective MFU."""

from __future__ import annotations

import math
from dataclasses import dataclass

from trainsys.errors import UserError


@dataclass(frozen=True)
class Goodput:
    """``interval_s`` between checkpoints, ``mtbf_s`` of the whole job, and ``share`` of time that makes progress."""

    mtbf_s: float
    interval_s: float
    checkpoint_s: float
    share: float


def young_daly(checkpoint_s: float, mtbf_s: float) -> float:
    """Best seconds between checkpoints that each block for ``checkpoint_s``.

    Daly, "A higher order estimate of the optimum checkpoint interval for restart dumps", 2006, eq. 37; its first term
    is Young's 1974 sqrt(2 * checkpoint * mtbf). Where a checkpoint takes twice the mtbf or longer: the mtbf itself.
    """
    if checkpoint_s >= 2.0 * mtbf_s:
        return mtbf_s
    ratio = checkpoint_s / (2.0 * mtbf_s)
    return (
        math.sqrt(2.0 * checkpoint_s * mtbf_s) * (1.0 + math.sqrt(ratio) / 3.0 + ratio / 9.0) - checkpoint_s
    )


def goodput(
    nodes: int, mtbf_node_s: float, checkpoint_s: float, restart_s: float, interval_s: float | None = None
) -> Goodput:
    """Expected share of time spent on progress that is kept.

    Failures of ``nodes`` independent nodes arrive as a Poisson process; each costs ``restart_s`` and the work since the
    last checkpoint. With exponential failures the expected wall time of one interval t + c is
    mtbf * exp(restart/mtbf) * (exp((t + c)/mtbf) - 1) (Daly 2006, eq. 13). ``interval_s`` None: Young-Daly's.

    Raises:
        UserError: a count or time that is not positive.
    """
    for name, value in (("nodes", nodes), ("mtbf", mtbf_node_s)):
        if not value > 0:
            raise UserError(f"{name}={value}: must be positive")
    if checkpoint_s < 0 or restart_s < 0:
        raise UserError("checkpoint and restart seconds must not be negative")
    mtbf = mtbf_node_s / nodes
    interval = interval_s if interval_s is not None else young_daly(checkpoint_s, mtbf)
    if not interval > 0:
        interval = max(mtbf * 1e-3, 1e-9)
    exponent = (interval + checkpoint_s) / mtbf
    if exponent > 700 or restart_s / mtbf > 700:
        return Goodput(mtbf, interval, checkpoint_s, 0.0)
    wall = mtbf * math.exp(restart_s / mtbf) * math.expm1(exponent)
    return Goodput(mtbf, interval, checkpoint_s, interval / wall)


def checkpoint_seconds(
    params: float, nodes: int, gb_s_per_node: float, storage_gb_s: float, blocking: float = 0.1
) -> float:
    """Seconds training stands still for a checkpoint of 12 bytes a parameter (fp32 master and two moments).

    All nodes write at once, at ``gb_s_per_node`` each and ``storage_gb_s`` together at most; ``blocking``: share of the
    write that is not hidden by asynchronous saving.
    """
    return blocking * 12.0 * params / (1e9 * min(gb_s_per_node * nodes, storage_gb_s))
