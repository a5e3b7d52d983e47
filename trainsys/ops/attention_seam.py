"""The one place through which a model's attention runs: an output, a log-sum-exp, and an own backward.

A :class:`Method` is how attention over a row is computed: here by one kernel call, under context
parallelism by a flavour that moves keys, queries or heads. ``attend`` makes it differentiable and keeps
q, k, v, out and lse for backward: no scores. Whoever wraps a method (to keep its results through
a recomputation, to count its calls) serves every flavour.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from trainsys.ops.attention_kernels import Kernel, kernel_for
from trainsys.ops.attention_rule import Rule, Visible


class Method(Protocol):
    """Shapes as in :mod:`trainsys.ops.attention_kernels`; S and T are what this rank holds."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> tuple[Tensor, Tensor]: ...

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rule: Rule
    ) -> tuple[Tensor, Tensor, Tensor]: ...


class WholeRows:
    """Every token of the row is here: one kernel call."""

    def __init__(self, kernel: Kernel | None = None) -> None:
        self.kernel = kernel

    def forward(self, q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
        return (self.kernel or kernel_for(q)).forward(q, k, v, _visible(q, rule))

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rule: Rule
    ) -> tuple[Tensor, Tensor, Tensor]:
        return (self.kernel or kernel_for(q)).backward(dout, q, k, v, out, lse, _visible(q, rule))


def _visible(q: Tensor, rule: Rule) -> Visible:
    row = range(q.shape[1])
    found = rule.block(row, row)
    assert found is not None, "every token sees itself"
    return found[2]


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, method: Method, rule: Rule
    ) -> tuple[Tensor, Tensor]:
        out, lse = method.forward(q, k, v, rule)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.method, ctx.rule = method, rule
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return (*ctx.method.backward(dout, *ctx.saved_tensors, ctx.rule), None, None)


@torch.compiler.disable
def attend(
    q: Tensor, k: Tensor, v: Tensor, method: Method, rule: Rule | None = None
) -> tuple[Tensor, Tensor]:
    """Causal attention ``out [B, S, H, Dh]`` and ``lse [B, H, S]``, which carries no gradient."""
    return _Attend.apply(q, k, v, method, rule or Rule())
