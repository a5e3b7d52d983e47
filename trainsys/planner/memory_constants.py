"""The numbers of the memory model that shapes do not give, each with its prior; fitted by ``calibrate``."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cache

from trainsys.planner.constants import Prior, constants_file

MEMORY_PRIORS: dict[str, Prior] = {
    "activation": Prior(1.06, 0.05, "allocator rounding and fragmentation over the counted activations"),
    "norm_unfused": Prior(
        6.0,
        0.1,
        "D-sized 16-bit copies that one unfused RMSNorm keeps: input and normalised in fp32, both casts",
    ),
    "rotary": Prior(0.6, 0.5, "share of q and k kept twice by rotary embedding"),
    "gate": Prior(1.0, 0.15, "F-sized copies beyond three that an unfused gated feed-forward keeps"),
    "square": Prior(5.0, 0.1, "bytes an entry of the score matrix kept by unfused attention"),
    "logit_bytes": Prior(10.0, 0.15, "bytes a logit at the peak of the loss"),
    "overhead_bytes": Prior(2.5e9, 0.3, "context, libraries, communication buffers, workspaces"),
    "bucket_bytes": Prior(2e9, 0.2, "buckets of sharded optimizers"),
    "grad_units": Prior(2.0, 0.3, "layers whose unsharded gradients are alive under full sharding"),
    "half_kept": Prior(0.35, 0.3, "share of a layer kept by op-level selective recomputation"),
    "logit_gathered": Prior(18.0, 0.2, "the same where logits are gathered over tp and cast to fp32"),
    "usable": Prior(0.98, 0.01, "share of the device's memory before the allocator fails"),
}


@dataclass(frozen=True)
class MemoryConstants:
    """One value for each entry of ``MEMORY_PRIORS``."""

    activation: float
    norm_unfused: float
    rotary: float
    gate: float
    square: float
    logit_bytes: float
    overhead_bytes: float
    bucket_bytes: float
    grad_units: float
    half_kept: float
    logit_gathered: float
    usable: float


assert {f.name for f in fields(MemoryConstants)} == set(MEMORY_PRIORS)


def memory_from_priors() -> MemoryConstants:
    return MemoryConstants(**{n: p.value for n, p in MEMORY_PRIORS.items()})


@cache
def shipped_memory() -> MemoryConstants:
    """The fitted values that ship with trainsys."""
    return MemoryConstants(**{n: float(v) for n, v in constants_file()["memory"].items()})
