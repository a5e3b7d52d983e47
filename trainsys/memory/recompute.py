"""Activation recomputation: what backward recomputes instead of keeping.

``selective`` recomputes the attention core (Korthikanti et al. 2022, section 5), ``full`` each block from
its input, ``every_n`` each n-th block in full. Parallel collectives inside a recomputed region run again.
"""

from __future__ import annotations

from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from trainsys.config.run import RecomputeConfig
from trainsys.flops import layer_is_recomputed
from trainsys.models.decoder import Decoder


def _recompute(module: nn.Module) -> None:
    # Replaces `forward` itself, not the module: names stay, and hooks around it (FSDP's gather) run once.
    # Nothing in a block draws random numbers, so no generator state has to be kept.
    module.forward = partial(  # type: ignore[method-assign]  # deliberate: see above
        checkpoint, module.forward, use_reentrant=False, preserve_rng_state=False
    )


def apply_recompute(model: Decoder, cfg: RecomputeConfig) -> None:
    """Make the blocks of ``model`` recompute as ``cfg`` says."""
    for name, block in model.layers.items():
        if layer_is_recomputed(cfg, int(name)):
            _recompute(block)
        elif cfg.policy == "selective":
            _recompute(block.attn.core)
