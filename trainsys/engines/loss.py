"""The loss of engines that run our own decoder."""

from __future__ import annotations

from torch import Tensor

from trainsys.config.run import RunConfig
from trainsys.models.decoder import Decoder
from trainsys.ops.chunked_loss import chunked_cross_entropy_sum
from trainsys.ops.loss import cross_entropy_sum
from trainsys.parallel.mesh import Mesh


def loss_sums(
    cfg: RunConfig, mesh: Mesh, out: Tensor, labels: Tensor, headed: Decoder | None
) -> tuple[Tensor, Tensor]:
    """(what is differentiated, the sum of nll) of logits ``out [B, S, V]``, or with ``loss_chunk`` of hidden states
    ``[B, S, D]``, which the head of ``headed`` makes logits of. Sums over the rank's tokens."""
    tp = mesh["tp"]
    # Over which ranks the vocabulary of the logits is split.
    group = tp if cfg.parallel.loss_parallel and tp.size > 1 else None
    if not cfg.train.loss_chunk:
        return cross_entropy_sum(out, labels, z_loss=cfg.optim.z_loss, group=group)
    assert headed is not None
    return chunked_cross_entropy_sum(
        out, headed.head_weight, labels, chunk=cfg.train.loss_chunk, z_loss=cfg.optim.z_loss, group=group
    )
