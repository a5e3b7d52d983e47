"""One rank's place: which layers it holds, on which tensors, and how many tokens pass through them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import prod

from trainsys.config.run import RunConfig
from trainsys.context.balance import ContextPlan
from trainsys.flops import layer_gemms
from trainsys.flops.gemms import is_moe_layer
from trainsys.layout import Layout
from trainsys.schedules.actions import Schedule
from trainsys.schedules.build import build
from trainsys.schedules.partition import StagePart, partition


@dataclass(frozen=True)
class Held:
    """A parameter as tensor and expert parallelism leave it, before FSDP."""

    name: str
    shape: tuple[int, ...]
    norm: str = ""
    """``stream`` of the residual stream, ``head`` over head_dim: who sums its gradient over tp"""
    expert: bool = False

    @property
    def numel(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class Place:
    """``rank`` of ``layout`` in a run of ``cfg``, which `Layout.validate` has passed."""

    cfg: RunConfig
    layout: Layout
    rank: int = 0

    @property
    def element(self) -> int:
        """Bytes of an activation."""
        return {"fp32": 4, "bf16": 2}[self.cfg.train.dtype]

    @cached_property
    def micros(self) -> int:
        return self.cfg.train.global_batch // (self.layout.data_world * self.cfg.train.micro_batch)

    @cached_property
    def tokens(self) -> int:
        """Tokens of a micro-batch on one cp rank."""
        return self.cfg.train.micro_batch * self.cfg.train.seq_len // self.layout.cp

    @property
    def sequence_parallel(self) -> bool:
        return self.cfg.parallel.sequence_parallel and self.layout.tp > 1

    @property
    def stream_bytes(self) -> int:
        """One hidden state of the residual stream as this rank holds it."""
        split = self.layout.tp if self.sequence_parallel else 1
        return self.tokens // split * self.cfg.model.d_model * self.element

    @cached_property
    def context(self) -> ContextPlan:
        return ContextPlan.resolve(self.cfg.parallel.context, self.layout.cp)

    @cached_property
    def schedule(self) -> Schedule | None:
        pipeline = self.cfg.parallel.pipeline
        if self.layout.pp == 1:
            return None
        return build(pipeline.schedule, self.layout.pp, self.micros, pipeline.virtual_stages, pipeline.unit)

    @cached_property
    def parts(self) -> dict[int, StagePart]:
        """This rank's stages by number; without a pipeline one of everything."""
        model = self.cfg.model
        if self.schedule is None:
            return {0: StagePart(0, 0, model.n_layers, embed=True, head=True)}
        cut = partition(model, self.schedule.stages, self.cfg.train.seq_len)
        return {s: cut[s] for s in self.schedule.stages_of(self.layout.index("pp", self.rank))}

    def block(self, layer: int) -> list[Held]:
        """Parameters of a layer, in the order in which the module lists them."""
        m, tp = self.cfg.model, self.layout.tp
        d, dh = m.d_model, m.dim_per_head
        held = [Held("attn_norm", (d,), "stream")]
        for name, heads in (("wq", m.n_heads), ("wk", m.kv_heads), ("wv", m.kv_heads)):
            held.append(Held(name, (heads * dh // tp, d)))
            if m.qkv_bias:
                held.append(Held(f"{name}.bias", (heads * dh // tp,)))
        held.append(Held("wo", (d, m.n_heads * dh // tp)))
        if m.qk_norm:
            held += [Held("q_norm", (dh,), "head"), Held("k_norm", (dh,), "head")]
        if not m.parallel_block:
            held.append(Held("ffn_norm", (d,), "stream"))
        if not is_moe_layer(m, layer):
            return held + self._ffn(m.d_ff // tp)
        assert m.moe is not None
        held.append(Held("router", (m.moe.n_experts, d), "router"))
        mine, width = m.moe.n_experts // self.layout.ep, m.moe.d_ff // tp
        ups = ("w_gate", "w_up") if m.ffn_kind == "swiglu" else ("w_up",)
        held += [Held(f"experts.{name}", (mine, width, d), expert=True) for name in ups]
        held.append(Held("experts.w_down", (mine, d, width), expert=True))
        return held + (self._ffn(m.moe.shared_hidden // tp) if m.moe.shared_hidden else [])

    def _ffn(self, width: int) -> list[Held]:
        d = self.cfg.model.d_model
        ups = ("w_gate", "w_up") if self.cfg.model.ffn_kind == "swiglu" else ("w_up",)
        return [*(Held(name, (width, d)) for name in ups), Held("w_down", (d, width))]

    def ends(self, part: StagePart) -> tuple[list[Held], list[Held]]:
        """Parameters before and after the layers of a stage."""
        m = self.cfg.model
        table = Held("embed", (m.vocab // self.layout.tp, m.d_model))
        before = [table] if part.embed or (part.head and m.tied_embeddings) else []
        after = [Held("norm", (m.d_model,), "stream")] if part.head else []
        if part.head and not m.tied_embeddings:
            after.append(Held("head", table.shape))
        return before, after

    def parameters(self, part: StagePart) -> list[Held]:
        """A stage's parameters, in module order."""
        before, after = self.ends(part)
        return before + [p for layer in part.layers for p in self.block(layer)] + after

    def units(self, part: StagePart) -> list[tuple[str, str, list[Held]]]:
        """FSDP's units of a stage as (``root`` | ``block`` | ``experts``, axis, parameters)."""
        fsdp, ep = self.layout.size("fsdp"), self.layout.ep
        if fsdp == 1:
            return []
        before, after = self.ends(part)
        units = [("root", "fsdp", before + after)]
        for layer in part.layers:
            block = self.block(layer)
            units.append(("block", "fsdp", [p for p in block if ep == 1 or not p.expert]))
            own = [p for p in block if p.expert]
            if own and ep > 1 and self.layout.size("expert_fsdp") > 1:
                units.append(("experts", "expert_fsdp", own))
        return [u for u in units if u[2]]

    def unsharded(self, part: StagePart) -> list[Held]:
        """Parameters that no FSDP unit holds."""
        if self.layout.size("fsdp") == 1:
            return self.parameters(part)
        if self.layout.ep > 1 and self.layout.size("expert_fsdp") == 1:
            return [p for p in self.parameters(part) if p.expert]
        return []

    def shard(self, axis: str, p: Held, *, padded: bool) -> int:
        """Elements of ``p`` that one rank of ``axis`` holds: as FSDP2 cuts along one dim, ceil(n / ranks) each.

        ``padded``: what is communicated, the same on all; else what this rank really has.
        """
        ranks, index = self.layout.size(axis), self.layout.index(axis, self.rank)  # type: ignore[arg-type]
        dim = 0
        if len(p.shape) == 3:  # stacked experts: the first dim that the ranks share evenly
            dim = next((d for d, n in enumerate(p.shape) if n % ranks == 0), 0)
        size = p.shape[dim]
        chunk = -(-size // ranks)
        mine = chunk if padded else max(0, min(chunk, size - index * chunk))
        return p.numel // size * mine

    def repeats(self, layer: int) -> list[str]:
        """Components of the layer's weight products, one a product."""
        return [g.component for g in layer_gemms(self.cfg.model, layer)]
