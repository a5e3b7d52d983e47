"""Gradients and optimizer states sharded over replicas too: the parameters' degree stays, theirs grows.

ZeRO (Rajbhandari et al. 2020) where parameters are copies: stage 1, or 2 with ``each_backward``. Where they are
sharded over dp_shard × cp, the optimizer is sharded over dp_replicate × dp_shard × cp: three degrees of the mesh
for three kinds of state, as in InternEvo (Chen et al. 2024). A replica owns one piece of each parameter: gradients are
reduce-scattered, the piece is updated, updated pieces are gathered. Without padding that sends the bytes of the
all-reduce it replaces.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainsys.comm import ops
from trainsys.comm.group import AxisGroup
from trainsys.comm.ops import nbytes
from trainsys.models.shards import ShardSpec
from trainsys.optim.local import Owned, local, local_grad
from trainsys.parallel.replicate import in_buckets

IN_FLIGHT = 2
"""Buckets whose messages exist at a time: each is as large as the gradients that it is made of."""


@dataclass(eq=False)
class _Slot:
    """A parameter's place in the message of its bucket: ``numel`` elements a replica, padded for the last ones."""

    param: nn.Parameter
    dim: int
    rows: int
    """of ``dim``, a replica"""
    numel: int
    start: int

    @classmethod
    def of(cls, param: nn.Parameter, replicas: int, start: int) -> _Slot:
        shape = local(param).shape
        # The first dim that can be cut at all: a piece then lies in one stretch of memory.
        dim = next((d for d, n in enumerate(shape) if n != 1), 0)
        rows = -(-shape[dim] // replicas)
        return cls(param, dim, rows, rows * (shape[dim + 1 :].numel()), start)

    def bounds(self, replica: int) -> tuple[int, int]:
        n = local(self.param).shape[self.dim]
        return min(replica * self.rows, n), min((replica + 1) * self.rows, n)

    def piece(self, x: Tensor, replica: int) -> Tensor:
        """The replica's part of ``x``, of the shape of what this rank holds of the parameter."""
        start, stop = self.bounds(replica)
        return x.narrow(self.dim, start, stop - start)

    def blocks(self, x: Tensor, message: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Pairs of views, of ``x`` and of a ``message [replicas, ...]``, that hold the same elements."""
        flat, mine = x.view(-1), message[:, self.start : self.start + self.numel]
        if not self.numel:
            return []
        whole, rest = divmod(flat.numel(), self.numel)
        pairs = [(flat[: whole * self.numel].view(whole, self.numel), mine[:whole])]
        if rest:
            pairs.append((flat[whole * self.numel :], mine[whole, :rest]))
        return pairs


@dataclass(eq=False)
class _Bucket:
    slots: list[_Slot]
    numel: int
    """of one replica's pieces"""
    missing: int
    """gradients that this backward has not made yet"""
    sent: bool = False
    """since this backward began"""
    work: dist.Work | None = None
    arriving: Tensor | None = None
    sums: Tensor | None = None
    held: list[Tensor] = field(default_factory=list)
    """what is being sent"""


class OwnedPiece(Owned):
    """One replica's piece of a parameter; its gradient lies in a bucket."""

    def __init__(
        self, param: nn.Parameter, place: ShardSpec, copies: int, bucket: _Bucket, slot: _Slot, index: int
    ) -> None:
        start, stop = slot.bounds(index)
        super().__init__(param, place.narrow(slot.dim, start, stop), copies)
        self._bucket, self._slot, self._index = bucket, slot, index

    @property
    def weight(self) -> Tensor:
        return self._slot.piece(local(self.param), self._index)

    @property
    def grad(self) -> Tensor | None:
        if self._bucket.sums is None:
            return None
        shape = self.weight.shape
        return self._bucket.sums[self._slot.start : self._slot.start + shape.numel()].view(shape)


class ReplicaShards:
    """Has the interface of :class:`trainsys.parallel.replicate.GradientBuckets`, for any parameters, FSDP's too.

    A gradient exists until its bucket has been sent; from then on there is this replica's piece of it.
    ``each_backward``: that is after every micro-batch, not only after the last.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        group: AxisGroup,
        bucket_mb: float,
        *,
        overlap: bool = True,
        each_backward: bool = False,
    ) -> None:
        self.group, self.overlap, self.each_backward = group, overlap, each_backward
        self._sync, self._began = True, False
        self.held: set[nn.Parameter] = set()
        """whose gradients live here: none, parameters have theirs until they are sent"""
        self.buckets: list[_Bucket] = []
        self._flying: deque[_Bucket] = deque()
        self._at: dict[nn.Parameter, tuple[_Bucket, _Slot]] = {}
        for some in in_buckets(params, bucket_mb):
            slots: list[_Slot] = []
            for p in some:
                slots.append(_Slot.of(p, group.size, sum(s.numel for s in slots)))
            bucket = _Bucket(slots, sum(s.numel for s in slots), len(slots))
            self.buckets.append(bucket)
            for slot in slots:
                self._at[slot.param] = bucket, slot
                slot.param.register_post_accumulate_grad_hook(lambda _, bucket=bucket: self._ready(bucket))

    def piece(self, param: nn.Parameter, place: ShardSpec, copies: int) -> OwnedPiece:
        """This replica's, of what this rank holds; ``copies``: ranks that hold the same, replicas among them."""
        g = self.group
        return OwnedPiece(param, place, copies // g.size, *self._at[param], g.index)

    @property
    def sync(self) -> bool:
        return self._sync

    @sync.setter
    def sync(self, on: bool) -> None:
        """Before a backward: whether its gradients are sent."""
        if self._began and self.each_backward:
            self.start()
        self._sync, self._began = on or self.each_backward, True
        self._begin()

    def start(self) -> None:
        """Start to send whatever is not yet under way. A parameter that got no gradient counts as zero."""
        for bucket in self.buckets:
            if not bucket.sent:
                self._launch(bucket)

    def wait(self) -> None:
        """After the last backward: block until this replica has the sums of its pieces."""
        self.start()
        for bucket in self.buckets:
            self._land(bucket)
        self._began = False
        self._begin()

    def zero(self) -> None:
        for bucket in self.buckets:
            bucket.sums = None

    def share(self) -> None:
        """Send the updated pieces to the other replicas, one bucket ahead of the one that is unpacked."""
        coming = [self._gather(b) for b in self.buckets[:1]]
        for i, bucket in enumerate(self.buckets):
            coming += [self._gather(b) for b in self.buckets[i + 1 : i + 2]]
            mine, everyones, work = coming.pop(0)
            g = self.group
            with g.ledger.span(g.axis, "all_gather", nbytes(mine) * (g.size - 1)):
                work.wait()
            for slot in bucket.slots:
                for weight, theirs in slot.blocks(local(slot.param), everyones):
                    weight.copy_(theirs)

    def _begin(self) -> None:
        for bucket in self.buckets:
            bucket.sent, bucket.missing = False, len(bucket.slots)

    def _ready(self, bucket: _Bucket) -> None:
        if not self._sync:
            return
        bucket.missing -= 1
        if bucket.missing == 0 and self.overlap:
            self._launch(bucket)

    def _launch(self, bucket: _Bucket) -> None:
        self._land(bucket)
        first = local(bucket.slots[0].param)
        message = first.new_zeros(self.group.size, bucket.numel)
        for slot in bucket.slots:
            grad = local_grad(slot.param)
            if grad is not None:
                for of_grad, place in slot.blocks(grad.contiguous(), message):
                    place.copy_(of_grad)
            slot.param.grad = None
        bucket.arriving = first.new_empty(bucket.numel)
        bucket.held = [message]
        bucket.work = ops.reduce_scatter_flat(
            bucket.arriving, message.view(-1), group=self.group.group, async_op=True
        )
        bucket.sent = True
        self._flying.append(bucket)
        if len(self._flying) > IN_FLIGHT:
            self._land(self._flying[0])

    def _land(self, bucket: _Bucket) -> None:
        if bucket.work is None:
            return
        self._flying.remove(bucket)
        g, arriving = self.group, bucket.arriving
        assert arriving is not None
        with g.ledger.span(g.axis, "reduce_scatter", nbytes(arriving) * (g.size - 1)):
            bucket.work.wait()
        bucket.sums = arriving if bucket.sums is None else bucket.sums.add_(arriving)
        bucket.work, bucket.arriving, bucket.held = None, None, []

    def _gather(self, bucket: _Bucket) -> tuple[Tensor, Tensor, dist.Work]:
        g = self.group
        mine = torch.zeros(bucket.numel, dtype=torch.float32, device=local(bucket.slots[0].param).device)
        for slot in bucket.slots:
            piece = slot.piece(local(slot.param), g.index)
            mine[slot.start : slot.start + piece.numel()] = piece.reshape(-1)
        everyones = mine.new_empty(g.size, bucket.numel)
        work = ops.all_gather_flat(everyones.view(-1), mine, group=g.group, async_op=True)
        return mine, everyones, work
