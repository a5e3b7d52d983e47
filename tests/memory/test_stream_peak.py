"""The most that exists at once in a step of long rows: what recomputation alone leaves, and what streaming does."""

from __future__ import annotations

from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trainsys.config.model import ModelConfig
from trainsys.config.run import RecomputeConfig
from trainsys.memory.recompute import apply_recompute
from trainsys.models.decoder import Decoder
from trainsys.models.init import init_weights

D, H, K, F, S, PIECE = 32, 8, 2, 192, 256, 32
STREAMS = {"stream_ffn": PIECE, "stream_attention": PIECE}


class Peak(TorchDispatchMode):
    """Bytes of the storages that operations make, those of ``known`` left out, and the most of them alive at once."""

    def __init__(self, known: list[torch.Tensor]) -> None:
        super().__init__()
        self._known = {x.untyped_storage().data_ptr() for x in known}
        self._alive: dict[StorageWeakRef, int] = {}
        self._total = 0
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self._see(x.untyped_storage())
        if self._total > self.bytes:  # unless some are gone
            self._alive = {ref: n for ref, n in self._alive.items() if not ref.expired()}
            self._total = sum(self._alive.values())
            self.bytes = max(self.bytes, self._total)
        return out

    def _see(self, storage: torch.UntypedStorage) -> None:
        ref = StorageWeakRef(storage)
        if ref not in self._alive and storage.data_ptr() not in self._known:
            self._alive[ref] = storage.nbytes()
            self._total += storage.nbytes()


def _peak(layers: int, **recompute: Any) -> float:
    """Elements a token at the peak of one forward and backward; gradients of parameters are there before."""
    cfg = ModelConfig(n_layers=layers, d_model=D, n_heads=H, n_kv_heads=K, d_ff=F, vocab=8, max_seq_len=S)
    with torch.device("meta"):
        model = Decoder(cfg)
    apply_recompute(model, RecomputeConfig(**recompute))
    model.to_empty(device="cpu")
    init_weights(model, cfg, 0)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    tokens, positions = torch.zeros(1, S, dtype=torch.int64), torch.arange(S)[None]
    held = [x for p in model.parameters() for x in (p.detach(), p.grad) if x is not None]
    with Peak(held) as peak:
        model(tokens, positions).sum().backward()
    return peak.bytes / (4 * S)


def test_streaming_takes_what_a_layer_needs_while_it_is_run_again() -> None:
    none, full = _peak(3), _peak(3, policy="full")
    ffn, both = _peak(3, policy="full", stream_ffn=PIECE), _peak(3, policy="full", **STREAMS)
    # Of a layer that is run again whole: four activations of the feed-forward's width, and their gradients.
    assert full - ffn > 4 * F
    # Queries, their gradients, output: attention's.
    assert ffn - both > 2 * D
    assert both < full / 2 < none / 4


def test_what_one_layer_more_adds() -> None:
    """Recomputed: its input. Streamed only: inputs and outputs of its norms (see test_saved_bytes)."""
    for policy, more in (("full", D), ("none", 4 * D + 2)):
        assert _peak(3, policy=policy, **STREAMS) - _peak(2, policy=policy, **STREAMS) == more
