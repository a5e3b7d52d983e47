"""The process groups of a layout, as seen from one rank."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from trainsys.comm.group import AxisGroup
from trainsys.comm.ledger import Ledger
from trainsys.layout import Axis, Layout

# Axes that get a process group of their own. `fsdp` is dp_shard × cp, over which parameters are sharded.
AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp", "ep", "expert_fsdp", "fsdp", "loss")


class Mesh:
    """Groups by axis name: ``mesh["tp"]`` is this rank's tensor-parallel :class:`AxisGroup`.

    Equal rank lists share one process group, so that a pure ``dp_shard=8`` run makes no second group
    for ``fsdp`` and a group of all ranks is the default group.
    """

    def __init__(self, layout: Layout, device: torch.device, ledger: Ledger | None = None) -> None:
        self.layout = layout
        self.device = device
        self.ledger = ledger or Ledger()
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        world = dist.get_world_size() if dist.is_initialized() else 1
        assert world == layout.world, f"{world} processes for a layout of {layout.world}"
        self._made: dict[tuple[tuple[int, ...], ...], dist.ProcessGroup | None] = {}
        self._axes = {axis: self._join(axis, layout.groups(axis)) for axis in AXES}
        self._axes["world"] = self._join("world", [list(range(world))])

    def __getitem__(self, axis: str) -> AxisGroup:
        return self._axes[axis]

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
        group = self._group(tuple(tuple(g) for g in groups), mine)
        return AxisGroup(axis, mine, mine.index(self.rank), group, self.ledger)

    def _group(self, groups: tuple[tuple[int, ...], ...], mine: tuple[int, ...]) -> dist.ProcessGroup | None:
        """None for a rank that is alone in its group."""
        if len(groups) == 1 and len(mine) > 1:
            assert dist.group.WORLD is not None
            return dist.group.WORLD
        if groups not in self._made:
            self._made[groups] = None
            # Every rank takes part in making every group, in the same order, those too that are in none.
            for ranks in groups:
                if len(ranks) == 1:
                    continue
                made = dist.new_group(list(ranks))
                if ranks == mine:
                    self._made[groups] = made
        return self._made[groups]
