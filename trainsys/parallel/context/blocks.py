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
from trainsys.ops.attention import attention_mask
from trainsys.ops.attention_kernels import Kernel, Visible, kernel_for
from trainsys.ops.attention_partial import Partial, wide
from trainsys.ops.attention_seam import Rule
from trainsys.ops.host_copy import to_device


def visible(rule: Rule, q: Span, k: Span) -> Visible | None:
    """Which keys of span ``k`` the queries of span ``q`` see; None: none of them."""
    nearest = q.place - (k.place + k.length - 1)
    farthest = q.place + q.length - 1 - k.place
    if farthest < 0 or (rule.window is not None and nearest >= rule.window):
        return None
    if rule.docs is None and (rule.window is None or farthest < rule.window):
        if nearest >= 0:
            return "all"
        if (q.place, q.length) == (k.place, k.length):
            return "causal"
    device = None if rule.docs is None else rule.docs.device
    mask = attention_mask(
        q.length,
        k.length,
        window=rule.window,
        q_docs=None if rule.docs is None else rule.docs[:, q.place : q.place + q.length],
        k_docs=None if rule.docs is None else rule.docs[:, k.place : k.place + k.length],
        q_positions=torch.arange(q.place, q.place + q.length, device=device).unsqueeze(0),
        k_positions=torch.arange(k.place, k.place + k.length, device=device).unsqueeze(0),
    )
    assert mask is not None
    return mask


@dataclass(frozen=True)
class Blocks:
    """Block attention between shards of one row; ``kernel`` None: the device's own."""

    kernel: Kernel | None = None

    def forward(
        self, partial: Partial, q: Tensor, k: Tensor, v: Tensor, q_at: Shard, k_at: Shard, rule: Rule
    ) -> None:
        """Merge the attention of the queries at ``q_at`` over the keys at ``k_at`` into ``partial``."""
        kernel = self.kernel or kernel_for(q)
        for qs, ks, sees in pairs(rule, q_at, k_at, q.device):
            out, lse = kernel.forward(q[:, qs.local], k[:, ks.local], v[:, ks.local], sees)
            partial.merge(out, lse, qs.local)

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
        for qs, ks, sees in pairs(rule, q_at, k_at, q.device):
            rows, keys = qs.local, ks.local
            grads = kernel.backward(
                dout[:, rows], q[:, rows], k[:, keys], v[:, keys], out[:, rows], lse[..., rows], sees
            )
            dq[:, rows] += grads[0]
            dkv[0][:, keys] += grads[1]
            dkv[1][:, keys] += grads[2]


def pairs(rule: Rule, q_at: Shard, k_at: Shard, device: torch.device) -> Iterator[tuple[Span, Span, Visible]]:
    """The blocks of two shards in which anything is visible."""
    for qs in q_at:
        for ks in k_at:
            sees = visible(rule, qs, ks)
            if sees is not None:
                yield qs, ks, to_device(sees, device) if isinstance(sees, Tensor) else sees


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
