"""What all flavours that work block by block share: which blocks there are, and how they add up.

A block is a span of queries against a span of keys. Forward merges partial results by their log-sum-exp,
backward adds gradients. Both accumulate in fp32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from trainsys.context.balance import Shard, Span
from trainsys.ops.attention_kernels import Kernel, kernel_for
from trainsys.ops.attention_partial import Partial, wide
from trainsys.ops.attention_rule import Rule, Visible


@dataclass(frozen=True)
class Blocks:
    """Block attention between shards of one row; ``kernel`` None: the device's own."""

    kernel: Kernel | None = None

    def forward(
        self, partial: Partial, q: Tensor, k: Tensor, v: Tensor, q_at: Shard, k_at: Shard, rule: Rule
    ) -> None:
        """Merge the attention of the queries at ``q_at`` over the keys at ``k_at`` into ``partial``."""
        kernel = self.kernel or kernel_for(q)
        for rows, keys, sees in pairs(rule, q_at, k_at, whole=kernel.fixed_shapes):
            out, lse = kernel.forward(q[:, rows], k[:, keys], v[:, keys], sees)
            partial.merge(out, lse, rows)

    def backward(
        self,
        dq: Tensor,
        dkv: Tensor,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        q_at: Shard,
        k_at: Shard,
        rule: Rule,
    ) -> None:
        """Add gradients to ``dq`` (of q's shape) and ``dkv [2, ...]`` (of k's); out and lse are of all keys."""
        kernel = self.kernel or kernel_for(q)
        for rows, keys, sees in pairs(rule, q_at, k_at, whole=kernel.fixed_shapes):
            grads = kernel.backward(
                dout[:, rows], q[:, rows], k[:, keys], v[:, keys], out[:, rows], lse[..., rows], sees
            )
            dq[:, rows] += grads[0]
            dkv[0][:, keys] += grads[1]
            dkv[1][:, keys] += grads[2]


def pairs(
    rule: Rule, q_at: Shard, k_at: Shard, *, whole: bool = False
) -> Iterator[tuple[slice, slice, Visible]]:
    """What is visible of two shards: queries and keys by where they are held, and which keys each query sees.

    ``whole``: of each two spans all or nothing.
    """
    for qs in q_at:
        for ks in k_at:
            found = rule.block(_places(qs), _places(ks), whole=whole)
            if found is not None:
                queries, keys, sees = found
                yield _held(queries, qs), _held(keys, ks), sees


def _places(span: Span) -> range:
    return range(span.place, span.place + span.length)


def _held(places: range, span: Span) -> slice:
    shift = span.at - span.place
    return slice(places.start + shift, places.stop + shift)


@dataclass(frozen=True)
class Ring:
    """The members between which one flavour moves blocks: who I am, and what each holds of the row."""

    index: int
    shards: tuple[Shard, ...]
    hops: int
    """over how many neighbours a query can see back"""

    @property
    def size(self) -> int:
        return len(self.shards)

    @property
    def mine(self) -> Shard:
        return self.shards[self.index]

    def up(self, by: int = 1) -> int:
        """The member ``by`` places on, where later tokens are (in a contiguous cut)."""
        return (self.index + by) % self.size

    def down(self, by: int = 1) -> int:
        return (self.index - by) % self.size


def zeros(*like: Tensor) -> Tensor:
    """A wide accumulator for the gradients of tensors of one shape: ``[len(like), ...]``."""
    return torch.zeros((len(like), *like[0].shape), dtype=wide(like[0]), device=like[0].device)
