"""The real step of every axis on virtual streams: no race, no deadlock, no host that waits, gathers that are ahead. Each
check is shown what it must find: in the record, or in a step recorded with a fault in the product."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from itertools import pairwise
from typing import Any

import pytest

from support.apart import apart
from support.dry_cases import run, world
from support.virtual.cases import CASES, MODEL, SLOW, Case, case, recorded, traces
from support.virtual.hazards import hazards, without_needless_waits
from support.virtual.order import channels, collectives_in_one_order, gathers_ahead, messages_in_pairs
from support.virtual.play import Coupled, Deadlock, Speeds
from support.virtual.trace import MAIN, Alloc, Comm, Free, HostSync, Kernel, Message, Node, Trace, Wait
from trainsys.dryrun.swap import swapped

ALL = [*CASES, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]


AT_SCALE = Case(
    run(
        pp=16,
        dp_replicate=4,
        dp_shard=16,
        cp=2,
        tp=8,
        model={"n_layers": 16, "n_heads": 16, "n_kv_heads": 16, "d_model": 512},
        train={"dtype": "bf16", "global_batch": 128},
    ),
    (9001,),
)


@pytest.mark.parametrize("name", ALL)
def test_what_streams_share_is_in_order(name: str) -> None:
    for trace in traces(name):
        assert sum(isinstance(node, Comm) for node in trace.nodes) > 4
        assert hazards(trace.nodes) == []


@pytest.mark.parametrize("name", ALL)
def test_ranks_communicate_in_an_order_that_cannot_lock_up(name: str) -> None:
    ranks = traces(name)
    assert collectives_in_one_order(ranks) == []
    assert messages_in_pairs(ranks) == []
    for serial in (False, True):
        played = Coupled(ranks, serial=serial).play(Speeds(20e9))
        assert all(step.seconds > 0 for step in played.values())


@pytest.mark.parametrize("name", ALL)
def test_the_host_waits_for_nothing(name: str) -> None:
    """Rows are sent to experts once their number is known: a wait a mixture and micro-batch, and no other."""
    for trace in traces(name):
        syncs = host_syncs(trace)
        experts = [what for what in syncs if what.startswith("rows of experts")]
        assert [what for what in syncs if what not in experts] == []
        assert bool(experts) == name.startswith("ep")


def test_a_rank_of_16384_waits_for_nothing_either() -> None:
    """And speaks over few communicators."""
    assert world(AT_SCALE.cfg) == 16384
    (trace,) = apart(recorded, AT_SCALE)
    assert host_syncs(trace) == []
    assert 5 <= len(channels(trace)) <= 8
    assert sum(isinstance(node, Comm) for node in trace.nodes) > 20


def test_gathers_are_ahead() -> None:
    """All but that of the last block in backward, which nothing announces: only a host that is ahead hides it."""
    ahead, could = gathers_ahead(traces("fsdp")[0])
    assert could >= 5
    assert ahead == could - 1


def test_without_prefetch_gathers_are_not_ahead_in_forward() -> None:
    ahead, could = gathers_ahead(traces("no-prefetch")[0])
    with_prefetch, as_many = gathers_ahead(traces("fsdp")[0])
    assert could == as_many
    assert ahead <= with_prefetch - 2


# What the checks must find.


@pytest.mark.parametrize("name", ["fsdp", "hsdp", "replicas", "cp-ring", "pp-1f1b", "pp-sp-fsdp"])
def test_each_missing_wait_of_the_compute_stream_is_a_race(name: str) -> None:
    """But for those that tell it nothing; of several with nothing between, the last may stand for all."""
    nodes = without_needless_waits(traces(name)[0].nodes)
    assert hazards(nodes) == []
    groups = list(waits_of_main(nodes))
    assert len(groups) >= 2, "one a step at least"
    for group in groups:
        assert hazards(n for i, n in enumerate(nodes) if i not in group), f"nobody misses {group}"


def waits_of_main(nodes: Sequence[Node]) -> Iterator[set[int]]:
    """Places of the waits between one thing that the compute stream does and the next."""
    group: set[int] = set()
    for i, node in enumerate(nodes):
        if isinstance(node, Wait) and node.stream == MAIN:
            group.add(i)
        elif group and isinstance(node, Kernel | Comm | Alloc) and node.stream == MAIN:
            yield group
            group = set()


def test_a_block_freed_under_a_collective_is_a_race() -> None:
    """What a gather fills, freed right behind its launch."""
    nodes = list(traces("fsdp")[0].nodes)
    at = [i for i, n in enumerate(nodes) if isinstance(n, Comm) and n.op == "all_gather"][2]
    gather = nodes[at]
    assert isinstance(gather, Comm)
    freed = next(i for i in range(at, len(nodes)) if nodes[i] == Free(gather.writes[0]))
    nodes.insert(at + 1, nodes.pop(freed))
    assert any("its block was freed" in line for line in hazards(nodes))


def test_a_collective_out_of_order_on_one_rank_is_found() -> None:
    first, second = copy.deepcopy(traces("fsdp"))
    calls = [(i, n) for i, n in enumerate(second.nodes) if isinstance(n, Comm)]
    (i, one), (j, other) = next((a, b) for a, b in pairwise(calls) if a[1].op != b[1].op)
    second.nodes[i], second.nodes[j] = other, one
    assert len(collectives_in_one_order([first, second])) == 1


def test_messages_that_change_places_are_found() -> None:
    """Messages of one size, told apart only by what they carry."""
    first, second = copy.deepcopy(traces("pp-interleaved"))
    batches = [n for n in second.nodes if isinstance(n, Comm) and n.messages and n.messages[0].sends]
    a, b = next((a, b) for a, b in pairwise(batches) if a.messages[0].key != b.messages[0].key)
    a.messages, b.messages = b.messages, a.messages
    assert messages_in_pairs([first, second]) != []


def test_batches_in_crossed_order_lock_up() -> None:
    """Two ranks that each first send what the other receives second."""

    def batch(peer: int, sends: bool, key: str) -> Comm:
        return Comm(1, ("g", (0, 1)), "pp", "messages", (), 8, (), (), (Message(sends, peer, (key,), 8),))

    def trace(rank: int, *nodes: Node) -> Trace:
        return Trace(rank, list(nodes), [], 0)

    crossed = [
        trace(0, batch(1, True, "a"), batch(1, False, "b")),
        trace(1, batch(0, True, "b"), batch(0, False, "a")),
    ]
    with pytest.raises(Deadlock, match="rank 0 at pp"):
        Coupled(crossed)
    Coupled([crossed[0], trace(1, *reversed(crossed[1].nodes))])
    unsent = [crossed[0], trace(1, batch(0, False, "a"))]
    with pytest.raises(Deadlock, match="one end"):
        Coupled(unsent)


def _no_event_of_fsdp() -> AbstractContextManager[None]:
    from trainsys.parallel import fsdp_waits

    return swapped(fsdp_waits._Event, "wait", lambda *_: None)


def _no_wait_for_keys() -> AbstractContextManager[None]:
    from trainsys.comm.p2p import Transfer

    return swapped(Transfer, "_finish", lambda _: None)


def _no_wait_for_sums() -> AbstractContextManager[None]:
    from trainsys.parallel.replicate import ShardSums

    return swapped(ShardSums, "wait", lambda _: None)


def _no_wait_for_a_stage() -> AbstractContextManager[None]:
    from trainsys.parallel.pipeline.transport import Transport

    def take(transport: Transport, *key: Any) -> Any:
        return transport._arriving.pop(key)[0]

    return swapped(Transport, "take", take)


TWO = {"global_batch": 2}
# With cp alone, fsdp is the same process group and comes first.
FAULTS: dict[str, tuple[dict[str, Any], Callable[[], AbstractContextManager[None]], str]] = {
    "fsdp": ({"dp_shard": 2, "train": TWO}, _no_event_of_fsdp, "does not wait for fsdp all_gather"),
    "ring": ({"cp": 2, "train": TWO}, _no_wait_for_keys, "does not wait for fsdp messages"),
    "hsdp": (
        {"dp_replicate": 2, "dp_shard": 2},
        _no_wait_for_sums,
        "does not wait for dp_replicate all_reduce",
    ),
    "stage": ({"pp": 2, "train": TWO}, _no_wait_for_a_stage, "does not wait for pp messages"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wait_that_the_product_forgets_is_a_race(fault: str) -> None:
    layout, plant, line = FAULTS[fault]
    trace = apart(_with, plant, layout)
    found = hazards(trace.nodes)
    assert any(line in said for said in found), found


def _with(plant: Callable[[], AbstractContextManager[None]], layout: dict[str, Any]) -> Trace:
    with plant():
        return recorded(case(1 if "pp" in layout else 0, model={**MODEL, "n_layers": 2}, **layout))[0]


def test_a_value_that_is_read_back_is_found() -> None:
    (what,) = set(host_syncs(apart(_with, _item_in_the_norm, {"dp_shard": 2, "train": TWO})))
    assert what.startswith("item at ")


def _item_in_the_norm() -> AbstractContextManager[None]:
    from trainsys.engines import native

    clip_ = native.clip_

    def reading(grads: Any, norm: Any, limit: float) -> None:
        if norm.item() > 0:
            clip_(grads, norm, limit)

    return swapped(native, "clip_", reading)


def host_syncs(trace: Trace) -> list[str]:
    """What made the host wait in the second step."""
    return [node.what for node in trace.nodes[trace.second :] if isinstance(node, HostSync)]
