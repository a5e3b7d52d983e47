"""Degrees of sharding that contradict each other: of parameters, gradients and optimizer states."""

from __future__ import annotations

from trainsys.layout.refused.case import Refusal

TABLE = (
    Refusal(
        "gradients in smaller pieces than the optimizer's",
        lambda c: c.parallel.shard.grads == "over_replicas" and c.parallel.shard.optim == "as_params",
        lambda c: (
            "parallel.shard.grads=over_replicas with optim=as_params: a rank would update weights of whose "
            "gradient it has a piece; set parallel.shard.optim=over_replicas too"
        ),
        {"parallel.dp_replicate": 2, "parallel.shard.grads": "over_replicas"},
    ),
    Refusal(
        "gradients over replicas in a pipeline",
        lambda c: (
            c.layout.pp > 1
            and c.layout.dp_replicate > 1
            and c.parallel.shard.grads == "over_replicas"
            and c.parallel.shard.optim == "over_replicas"
        ),
        lambda c: (
            f"parallel.shard.grads=over_replicas with parallel.pp={c.layout.pp}: a pipeline reduces a stage's "
            "gradients once, after its last micro-batch; use shard.optim=over_replicas alone"
        ),
        {
            "parallel.pp": 2,
            "parallel.dp_replicate": 2,
            "parallel.shard.grads": "over_replicas",
            "parallel.shard.optim": "over_replicas",
        },
    ),
)
