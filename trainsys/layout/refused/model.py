"""What of a model does not split over tp and ep, and ways to experts that do not fit ep."""

from __future__ import annotations

import math

from trainsys.layout.refused.case import Case, Refusal
from trainsys.layout.words import divisors, listed


def _split_by_tp(c: Case) -> dict[str, int]:
    sizes = {
        "model.n_heads": c.model.n_heads,
        "model.n_kv_heads": c.model.kv_heads,
        "model.d_ff": c.model.d_ff,
        "model.vocab": c.model.vocab,
    }
    if c.model.moe is not None:
        sizes["model.moe.d_ff"] = c.model.moe.d_ff
        if c.model.moe.shared_hidden:
            sizes["model.moe.shared_d_ff"] = c.model.moe.shared_hidden
    return sizes


def _uneven(c: Case) -> list[str]:
    return [f"{name}={size}" for name, size in _split_by_tp(c).items() if size % c.layout.tp]


def _experts(c: Case) -> int:
    return 0 if c.model.moe is None else c.model.moe.n_experts


def _node_choices(c: Case) -> list[int]:
    return [n for n in divisors(c.layout.ep) if 1 < n < c.layout.ep]


def _node_choice(c: Case) -> str:
    works = _node_choices(c)
    return f"node_ranks can be {listed(works)}" if works else "use dispatch=flat"


MOE: dict[str, object] = {"model.moe.n_experts": 8, "model.moe.top_k": 2, "model.moe.d_ff": 64}

TABLE = (
    Refusal(
        "tp that does not divide heads, widths or vocabulary",
        lambda c: bool(_uneven(c)),
        lambda c: (
            f"parallel.tp={c.layout.tp} does not divide {', '.join(_uneven(c))}; with this model tp can be "
            f"{listed(divisors(math.gcd(*_split_by_tp(c).values())))}"
        ),
        {"parallel.tp": 8},
    ),
    Refusal(
        "ep for a dense model",
        lambda c: c.layout.ep > 1 and c.model.moe is None,
        lambda c: (
            f"parallel.ep={c.layout.ep} needs experts, but model {c.model.name} is dense; set parallel.ep=1"
        ),
        {"parallel.dp_shard": 4, "parallel.ep": 2},
    ),
    Refusal(
        "experts that ep does not divide",
        lambda c: _experts(c) % c.layout.ep != 0,
        lambda c: (
            f"model.moe.n_experts={_experts(c)} does not divide by parallel.ep={c.layout.ep}; "
            f"ep can be {listed(divisors(math.gcd(_experts(c), c.layout.dp_shard * c.layout.cp)))}"
        ),
        {**MOE, "model.moe.n_experts": 6, "parallel.dp_shard": 4, "parallel.ep": 4},
    ),
    Refusal(
        "nodes for a dispatch that knows none",
        lambda c: c.parallel.expert.dispatch == "flat" and c.parallel.expert.node_ranks is not None,
        lambda c: (
            f"parallel.expert.node_ranks={c.parallel.expert.node_ranks} is for dispatch=hierarchical; "
            "flat knows no nodes: leave it out"
        ),
        {**MOE, "parallel.dp_shard": 4, "parallel.ep": 4, "parallel.expert.node_ranks": 2},
    ),
    Refusal(
        "hierarchical dispatch without nodes that cut ep",
        lambda c: (
            c.parallel.expert.dispatch == "hierarchical"
            and c.layout.ep > 1
            and c.parallel.expert.node_ranks not in _node_choices(c)
        ),
        lambda c: (
            f"parallel.expert.dispatch=hierarchical cuts parallel.ep={c.layout.ep} into nodes of several ranks, "
            f"but node_ranks={c.parallel.expert.node_ranks} does not; {_node_choice(c)}"
        ),
        {**MOE, "parallel.dp_shard": 4, "parallel.ep": 4, "parallel.expert.dispatch": "hierarchical"},
    ),
)
