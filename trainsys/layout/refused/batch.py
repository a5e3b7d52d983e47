"""Sequences and batches that do not split over cp, tp and the data ranks."""

from __future__ import annotations

import math

from trainsys.context.balance import sequence_unit
from trainsys.layout.refused.case import Case, Refusal
from trainsys.layout.words import around


def _unit(c: Case) -> tuple[int, str]:
    """What ``train.seq_len`` must be a multiple of, and why."""
    unit, reason = sequence_unit(c.parallel.context, c.layout.cp)
    why = [reason] if reason else []
    cp, tp = c.layout.cp, c.layout.tp
    if c.parallel.sequence_parallel and tp > 1:
        # The residual of a context rank's own seq / cp tokens is spread over tp.
        unit = math.lcm(unit, cp * tp)
        over = f"cp={cp} × tp={tp}" if cp > 1 else f"parallel.tp={tp}"
        why.append(f"{over} (parallel.sequence_parallel)")
    return unit, " and ".join(why)


def _factors(c: Case) -> str:
    return f"{c.layout.dp_replicate} × {c.layout.dp_shard} × {c.train.micro_batch} = {c.rows}"


TABLE = (
    Refusal(
        "sequences that cp and sequence parallelism do not divide",
        lambda c: c.train.seq_len % _unit(c)[0] != 0,
        lambda c: (
            f"train.seq_len={c.train.seq_len} does not divide by {_unit(c)[1]}; "
            f"seq_len can be {around(c.train.seq_len, _unit(c)[0])}"
        ),
        {"parallel.cp": 4, "train.seq_len": 92},
    ),
    Refusal(
        "batches that the data ranks do not divide",
        lambda c: c.train.global_batch % c.rows != 0,
        lambda c: (
            f"train.global_batch={c.train.global_batch} does not divide by "
            f"dp_replicate × dp_shard × micro_batch = {_factors(c)}; "
            f"global_batch can be {around(c.train.global_batch, c.rows)}"
        ),
        {"parallel.dp_shard": 5},
    ),
)
