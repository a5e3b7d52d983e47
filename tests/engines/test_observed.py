"""Collectives that trainsys did not call, in its ledger: which axis, how many, how many bytes, on real ranks."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from support.ranks import run_ranks
from trainsys.comm import ops
from trainsys.engines.observed import Observer, observe
from trainsys.layout import Layout
from trainsys.parallel.mesh import Mesh
from trainsys.telemetry.recorder import Recorder, here

N = 6
BYTES = 4 * N


def foreign(body: Callable[..., Any]) -> Callable[..., Any]:
    """``body`` as a function of a module that is no part of trainsys, nor of torch."""
    module = types.ModuleType("somebodys_trainer")
    made = types.FunctionType(body.__code__, vars(module) | body.__globals__, body.__name__)
    made.__globals__["__name__"] = module.__name__
    return made


def _all_functions(group: Any) -> Tensor:
    rank, n = dist.get_rank(group), dist.get_world_size(group)
    x, out = torch.full((N,), rank + 1.0), torch.empty(n * N)
    dist.all_reduce(x, group=group)
    work = dist.all_reduce(tensor=x, group=group, async_op=True)
    work.wait()
    work.wait()  # a second time counts nothing
    dist.all_gather_into_tensor(output_tensor=out, input_tensor=x, group=group)
    dist.all_gather([torch.empty(N) for _ in range(n)], x, group=group)
    dist.reduce_scatter_tensor(x, out, group=group)
    dist.all_to_all_single(torch.empty(n * N), torch.ones(n * N), group=group)
    mine = [1, N - 1] if rank == 0 else [2, N - 2]
    theirs = [1, 2] if rank == 0 else [N - 1, N - 2]
    dist.all_to_all_single(torch.empty(sum(theirs)), torch.ones(N), theirs, mine, group=group)
    dist.broadcast(x, group_src=0, group=group)
    return x


def _messages(group: Any) -> Tensor:
    rank = dist.get_rank(group)
    x, y = torch.full((N,), float(rank)), torch.empty(N)
    peer = dist.get_global_rank(group, 1 - rank)
    both = [dist.P2POp(dist.isend, x, peer, group), dist.P2POp(dist.irecv, y, peer, group)]
    for work in dist.batch_isend_irecv(both):
        work.wait()
    works = [dist.isend(x, peer, group), dist.irecv(y, peer, group)]
    for work in works:
        work.wait()
    return y


def _coalesced(group: Any) -> Tensor:
    a, b = torch.ones(N), torch.ones(N)
    with dist._coalescing_manager(group):
        dist.all_reduce(a, group=group)
        dist.all_reduce(b, group=group)
    return a + b


def count(name: str, layout: dict[str, int], axis: str, names: dict[str, str] | None = None) -> Any:
    mesh = Mesh(Layout(**layout), torch.device("cpu"))
    recorder = Recorder(None, here(run_id="observed", rank=mesh.rank, world=2), watch_gc=False)
    mesh.ledger.recorder = recorder
    group = mesh[axis].group if names is None else dist.new_group([0, 1], group_desc=next(iter(names)))
    observer = Observer(mesh, names)
    try:
        recorder.begin()
        value = foreign(globals()[name])(group)
        step = recorder.end_step(0)
    finally:
        observer.stop()
    foreign(globals()[name])(group)  # not observed any more
    counted = {key: (t.calls, t.sent_bytes) for key, t in mesh.ledger.traffic.items()}
    return value.tolist(), counted, step.comm, step.phases


def test_every_function_counts_once_with_its_bytes() -> None:
    for rank, (_, counted, comm, phases) in enumerate(run_ranks(2, count, "_all_functions", {"tp": 2}, "tp")):
        assert counted == {
            ("tp", "all_reduce"): (2, 2 * BYTES),
            ("tp", "all_gather"): (2, 2 * BYTES),
            ("tp", "reduce_scatter"): (1, BYTES),
            # equal parts of 2 N, then what of N goes to the other
            ("tp", "all_to_all"): (2, BYTES + 4 * ((N - 1) if rank == 0 else 2)),
            ("tp", "broadcast"): (1, BYTES if rank == 0 else 0),
        }
        assert {op: c.calls for op, c in comm["tp"].items()} == {op: n for (_, op), (n, _) in counted.items()}
        assert phases["comm/tp"] > 0, "the wait is part of the step's time"


def test_messages_count_where_they_are_waited_for() -> None:
    for rank, (value, counted, _, _) in enumerate(run_ranks(2, count, "_messages", {"pp": 2}, "pp")):
        assert value == [1.0 - rank] * N
        assert counted == {("pp", "send"): (2, 2 * BYTES), ("pp", "recv"): (2, 0)}


def test_calls_made_into_one_count_once() -> None:
    for value, counted, _, _ in run_ranks(2, count, "_coalesced", {"dp_shard": 2}, "fsdp"):
        assert value == [4.0] * N
        assert counted == {("fsdp", "all_reduce"): (1, 2 * BYTES)}


def test_a_group_is_told_by_its_description_first() -> None:
    """Where one axis spans the world, ranks alone would call everything by its name."""
    names = {"THEIR_MODEL_GROUP": "world"}
    for _, counted, _, _ in run_ranks(2, count, "_coalesced", {"tp": 2}, "tp", names):
        assert counted.keys() == {("world", "all_reduce")}


def _ours() -> Any:
    mesh = Mesh(Layout(tp=2), torch.device("cpu"))
    alone = [dist.new_group([rank]) for rank in range(2)][mesh.rank]
    first = observe(mesh)
    other = Mesh(Layout(dp_shard=2), torch.device("cpu"))
    second = observe(other)
    try:
        ops.all_reduce_(torch.ones(N), mesh["tp"])
        foreign(_coalesced)(alone)
        foreign(_coalesced)(mesh["tp"].group)
    finally:
        second.stop()
    assert first._real == {}
    return mesh.ledger.calls("tp"), {a for a, _ in mesh.ledger.traffic}, other.ledger.calls("fsdp")


def test_our_own_count_themselves_groups_of_one_do_not_and_the_last_observer_counts() -> None:
    for calls, axes, foreign_calls in run_ranks(2, _ours):
        assert (calls, axes) == (1, {"tp"})
        assert foreign_calls == 1


def test_stopping_leaves_torch_as_it_was() -> None:
    before = dist.ProcessGroup.allreduce
    observer = Observer(Mesh(Layout(), torch.device("cpu")))
    assert dist.ProcessGroup.allreduce is not before
    observer.stop()
    assert dist.ProcessGroup.allreduce is before
