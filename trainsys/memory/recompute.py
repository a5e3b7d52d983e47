"""Activation recomputation: what backward recomputes instead of keeping.

``selective`` recomputes the attention core (Korthikanti et al. 2022, section 5), ``full`` each block from
its input, ``every_n`` each n-th block in full, ``selective++`` each block but its attention, whose output and
log-sum-exp are kept so that attention runs forward once (LoongTrain's Selective Checkpoint++, Gu et al. 2024).
Parallel collectives inside a recomputed region run again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from types import MethodType
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trainsys.config.run import RecomputeConfig
from trainsys.flops import layer_is_recomputed
from trainsys.memory.stream import stream_tokens
from trainsys.memory.stream_attention import stream_queries
from trainsys.models.attention import SeamAttention
from trainsys.models.decoder import Decoder
from trainsys.ops.attention_rule import Rule
from trainsys.ops.attention_seam import Method, WholeRows


def apply_recompute(model: Decoder, cfg: RecomputeConfig) -> None:
    """Make the blocks of ``model`` recompute as ``cfg`` says."""
    for name, block in model.layers.items():
        if cfg.stream_ffn:
            stream_tokens(block.ffn, cfg.stream_ffn)
        if cfg.stream_attention:
            stream_queries(block.attn, cfg.stream_attention)
        if layer_is_recomputed(cfg, int(name)):
            _recompute(block)
        elif cfg.policy == "selective":
            _recompute(block.attn.core)
        elif cfg.policy == "selective++":
            core = block.attn.core
            if not isinstance(core, SeamAttention):
                block.attn.core = core = SeamAttention(core.window, WholeRows())
            kept = KeptResults(core.method)
            core.method = kept
            _recompute(block, kept)


def _recompute(module: nn.Module, kept: KeptResults | None = None) -> None:
    # Replaces `forward` itself, not the module: names stay, and hooks around it (FSDP's gather) run once.
    options = {} if kept is None else {"context_fn": kept.passes}
    once = module.forward
    # A method of the module, and not a `partial`: Dynamo tells two of those apart, compiles a block of each layer anew,
    # and gives up after 8.
    module.forward = MethodType(_checkpointed, module)
    module._once, module._again = once, options


def _checkpointed(module: Any, *args: Any, **kwargs: Any) -> Any:
    # Nothing in a block draws random numbers, so no generator state has to be kept.
    return checkpoint(
        module._once, *args, use_reentrant=False, preserve_rng_state=False, **module._again, **kwargs
    )


class KeptResults:
    """An attention method whose results of a first pass are handed out again in the second.

    Each call of the checkpointed block has a pair of passes of its own, so micro-batches in flight at once, as
    in a pipeline, do not meet.
    """

    def __init__(self, method: Method) -> None:
        self._method = method
        self._pass: list[tuple[Tensor, Tensor]] | None = None
        self._again = False

    def forward(self, q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
        if self._pass is None:
            return self._method.forward(q, k, v, rule)
        if self._again:
            # Fresh tensor objects: the autograd function that returns them marks its outputs as its own.
            out, lse = self._pass.pop()
            return out.view_as(out), lse.view_as(lse)
        out, lse = self._method.forward(q, k, v, rule)
        self._pass.append((out.detach(), lse.detach()))
        return out, lse

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rule: Rule
    ) -> tuple[Tensor, Tensor, Tensor]:
        return self._method.backward(dout, q, k, v, out, lse, rule)

    def passes(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """The contexts of the first and of the second run of one block on one micro-batch."""
        results: list[tuple[Tensor, Tensor]] = []
        return self._during(results, again=False), self._during(results, again=True)

    @contextmanager
    def _during(self, results: list[tuple[Tensor, Tensor]], again: bool) -> Iterator[None]:
        before = self._pass, self._again
        self._pass, self._again = results, again
        try:
            yield
        finally:
            self._pass, self._again = before
