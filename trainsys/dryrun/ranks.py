"""Which ranks of a layout differ in what they compute, send or hold: one of each kind stands for all."""

from __future__ import annotations

from trainsys.config.run import RunConfig
from trainsys.context.balance import ContextPlan
from trainsys.layout import Layout


def distinct_ranks(cfg: RunConfig, layout: Layout) -> list[int]:
    """One rank of each kind, ascending.

    Every pipeline stage. Of cp all, where a flavour's work or bytes depend on the place in the row (contiguous cuts);
    a zigzag makes them equal. The last rank of fsdp, where parameters do not divide and it gets less than the others.
    Ranks of tp, ep and dp_replicate do the same: heads, vocabulary and experts divide evenly, and a dry run takes
    experts to be evenly loaded.
    """
    plan = ContextPlan.resolve(cfg.parallel.context, layout.cp)
    uneven_cp = layout.cp > 1 and plan.balance == "contiguous" and plan.flavour != "ulysses"
    found = set()
    for pp in range(layout.pp):
        found.update(layout.rank(pp=pp, cp=cp) for cp in (range(layout.cp) if uneven_cp else (0,)))
        if _ragged(cfg, layout):
            found.add(layout.rank(pp=pp, dp_shard=layout.dp_shard - 1, cp=layout.cp - 1))
    return sorted(found)


def _ragged(cfg: RunConfig, layout: Layout) -> bool:
    """Whether FSDP cuts some parameter into unequal parts along its first dim."""
    m, tp = cfg.model, layout.tp
    rows = [
        m.d_model,
        m.vocab // tp,
        m.n_heads * m.dim_per_head // tp,
        m.kv_heads * m.dim_per_head // tp,
        m.d_ff // tp,
    ]
    if m.qk_norm:
        rows.append(m.dim_per_head)
    if m.moe is not None:
        rows += [m.moe.n_experts, *([m.moe.shared_hidden // tp] if m.moe.shared_hidden else [])]
    return any(n % layout.size("fsdp") for n in rows)
