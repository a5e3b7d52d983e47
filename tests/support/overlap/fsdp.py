"""Gathers of the next block's parameters, beside this block's forward."""

from __future__ import annotations

import time

import torch
from torch import nn

from support.overlap.link import ATTEMPTS, Late
from trainsys.comm import ops
from trainsys.config.model import ModelConfig
from trainsys.config.run import FsdpConfig
from trainsys.layout import Layout
from trainsys.models.decoder import Decoder
from trainsys.models.init import init_weights
from trainsys.parallel.fsdp import apply_fsdp
from trainsys.parallel.mesh import Mesh

LAYERS = 6


def measure(on: bool, comm_s: float, compute_s: float) -> list[float]:
    """Waits for gathers, of ``comm_s`` each, in forwards of blocks of ``compute_s`` each."""
    cfg = ModelConfig(n_layers=LAYERS, d_model=8, n_heads=2, d_ff=16, vocab=16)
    mesh = Mesh(Layout(dp_shard=2), torch.device("cpu"))
    with torch.device("meta"):
        model = Decoder(cfg)
    for block in model.layers.values():
        block.attn.register_forward_pre_hook(lambda *_: time.sleep(compute_s))
    gather, waits = ops.all_gather_flat, []
    try:
        ops.all_gather_flat = lambda *a, **k: Late(gather(*a, **k), time.perf_counter() + comm_s)
        apply_fsdp(model, mesh, FsdpConfig(prefetch=1 if on else 0), torch.float32)
        model.to_empty(device="cpu")
        init_weights(model, cfg, 0)
        tokens = torch.zeros(1, 4, dtype=torch.int64)
        for _ in range(ATTEMPTS):
            mesh.ledger.reset()
            with torch.no_grad():
                model(tokens, torch.arange(4)[None])
            for unit in model.modules():
                if isinstance(unit, nn.Module) and hasattr(unit, "reshard"):
                    unit.reshard()
            traffic = mesh.ledger.traffic["fsdp", "all_gather"]
            assert traffic.calls == LAYERS + 1
            waits.append(traffic.blocked_s)
    finally:
        ops.all_gather_flat = gather
    return waits


def predict(on: bool, comm_s: float, compute_s: float) -> float:
    """The root's gather and the first block's have nothing before them to hide behind."""
    return 2 * comm_s + (LAYERS - 1) * max(0.0, comm_s - (compute_s if on else 0.0))
