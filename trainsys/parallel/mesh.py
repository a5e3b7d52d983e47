"""The process groups of a layout, as seen from one rank."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from trainsys.comm.group import AxisGroup
from trainsys.comm.ledger import Ledger
from trainsys.layout import Axis, Layout

GROUP_TIMEOUT_S = 600.0
# In the order in which their groups are made. `fsdp` is dp_shard × cp, over which parameters are sharded.
GROUPED: tuple[Axis, ...] = ("pp", "dp_replicate", "fsdp", "cp", "tp", "ep", "expert_fsdp")
"""Axes that get a process group at once."""
AXES: tuple[Axis, ...] = (*GROUPED, "dp_shard", "loss")
"""Axes whose ranks are known; `Mesh.join` makes a group of the others, which few engines need."""


class Mesh:
    """Groups by axis name: ``mesh["tp"]`` is this rank's tensor-parallel :class:`AxisGroup`.

    Equal rank lists share one process group, so that a pure ``dp_shard=8`` run makes no second group
    for ``fsdp`` and a group of all ranks is the default group.
    """

    def __init__(
        self,
        layout: Layout,
        device: torch.device,
        ledger: Ledger | None = None,
        timeout_s: float = GROUP_TIMEOUT_S,
    ) -> None:
        self.layout = layout
        self.device = device
        self.ledger = ledger or Ledger()
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        world = dist.get_world_size() if dist.is_initialized() else 1
        assert world == layout.world, f"{world} processes for a layout of {layout.world}"
        self._timeout = timedelta(seconds=timeout_s)
        self._made: dict[tuple[tuple[int, ...], ...], dist.ProcessGroup | None] = {}
        self._axes: dict[str, AxisGroup] = {axis: self._join(axis, layout.groups(axis)) for axis in GROUPED}
        self._axes["world"] = self._join("world", [list(range(world))])

    def __getitem__(self, axis: str) -> AxisGroup:
        return self._axes[axis]

    def ranks(self, axis: Axis) -> tuple[int, ...]:
        """This rank's group of any axis."""
        return tuple(self.layout.group_of(axis, self.rank))

    def join(self, axis: Axis) -> AxisGroup:
        """An axis that has no group from the start; every rank of the world must call this."""
        if axis not in self._axes:
            self._axes[axis] = self._join(axis, self.layout.groups(axis))
        return self._axes[axis]

    def alone(self) -> dist.ProcessGroup:
        """A group of this rank, for those who know no other way to say so; every rank must call this."""
        return self._make("alone", [[rank] for rank in range(self.layout.world)], [self.rank])

    def subgroup(self, axis: Axis, blocks: list[list[int]]) -> AxisGroup:
        """The block of ``axis`` that this rank is in, counted as ``axis``. ``blocks`` hold places in a group of
        the axis and are the same for all of its groups; every rank of the world must call this."""
        groups = self.layout.groups(axis)
        return self._join(axis, [[ranks[i] for i in block] for ranks in groups for block in blocks])

    def device_mesh(self, axis: str) -> DeviceMesh:
        """A one-dimensional DeviceMesh over an axis, for FSDP2."""
        g = self._axes[axis]
        if g.group is None:
            return DeviceMesh(self.device.type, [self.rank], mesh_dim_names=(axis,))
        return DeviceMesh.from_group(g.group, self.device.type, mesh=list(g.ranks), mesh_dim_names=(axis,))

    def _join(self, axis: str, groups: list[list[int]]) -> AxisGroup:
        mine = next(tuple(g) for g in groups if self.rank in g)
        group = self._group(axis, tuple(tuple(g) for g in groups), mine)
        return AxisGroup(axis, mine, mine.index(self.rank), group, self.ledger)

    def _group(
        self, axis: str, groups: tuple[tuple[int, ...], ...], mine: tuple[int, ...]
    ) -> dist.ProcessGroup | None:
        """None for a rank that is alone in its group."""
        if len(mine) == 1 and all(len(ranks) == 1 for ranks in groups):
            return None
        if len(groups) == 1:
            assert dist.group.WORLD is not None
            return dist.group.WORLD
        if groups not in self._made:
            group = self._make(axis, [list(ranks) for ranks in groups if len(ranks) > 1], list(mine))
            self._made[groups] = group if len(mine) > 1 else None
        return self._made[groups]

    def _make(self, axis: str, groups: list[list[int]], mine: list[int]) -> Any:
        """This rank's of ``groups``, which are disjoint: one communicator a rank, however many they are. NCCL splits the
        world into all of them in one call; elsewhere every rank calls for each group and only its members make it."""
        if splits(self.device):
            return dist.split_group(split_ranks=groups, timeout=self._timeout, group_desc=axis)
        # Not with use_local_synchronization: with it the demo's ranks grew by 12 MiB a step (torch 2.13, gloo).
        made = [dist.new_group(ranks, timeout=self._timeout, group_desc=axis) for ranks in groups]
        return made[groups.index(mine)] if mine in groups else None


def splits(device: torch.device) -> bool:
    """Whether the default group can be split: NCCL's, bound to its device."""
    if device.type == "cpu" or dist.group.WORLD is None or dist.group.WORLD.bound_device_id is None:
        return False
    return bool(dist.group.WORLD._get_backend(device).supports_splitting)
