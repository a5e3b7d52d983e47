"""What a pipeline refuses: too many stages, what its schedule asks for, and options of other"""

from __future__ import annotations

from trainsys.layout.refused.case import Case, Refusal
from trainsys.schedules.build import LIMITS, Limit, Wanted, splits_backward, stages_per_rank


def _virtual(c: Case) -> int:
    return stages_per_rank(c.parallel.pipeline.schedule, c.parallel.pipeline.virtual_stages)


def _too_many(c: Case) -> str:
    virtual, layers = _virtual(c), c.model.n_layers
    each = f" × {virtual} virtual stages a rank" if virtual > 1 else ""
    works = f"pp can be 1 to {layers // virtual}" if layers >= virtual else "pp can be 1"
    return f"parallel.pp={c.layout.pp}{each} is more stages than model.n_layers={layers} layers; {works}"


def _micros(c: Case) -> int:
    return c.train.global_batch // c.rows


def _schedule_entry(of: Limit) -> Refusal:
    def wanted(c: Case) -> Wanted:
        return Wanted(c.parallel.pipeline.schedule, c.layout.pp, _virtual(c), _micros(c))

    def batch(c: Case) -> str:
        if not of.of_micros:
            return ""
        return (
            f" (train.global_batch={c.train.global_batch} / (dp_replicate × dp_shard × micro_batch = {c.rows}) = "
            f"{_micros(c)} micro-batches)"
        )

    return Refusal(
        of.name,
        lambda c: c.layout.pp > 1 and c.train.global_batch % c.rows == 0 and of.applies(wanted(c)),
        lambda c: of.says(wanted(c)) + batch(c),
        of.example,
    )


TABLE = (
    Refusal(
        "more stages than layers",
        lambda c: c.layout.pp > 1 and c.layout.pp * _virtual(c) > c.model.n_layers,
        _too_many,
        {"parallel.pp": 16},
    ),
    *(_schedule_entry(of) for of in LIMITS),
    Refusal(
        "a unit for a schedule that has none",
        lambda c: (
            c.layout.pp > 1
            and c.parallel.pipeline.unit is not None
            and c.parallel.pipeline.schedule != "blockwise"
        ),
        lambda c: (
            f"parallel.pipeline.unit={c.parallel.pipeline.unit} is for schedule=blockwise; "
            f"{c.parallel.pipeline.schedule} has none: leave it out"
        ),
        {"parallel.pp": 2, "parallel.pipeline.unit": 4},
    ),
    Refusal(
        "compiled blocks in a schedule that splits backward",
        lambda c: c.layout.pp > 1 and c.train.compile and splits_backward(c.parallel.pipeline.schedule),
        lambda c: (
            f"train.compile with parallel.pipeline.schedule={c.parallel.pipeline.schedule}: a compiled block "
            "cannot put off its weight gradients; use 1f1b or interleaved_1f1b, or train.compile=false"
        ),
        {"parallel.pp": 2, "parallel.pipeline.schedule": "zero_bubble", "train.compile": True},
    ),
)
