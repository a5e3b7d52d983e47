"""Does communication hide behind computation? Real flavours and real ranks, but work that sleeps and a slow link.

A link takes one message after the other, each for bytes / speed; a message's wait ends no earlier than that.
What a flavour then waits, summed over its waits, is what it failed to hide.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from support.ranks import run_ranks
from trainsys.comm.group import AxisGroup
from trainsys.comm.p2p import Link, Message, Transfer
from trainsys.context.balance import shard
from trainsys.layout import Layout
from trainsys.ops.attention_kernels import Visible
from trainsys.ops.attention_seam import Method, Rule
from trainsys.parallel.context.blocks import Blocks, Ring
from trainsys.parallel.context.pass_q import RingPassQ
from trainsys.parallel.context.ring import RingPassKV
from trainsys.parallel.context.token_ring import TokenRing
from trainsys.parallel.mesh import Mesh

WORLD, HOPS, SEQ, HEADS, HEAD_DIM = 4, 3, 64, 2, 8
ATTEMPTS = 5
"""A sleeping rank may wake late on a busy machine; one undisturbed attempt is enough."""


class SlowLink(Link):
    """``message_s`` for what goes to one peer at a time. One lane a name: on a duplex link what goes up the ring
    does not slow what goes down."""

    def __init__(self, group: AxisGroup, message_s: float) -> None:
        super().__init__(group)
        self.message_s = message_s
        self.free_at: dict[str, float] = {}

    def exchange(self, op: str, sends: Sequence[Message], receives: Sequence[Message]) -> Transfer:
        free_at = max(time.perf_counter(), self.free_at.get(op, 0.0))
        done = free_at + self.message_s * len({to for _, to in sends})
        self.free_at[op] = done
        works: list[dist.Work] = self._start(op, sends, receives)
        return _SlowTransfer(self.group, op, works, sends, done)


class _SlowTransfer(Transfer):
    def __init__(
        self, group: AxisGroup, op: str, works: list[dist.Work], sends: Sequence[Message], done: float
    ) -> None:
        super().__init__(group, op, works, sends)
        self._done = done

    def _finish(self) -> None:
        super()._finish()
        time.sleep(max(0.0, self._done - time.perf_counter()))


@dataclass
class SleepingKernel:
    """A zigzag has two visible blocks in a hop, three in the first, where two of them are half hidden."""

    block_s: float

    def forward(self, q: Tensor, k: Tensor, v: Tensor, visible: Visible) -> tuple[Tensor, Tensor]:
        time.sleep(self.block_s / 2 if visible == "causal" else self.block_s)
        return torch.zeros_like(q), torch.zeros(q.shape[0], q.shape[2], q.shape[1])

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, visible: Visible
    ) -> tuple[Tensor, Tensor, Tensor]:
        time.sleep(self.block_s / 2 if visible == "causal" else self.block_s)
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)


FLAVOURS: dict[str, type[RingPassKV | RingPassQ | TokenRing]] = {
    "ring": RingPassKV,
    "pass_q": RingPassQ,
    "token_ring": TokenRing,
}


def _waits(flavour: str, compute_s: float, comm_s: float, way: str) -> list[float]:
    """Seconds spent waiting in each attempt, on this rank."""
    mesh = Mesh(Layout(cp=WORLD), torch.device("cpu"))
    cp, ledger = mesh["cp"], mesh.ledger
    ring = Ring(cp.index, tuple(shard(SEQ, WORLD, i, "zigzag") for i in range(WORLD)), HOPS)
    q, k, v = torch.zeros(3, 1, SEQ // WORLD, HEADS, HEAD_DIM)
    lse = torch.zeros(1, HEADS, SEQ // WORLD)
    waits = []
    for _ in range(ATTEMPTS):
        method: Method = FLAVOURS[flavour](ring, SlowLink(cp, comm_s), Blocks(SleepingKernel(compute_s / 2)))
        dist.barrier()
        ledger.reset()
        if way == "forward":
            method.forward(q, k, v, Rule())
        else:
            method.backward(q, q, k, v, q, lse, Rule())
        waits.append(sum(t.blocked_s for t in ledger.traffic.values()))
    return waits


def _exposed(flavour: str, compute_s: float, comm_s: float, expected: float, way: str = "forward") -> float:
    """The wait of the average rank, in the attempt that came nearest to what is expected."""
    by_rank = run_ranks(WORLD, _waits, flavour, compute_s, comm_s, way)
    return min((sum(a) / WORLD for a in zip(*by_rank, strict=True)), key=lambda wait: abs(wait - expected))


@pytest.mark.parametrize(("compute_s", "comm_s"), [(0.04, 0.10), (0.06, 0.03)])
def test_ring_exposes_only_what_computation_does_not_cover(compute_s: float, comm_s: float) -> None:
    """Of the n - 1 transfers each hides behind one hop, and zigzag makes all hops equally long."""
    expected = HOPS * max(0.0, comm_s - compute_s)
    exposed = _exposed("ring", compute_s, comm_s, expected)
    # Within 10%; of all communication where everything hides and there is nothing to take a tenth of.
    assert abs(exposed - expected) < 0.1 * (expected or HOPS * comm_s), (exposed, expected)


def test_ring_hides_both_streams_of_backward() -> None:
    """Keys and, one hop behind, their gradients; only the last gradients' way home has nothing to hide behind."""
    compute_s, comm_s = 0.06, 0.03
    exposed = _exposed("ring", compute_s, comm_s, comm_s, "backward")
    assert abs(exposed - comm_s) < 0.1 * (2 * HOPS + 1) * comm_s


def test_token_ring_sends_results_home_behind_computation_and_pass_q_at_the_end() -> None:
    """TokenRing waits for the last result alone, pass-Q for all of them."""
    compute_s, comm_s = 0.06, 0.03
    assert abs(_exposed("token_ring", compute_s, comm_s, comm_s) - comm_s) < 0.3 * comm_s
    at_the_end = HOPS * comm_s
    assert abs(_exposed("pass_q", compute_s, comm_s, at_the_end) - at_the_end) < 0.2 * at_the_end
