"""What one layer keeps for backward, to the byte: Korthikanti et al. 2022's count, for this block.

Elements a token (D width, q = H·Dh, kv = K·Dh, F feed-forward width, H heads), without parallelism:

    none        4D + 2q + 2kv + 4F + H + 2     two norm inputs and outputs; q, k, v, out, lse; gate, up, their
                                               activation and product; one number a norm
    selective   the same less H                attention is run again: only its inputs stay (out feeds wo)
    full        D                              the block's input
    selective++ D, and out and lse (q + H) held by the block's own wrapper

Tensor parallelism divides all but the norms' inputs and outputs (4D + 2). Sequence parallelism divides the
norms' inputs too; their outputs stay whole, because the gathered sequence is what the products need and it is
not gathered a second time in backward.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from support.ranks import run_ranks
from support.saved import saved_bytes
from trainsys.config.model import ModelConfig
from trainsys.config.run import RecomputeConfig
from trainsys.layout import Layout
from trainsys.memory.recompute import KeptResults, apply_recompute
from trainsys.models.decoder import Decoder
from trainsys.models.init import init_weights
from trainsys.parallel.mesh import Mesh
from trainsys.parallel.tensor import apply_tensor_parallel

D, H, K, F, B, S = 64, 4, 2, 160, 2, 16
Q, KV = D, D * K // H


def _saved(layers: int, policy: str, sequence_parallel: bool) -> int:
    """Bytes of distinct storages that forward keeps, parameters left out."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    mesh = Mesh(Layout(tp=world), torch.device("cpu"))
    cfg = ModelConfig(n_layers=layers, d_model=D, n_heads=H, n_kv_heads=K, d_ff=F, vocab=40)
    with torch.device("meta"):
        model = Decoder(cfg)
    shards = apply_tensor_parallel(model, mesh["tp"], sequence_parallel=sequence_parallel, loss_parallel=True)
    apply_recompute(model, RecomputeConfig(policy=policy))  # type: ignore[arg-type]  # a test's string
    model.to_empty(device="cpu")
    init_weights(model, cfg, 0, shards)
    return saved_bytes(model, torch.zeros(B, S, dtype=torch.int64), torch.arange(S).expand(B, S))


def _layer(policy: str, sequence_parallel: bool = False) -> float:
    """Elements a token of the whole sequence that one more layer keeps on this rank."""
    return (_saved(3, policy, sequence_parallel) - _saved(2, policy, sequence_parallel)) / (4 * B * S)


def _expected(policy: str, tp: int, sequence_parallel: bool) -> float:
    split = 2 * Q + 2 * KV + 4 * F + (H if policy == "none" else 0)
    norms = (2 * D + 2) / tp + 2 * D if sequence_parallel else 4 * D + 2
    block_input = D / tp if sequence_parallel else D
    return block_input if policy in ("full", "selective++") else norms + split / tp


@pytest.mark.parametrize("policy", ["none", "selective", "full", "selective++"])
def test_one_process(policy: str) -> None:
    assert _layer(policy) == _expected(policy, 1, False)


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("policy", ["none", "selective", "full", "selective++"])
def test_tensor_and_sequence_parallel(policy: str, sequence_parallel: bool) -> None:
    for kept in run_ranks(2, _layer, policy, sequence_parallel):
        assert kept == _expected(policy, 2, sequence_parallel)


def test_selective_plus_plus_holds_out_and_lse_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[int] = []
    forward = KeptResults.forward

    def watched(self: KeptResults, *args: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = forward(self, *args)  # type: ignore[arg-type]
        held.append(out.numel() + lse.numel())
        return out, lse

    monkeypatch.setattr(KeptResults, "forward", watched)
    _saved(1, "selective++", False)
    assert held == [B * S * (Q + H)]
