"""How many communicators a rank makes, at any world size: few, named, with time-outs, and its own alone."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode

from support.apart import apart
from support.ranks import run_ranks
from trainsys.comm.tree import FANOUT
from trainsys.config.loader import load_run
from trainsys.dryrun.world import as_on_cuda, rank_of, without_memory
from trainsys.engines.native import NativeEngine
from trainsys.layout import Layout
from trainsys.parallel import mesh as meshes
from trainsys.parallel.mesh import GROUP_TIMEOUT_S, Mesh
from trainsys.telemetry.events import RunStart
from trainsys.telemetry.recorder import Recorder
from trainsys.train.process import process

WORLD = 16384
BUDGET = 8
"""Communicators of a rank, the default group's among them."""
CPU = torch.device("cpu")
LAYOUTS = {
    "fsdp": Layout(dp_shard=WORLD),
    "hsdp": Layout(dp_replicate=64, dp_shard=256),
    "dense": Layout(pp=16, dp_replicate=4, dp_shard=16, cp=2, tp=8),
    "experts": Layout(pp=8, dp_replicate=4, dp_shard=32, cp=2, tp=8, ep=16),
}


@dataclass
class Made:
    """Calls of ``new_group`` (where this rank is a member: elsewhere nothing is made) and of ``split_group``: (axis,
    groups, arguments)."""

    new: list[tuple[str, list[int], dict[str, Any]]] = field(default_factory=list)
    split: list[tuple[str, list[list[int]], dict[str, Any]]] = field(default_factory=list)

    @property
    def communicators(self) -> int:
        return 1 + len(self.new) + len(self.split)


@contextmanager
def recording(splitting: bool) -> Iterator[Made]:
    """Note what groups are made. ``splitting``: as on NCCL, where a split is of the whole world."""
    made, new, split, can = Made(), dist.new_group, dist.split_group, meshes.splits

    def note_new(ranks: list[int], **how: Any) -> Any:
        if dist.get_rank() in ranks:
            made.new.append((how.get("group_desc", ""), ranks, how))
        return new(ranks, **how)

    def note_split(*, split_ranks: list[list[int]], **how: Any) -> Any:
        flat = [rank for ranks in split_ranks for rank in ranks]
        assert len(flat) == len(set(flat)), "the groups of a split must be disjoint"
        made.split.append((how["group_desc"], split_ranks, how))
        mine = next((ranks for ranks in split_ranks if dist.get_rank() in ranks), None)
        return None if mine is None else new(mine, use_local_synchronization=True, group_desc=how["group_desc"])

    dist.new_group, dist.split_group = note_new, note_split  # type: ignore[assignment]
    meshes.splits = lambda device: splitting  # type: ignore[assignment]
    try:
        yield made
    finally:
        dist.new_group, dist.split_group, meshes.splits = new, split, can  # type: ignore[assignment]


def mesh_at_16384(layout: Layout, rank: int, splitting: bool) -> Made:
    with rank_of(WORLD, rank), recording(splitting) as made:
        mesh = Mesh(layout, CPU)
        for axis in meshes.AXES:
            assert mesh.ranks(axis) == tuple(layout.group_of(axis, rank))
        for axis in meshes.GROUPED:
            assert mesh[axis].ranks == mesh.ranks(axis)
            assert (mesh[axis].group is None) == (mesh[axis].size == 1)
            if mesh[axis].group is not None:
                assert mesh[axis].group.size() == mesh[axis].size
    return made


@pytest.mark.parametrize("splitting", [True, False], ids=["nccl", "gloo"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_rank_of_16384_makes_at_most_eight_communicators(name: str, splitting: bool) -> None:
    layout = LAYOUTS[name]
    made = apart(mesh_at_16384, layout, 9001, splitting)
    assert made.communicators <= BUDGET
    several = {axis for axis in meshes.GROUPED if 1 < layout.size(axis) < WORLD}
    for axis, groups, how in made.split:
        assert groups == layout.groups(axis), "all groups of an axis in one call"
        assert how["timeout"] == timedelta(seconds=GROUP_TIMEOUT_S)
    for axis, ranks, how in made.new:
        assert ranks == layout.group_of(axis, 9001)
        assert how["timeout"] == timedelta(seconds=GROUP_TIMEOUT_S)
    named = [axis for axis, *_ in (made.split if splitting else made.new)]
    assert len(set(named)) == len(named)
    assert set(named) <= several
    assert (made.new == []) if splitting else (made.split == [])


def engine_at_16384(overrides: list[str], splitting: bool) -> Made:
    """The whole native engine of a two-layer model a stage."""
    cfg = load_run("train/demo", overrides)
    layout = Layout.resolve(cfg.parallel, WORLD)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with rank_of(WORLD, 9001), recording(splitting) as made, without_memory(fake), as_on_cuda():
        mesh = Mesh(layout, CPU)
        NativeEngine(cfg, mesh, Recorder(None, _start(), watch_gc=False))
    return made


def _start() -> RunStart:
    return RunStart(run_id="test", rank=0, world=WORLD, t0_mono=0.0, t0_wall=0.0)


def by_hand(device: torch.device) -> bool:
    return meshes.splits(device)


def test_gloo_is_not_split() -> None:
    assert run_ranks(2, by_hand, CPU) == [False, False]


def names_and_sums() -> dict[str, Any]:
    layout = Layout(dp_replicate=2, dp_shard=2, tp=2)
    mesh = Mesh(layout, CPU, timeout_s=41.0)
    out: dict[str, Any] = {}
    for axis in ("dp_replicate", "fsdp", "tp"):
        group = mesh[axis].group
        assert group is not None
        x = torch.tensor([float(mesh.rank)])
        dist.all_reduce(x, group=group)
        out[axis] = group.group_desc, float(x), group._get_backend(CPU).options._timeout.total_seconds()
    alone = mesh.alone()
    out["alone"] = alone.size()
    joined = mesh.join("loss").group
    assert joined is not None
    x = torch.tensor([1.0])
    dist.all_reduce(x, group=joined)
    out["loss"] = float(x)
    return out


def test_on_gloo_groups_are_named_have_time_outs_and_sum_over_their_ranks() -> None:
    layout = Layout(dp_replicate=2, dp_shard=2, tp=2)
    for rank, got in enumerate(run_ranks(8, names_and_sums)):
        for axis in ("dp_replicate", "fsdp", "tp"):
            assert got[axis] == (axis, float(sum(layout.group_of(axis, rank))), 41.0)
        assert got["alone"] == 1
        assert got["loss"] == 4.0


def test_a_whole_engine_at_16384_ranks_stays_within_the_budget() -> None:
    """FSDP2, context parallelism and the pipeline make no groups behind the mesh's back."""
    sizes = {"pp": 2, "dp_replicate": 64, "dp_shard": 16, "cp": 2, "tp": 4}
    overrides = [f"parallel.{axis}={size}" for axis, size in sizes.items()]
    made = apart(engine_at_16384, [*overrides, "train.global_batch=4096", "train.micro_batch=1"], True)
    assert [axis for axis, *_ in made.split] == ["pp", "dp_replicate", "fsdp", "cp", "tp"]
    assert made.new == []


def in_a_run(world: int, rank: int, port: int) -> int:
    """Descriptors of a rank that has summed over the world and told all ranks something."""
    place = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world}
    os.environ.update({name: str(value) for name, value in place.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    before = len(os.listdir("/proc/self/fd"))
    with process(load_run("train/demo").train, timeout_s=60.0) as proc:
        x = torch.ones(1 << 16)
        dist.all_reduce(x)
        assert bool((x == world).all())
        assert proc.ranks.to_all(rank) == list(range(world))
        return len(os.listdir("/proc/self/fd")) - before


def test_a_run_of_gloo_does_not_connect_every_pair() -> None:
    """A sum goes round a ring, so two connections serve it; the default group used to hold one to each other rank.

    8 of gloo's, the store's client (and rank 0's server with a connection of each), a listener and the tree's.
    """
    world = 20
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with ThreadPoolExecutor(world) as pool:
        opened = list(pool.map(lambda rank: apart(in_a_run, world, rank, port), range(world)))
    leaf = opened[-1]
    assert leaf < 18, "16 + 2N would be 56"
    assert max(opened[1:]) < leaf + FANOUT
