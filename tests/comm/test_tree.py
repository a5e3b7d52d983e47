"""Object exchange beside training: right answers, few sockets, bounded traffic, and errors in place of hangs."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.distributed as dist

from support.ranks import run_ranks
from trainsys.checkpoint.ranks import Ranks
from trainsys.comm import tree as trees
from trainsys.comm.tree import FANOUT, Tree, children, parent, towards
from trainsys.comm.wire import LostPeer, Wire, own_address

WORLD = 16384


class CountedStore:
    """Counts what all ranks ask of it."""

    def __init__(self) -> None:
        self._real, self._lock = dist.HashStore(), threading.Lock()
        self.calls: Counter[str] = Counter()

    def __getattr__(self, name: str) -> Any:
        with self._lock:
            self.calls[name] += 1
        return getattr(self._real, name)


def on_threads(
    world: int, body: Callable[[Tree], Any], timeout_s: float = 20.0, fanout: int = 4, store: Any = None
) -> list[Any]:
    """``body`` on a tree of ``world`` ranks in this process: its result or its exception, by rank."""
    store = store or dist.HashStore()

    def rank(number: int) -> Any:
        wire = Wire(store, "test", number, timeout_s)
        try:
            tree = Tree(wire, world, fanout)
            try:
                return body(tree)
            finally:
                tree.close()
        except LostPeer as error:
            return error
        finally:
            wire.close()

    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(rank, range(world)))


def test_a_tree_of_16384_ranks_is_four_deep_and_holds_17_sockets_a_rank() -> None:
    seen: Counter[int] = Counter()
    for rank in range(WORLD):
        below = children(rank, WORLD)
        assert len(below) <= FANOUT
        seen.update(below)
        for child in below:
            assert parent(child) == rank
    assert seen == Counter(range(1, WORLD)), "every rank but the first is below one other"
    for rank in (1, 16, 17, 4095, WORLD - 1):
        hops, at = 0, 0
        while at != rank:
            at, hops = towards(at, rank), hops + 1
        assert hops <= 4


def test_gather_broadcast_and_scatter_agree_with_the_ranks_numbers() -> None:
    def body(tree: Tree) -> Any:
        mine = b"%d" % tree.rank * (tree.rank % 7)
        gathered = [bytes(x) for x in tree.gather(mine)]
        said = bytes(tree.broadcast(b"from 0" if tree.rank == 0 else b""))
        parts = [b"to %d" % r for r in range(37)] if tree.rank == 0 else ()
        return gathered, said, bytes(tree.scatter(parts)), bytes(tree.broadcast(b""))

    for rank, got in enumerate(on_threads(37, body)):
        gathered = [b"%d" % r * (r % 7) for r in range(37)] if rank == 0 else []
        assert got == (gathered, b"from 0", b"to %d" % rank, b"")


def test_bytes_of_a_gather_are_those_of_its_messages_and_the_store_is_asked_three_times_a_rank() -> None:
    def body(tree: Tree) -> int:
        tree.gather(bytes(100))
        return tree.sent_bytes

    store = CountedStore()
    sent = on_threads(64, body, fanout=8, store=store)
    below = Counter(dict.fromkeys(range(64), 1))
    for rank in range(63, 0, -1):
        below[parent(rank, 8)] += below[rank]
    record = 100 + trees._RECORD.size
    assert sent == [0, *(below[rank] * record for rank in range(1, 64))]
    assert store.calls == {"set": 64, "wait": 63, "get": 63}


def test_a_rank_that_ends_is_named_at_once() -> None:
    began = time.monotonic()

    def body(tree: Tree) -> None:
        tree.broadcast(b"")
        if tree.rank != 3:
            tree.gather(b"x")

    got = on_threads(5, body, timeout_s=30.0)
    assert isinstance(got[0], LostPeer)
    assert "rank 3 has ended" in str(got[0])
    assert time.monotonic() - began < 15.0


def test_a_rank_that_does_not_come_is_named_within_the_time_out() -> None:
    release = threading.Event()

    def body(tree: Tree) -> None:
        if tree.rank == 2:
            assert release.wait(30)
            return
        try:
            tree.gather(b"x")
        finally:
            if tree.rank == 0:
                release.set()

    got = on_threads(4, body, timeout_s=0.5)
    assert "no answer from rank 2 within 0.5 s" in str(got[0])


def test_ranks_that_do_different_things_are_told_apart() -> None:
    def body(tree: Tree) -> None:
        if tree.rank == 1:
            tree.gather(b"x")
        try:
            tree.broadcast(b"")
        finally:
            # A closed connection would be seen first.
            seen.set() if tree.rank else seen.wait(20)

    seen = threading.Event()
    got = on_threads(2, body, timeout_s=20.0)
    assert "rank 0 is at bcst 1 of the ranks' exchanges, this one at bcst 2" in str(got[1])


def test_a_rank_that_never_starts_is_named() -> None:
    wire = Wire(dist.HashStore(), "test", 1, 1.0)
    with pytest.raises(LostPeer, match="rank 0 has not started within 1 s"):
        wire.dial(0)
    wire.close()


def test_an_address_left_by_the_attempt_before_is_read_again() -> None:
    store = dist.HashStore()
    gone = Wire(store, "test", 0, 5.0)
    gone.close()
    caller = Wire(store, "test", 1, 20.0)
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(caller.dial, 0)
        time.sleep(0.2)
        again = Wire(store, "test", 0, 20.0)
        peer, other = again.answer(1), call.result()
        other.send(b"test", 1, b"here")
        assert bytes(peer.receive(b"test", 1)) == b"here"
    for each in (peer, other, caller, again):
        each.close()


def test_who_does_not_know_the_token_is_not_listened_to() -> None:
    import socket

    store = dist.HashStore()
    wire = Wire(store, "test", 0, 0.5)
    port = int(store.get("trainsys/test/0").decode().split()[1])
    with socket.create_connection(("127.0.0.1", port)) as stranger:
        stranger.sendall(bytes(16) + (1).to_bytes(4, "big"))
        with pytest.raises(LostPeer, match="rank 1 has not called"):
            wire.answer(1)
        stranger.settimeout(5)
        assert stranger.recv(1) == b""
    wire.close()


def test_an_address_is_one_that_others_can_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    assert own_address() == "localhost", "on the head's own host others come the way they come to the head"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth9")
    monkeypatch.setattr("trainsys.comm.wire.interfaces", lambda: {"eth9": ["10.1.2.3", "fe80::1"]})
    assert own_address() == "10.1.2.3"


def _descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def exchange_all() -> dict[str, Any]:
    made: list[Any] = []
    real = dist.new_group
    dist.new_group = lambda *a, **k: made.append(a) or real(*a, **k)  # type: ignore[assignment]
    before = _descriptors()
    ranks = Ranks()
    beside = ranks.beside()
    out = {
        "first": ranks.from_first(f"said by {ranks.rank}"),
        "gathered": ranks.to_first({"rank": ranks.rank, "long": "name " * 5000}),
        "all": beside.to_all(ranks.rank),
        "each": ranks.each([r * r for r in range(ranks.world)]),
        "opened": _descriptors() - before,
    }
    ranks.barrier()
    other = (ranks.rank + ranks.world // 2) % ranks.world
    x = torch.arange(1 << 18, dtype=torch.int32) + ranks.rank
    y = torch.empty_like(x)
    for turn in (0, 1):  # the lower half calls first
        if (ranks.rank < other) == (turn == 0):
            with ranks.calling(other) as peer:
                peer.send(b"test", 0, memoryview(x.view(torch.uint8).numpy()))
        else:
            with ranks.answering(other) as peer:
                peer.receive_into(b"test", 0, memoryview(y.view(torch.uint8).numpy()))
    out["bulk"] = bool((y == torch.arange(1 << 18, dtype=torch.int32) + other).all())
    beside.close()
    ranks.close()
    dist.new_group = real
    out["left"], out["groups"] = _descriptors() - before, len(made)
    return out


def test_on_gloo_the_ranks_agree_and_no_group_is_made() -> None:
    world = 8
    for rank, got in enumerate(run_ranks(world, exchange_all)):
        assert got["first"] == "said by 0"
        assert [x["rank"] for x in got["gathered"]] == (list(range(world)) if rank == 0 else [])
        assert got["all"] == list(range(world))
        assert got["each"] == rank * rank
        assert got["bulk"]
        assert got["groups"] == 0
        # A listener, and connections with the rank above and those below; twice, for there are two exchanges.
        assert got["opened"] == 2 * (1 + (rank > 0) + len(children(rank, world)))
        assert got["left"] == 0
