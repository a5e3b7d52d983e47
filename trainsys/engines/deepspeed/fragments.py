"""Where ZeRO keeps what: each piece of a parameter's fp32 master, and where in which flat tensor it lies."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainsys.models.flat import places_of_range
from trainsys.models.shards import ShardSpec


@dataclass(frozen=True)
class Fragment:
    """Elements ``[start, stop)`` of a rank's part ``spec`` of a parameter, row-major, held by the optimizer's tensor
    ``owner`` from element ``offset`` on."""

    name: str
    spec: ShardSpec
    start: int
    stop: int
    owner: Tensor
    offset: int

    def pieces(self, like: Tensor) -> Iterator[tuple[ShardSpec, Tensor]]:
        """Views into ``like``, which is laid out as ``owner`` is (the master itself, a moment, a gradient): boxes
        of the full parameter."""
        flat = like.detach().view(-1)
        at = self.offset
        for place in places_of_range(self.spec, self.start, self.stop):
            end = at + math.prod(place.local_shape)
            yield place, flat[at:end].view(place.local_shape)
            at = end


Names = Mapping[nn.Parameter, str]


def fragments(engine: Any, names: Names, specs: Mapping[str, ShardSpec]) -> list[Fragment]:
    """All that this rank holds. ``engine``: DeepSpeed's; ``names``: canonical, of its parameters."""
    stage = int(engine.zero_optimization_stage())
    found = {0: _replicated, 1: _flat, 2: _flat, 3: _by_parameter}[stage](engine, names)
    out = [Fragment(names[p], specs[names[p]], *rest) for p, *rest in found]
    return [f for f in out if f.start < f.stop]


def _replicated(engine: Any, names: Names) -> Iterator[tuple[Any, ...]]:
    for p in names:
        yield p, 0, p.numel(), p, 0


def _flat(engine: Any, names: Names) -> Iterator[tuple[Any, ...]]:
    """Stages 1 and 2: the parameters of a group end to end, cut into equal partitions."""
    zero = engine.optimizer
    for group, partition in zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True):
        for p in group:
            held = p._hp_mapping
            if held is not None:
                of_parameter, of_partition = held.lp_fragment_address, held.hp_fragment_address
                start = of_parameter.start
                yield p, start, start + of_parameter.numel, partition, of_partition.start


def _by_parameter(engine: Any, names: Names) -> Iterator[tuple[Any, ...]]:
    """Stage 3: each parameter is cut into equal partitions; those of a sub-group lie end to end."""
    zero = engine.optimizer
    for group, flat in zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat, strict=True):
        offset = 0
        for p in group:
            size = p.partition_numel()
            start = min(dist.get_rank(p.ds_process_group) * size, p.ds_numel)
            yield p, start, min(start + size, p.ds_numel), flat, offset
            offset += size


def masters_to_model(engine: Any) -> None:
    """The fp32 masters were filled: parameters follow, on every rank. A collective call."""
    zero, stage = engine.optimizer, int(engine.zero_optimization_stage())
    with torch.no_grad():
        if stage in (1, 2):
            zero.update_lp_params()
        elif stage == 3:
            zero._partition_all_parameters()
            for i in range(len(zero.fp16_groups)):
                zero._reassign_or_swap_out_partitioned_parameters(i)
            if zero.persistent_parameters:
                zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
