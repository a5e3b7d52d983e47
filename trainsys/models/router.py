"""Which experts a token goes to, how much each counts, and what keeps their load even.

Everything here is a function of whole rows of the global batch and of nothing else: the auxiliary loss and
the capacity are defined a row at a time, so neither the micro-batch nor the layout changes them.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainsys.config.model import MoEConfig

_TINY = 1e-20


class Routing(NamedTuple):
    """What the router decided for ``[B, S]`` tokens."""

    choices: Tensor
    """``[B, S, k] int64``, the experts of each token, best first"""
    gates: Tensor
    """``[B, S, k]``, fp32 or wider: what each expert's output is multiplied by"""
    kept: Tensor | None
    """``[B, S, k] bool``: within its expert's capacity; None: all are"""


class WholeRows:
    """The rows that statistics need, where this rank holds whole ones. Context parallelism replaces it."""

    def gather(self, choices: Tensor) -> Tensor:
        """``[B, s, k]`` of the tokens held here -> ``[B, S, k]`` of the whole row, in order of position."""
        return choices

    def own(self, full: Tensor) -> Tensor:
        """``[B, S, ...]`` -> the part of the tokens held here."""
        return full


class Router(nn.Module):
    """Token-choice routing: each token takes its ``top_k`` best experts (Shazeer et al. 2017, section 2.1).

    Scores are fp32: softmax (Mixtral, Qwen3) or sigmoid (DeepSeek-V3) of ``weight [E, D] x``.

    - ``balance: aux_loss``: for each row, E sum_i f_i P_i with f_i the share of the row's choices that fell on
      expert i and P_i the mean of its normalised score (Fedus et al. 2022, Switch, eq. 4; a row at a time as in
      DeepSeek-V3, eq. 17-20). Its gradient is added in backward, times ``aux_loss_coef * row_share``.
    - ``balance: bias``: a bias that only takes part in choosing (Wang et al. 2024, loss-free balancing), held in
      ``expert_bias [E]`` and moved after each step by whoever sees the load of all ranks.
    """

    expert_bias: Tensor | None
    load: Tensor

    def __init__(self, d_model: int, cfg: MoEConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.weight = nn.Parameter(torch.empty(cfg.n_experts, d_model))
        self.rows = WholeRows()
        self.row_share = 1.0
        """what one row's auxiliary loss counts for; 1 / global batch makes it a mean over rows"""
        self.register_buffer("expert_bias", torch.zeros(cfg.n_experts) if cfg.balance == "bias" else None)
        # Choices of each expert, and last those beyond its capacity, since somebody zeroed it.
        self.register_buffer("load", torch.zeros(cfg.n_experts + 1, dtype=torch.int64), persistent=False)

    def forward(self, x: Tensor) -> Routing:
        """``x [B, S, D]``."""
        cfg = self.cfg
        wide = torch.promote_types(x.dtype, torch.float32)
        # Rounded to x's dtype first, as FSDP gathers it: so that no layout routes otherwise.
        logits = F.linear(x.to(wide), self.weight.to(x.dtype).to(wide))
        scores = logits.softmax(-1) if cfg.score == "softmax" else logits.sigmoid()
        choices = self._choose(scores.detach())
        gates = scores.gather(-1, choices)
        if cfg.norm_topk:
            gates = gates / (gates.sum(-1, keepdim=True) + _TINY)
        if cfg.route_scale != 1.0:
            gates = gates * cfg.route_scale
        aux_scale = cfg.aux_loss_coef * self.row_share if cfg.balance == "aux_loss" else 0.0
        kept = aux = None
        if aux_scale or cfg.capacity_factor is not None:
            full = self.rows.gather(choices)
            if cfg.capacity_factor is not None:
                kept = self.rows.own(within_capacity(full, cfg.n_experts, cfg.capacity_factor))
            if aux_scale:
                aux = _row_losses(scores, full, cfg).sum()
        load = _load(choices, kept, cfg.n_experts)
        return Routing(choices, _InBackward.apply(gates, aux, aux_scale, load, self.load), kept)

    def _choose(self, scores: Tensor) -> Tensor:
        """``[B, S, k]``, from groups of experts first where there are several (DeepSeek-V3, node-limited routing)."""
        cfg = self.cfg
        if self.expert_bias is not None:
            scores = scores + self.expert_bias
        if cfg.n_groups > 1:
            grouped = scores.unflatten(-1, (cfg.n_groups, -1))
            best = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(-1)
            chosen = best.topk(cfg.top_groups, dim=-1).indices
            out = torch.ones_like(best, dtype=torch.bool).scatter_(-1, chosen, False)
            scores = grouped.masked_fill(out.unsqueeze(-1), -math.inf).flatten(-2)
        return scores.topk(cfg.top_k, dim=-1).indices


def expert_capacity(tokens: int, cfg_top_k: int, n_experts: int, factor: float) -> int:
    """Rows an expert takes of one sequence of ``tokens``: ceil(factor * tokens * k / E)."""
    return math.ceil(factor * tokens * cfg_top_k / n_experts)


def within_capacity(choices: Tensor, n_experts: int, factor: float) -> Tensor:
    """``choices [B, S, k]`` of whole rows -> ``[B, S, k] bool``: whether the expert still had room.

    Earlier positions come first, whichever of their choices it is. Each row has its own capacity.
    """
    tokens, k = choices.shape[1:]
    flat = choices.flatten(1)
    order = flat.argsort(dim=1, stable=True)
    counts = _count(flat, n_experts)
    starts = counts.cumsum(1) - counts
    place = torch.arange(flat.shape[1], device=flat.device) - starts.gather(1, flat.gather(1, order))
    room = torch.empty_like(flat).scatter_(1, order, place)
    return (room < expert_capacity(tokens, k, n_experts, factor)).view_as(choices)


def _count(flat: Tensor, n_experts: int) -> Tensor:
    """``[B, n] -> [B, E]``: how often each expert occurs."""
    return flat.new_zeros(flat.shape[0], n_experts).scatter_add_(1, flat, torch.ones_like(flat))


def _row_losses(scores: Tensor, full: Tensor, cfg: MoEConfig) -> Tensor:
    """``[B]``: this rank's part of each row's auxiliary loss, before its coefficient.

    ``scores [B, s, E]`` of the tokens held here, ``full [B, S, k]`` the choices of all: the loss is linear in
    the scores, so ranks that share a row add up.
    """
    tokens, k = full.shape[1:]
    share = _count(full.flatten(1), cfg.n_experts) / (tokens * k)
    if cfg.score == "sigmoid":
        scores = scores / (scores.sum(-1, keepdim=True) + _TINY)
    return cfg.n_experts * (share * (scores.sum(1) / tokens)).sum(-1)


def _load(choices: Tensor, kept: Tensor | None, n_experts: int) -> Tensor:
    dropped = choices.new_zeros(1) if kept is None else (~kept).sum().view(1)
    return torch.cat([_count(choices.view(1, -1), n_experts)[0], dropped])


class _InBackward(torch.autograd.Function):
    """Passes gates through. Backward runs once a micro-batch, recomputation or not: it adds the auxiliary loss's
    gradient and counts the load there."""

    @staticmethod
    def forward(
        ctx: Any, gates: Tensor, aux: Tensor | None, scale: float, load: Tensor, total: Tensor
    ) -> Tensor:
        ctx.has_aux = aux is not None
        ctx.scale, ctx.load, ctx.total = scale, load, total
        return gates.view_as(gates)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        ctx.total += ctx.load
        aux = grad.new_full((), ctx.scale) if ctx.has_aux else None
        return grad, aux, None, None, None
