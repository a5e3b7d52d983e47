"""Where each rank stands: the sizes of the parallel axes, rank <-> coordinates, and the groups of every axis.

Ranks are placed with ``pp`` outermost and ``tp`` innermost (`PLACED`), so tensor parallelism, which
talks most, gets neighbours. With the order fixed, the ranks of any axis, combined ones and ``ep``
included, are an arithmetic progression: `size` members, `stride` ranks apart. Everything here follows
from that pair of numbers, and a layout of 100,000 ranks costs nothing until its groups are listed.

``ep`` is no factor of the world: expert groups are consecutive members of the (dp_shard × cp) plane,
and ``expert_fsdp``, the rest of that plane, holds the ranks with the same experts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

from trainsys.config.model import ModelConfig
from trainsys.config.run import ContextConfig, ExpertConfig, ParallelConfig, PipelineConfig, TrainConfig
from trainsys.context.refusals import Request, refusals, sequence_unit
from trainsys.errors import UserError
from trainsys.schedules.build import problems as schedule_problems
from trainsys.schedules.build import splits_backward, stages_per_rank

PlacedAxis = Literal["pp", "dp_replicate", "dp_shard", "cp", "tp"]
Axis = Literal[
    "pp", "dp_replicate", "dp_shard", "cp", "tp", "ep", "expert_fsdp", "dp", "fsdp", "loss", "world"
]

PLACED: tuple[PlacedAxis, ...] = get_args(PlacedAxis)
"""The axes whose sizes multiply to the world, outermost first."""
AXES: tuple[Axis, ...] = get_args(Axis)
"""Every axis that has groups."""
SIZED = (*PLACED, "ep")
"""The axes a user gives sizes for."""


class Cluster(Protocol):
    """What validation needs to know of a cluster."""

    @property
    def gpus_per_node(self) -> int: ...


@dataclass(frozen=True)
class Layout:
    """Resolved sizes of the axes, each >= 1; ``ep`` divides ``dp_shard * cp``."""

    pp: int = 1
    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1
    ep: int = 1

    def __post_init__(self) -> None:
        for name in SIZED:
            size = getattr(self, name)
            if size < 1:
                raise UserError(f"parallel.{name}={size}: an axis has at least one rank")
        plane = self.dp_shard * self.cp
        if plane % self.ep:
            raise UserError(
                f"parallel.ep={self.ep} does not divide the ranks it shares, "
                f"dp_shard × cp = {self.dp_shard} × {self.cp} = {plane}; "
                f"ep can be {_listed(_divisors(plane))}"
            )

    # ---- from a config ---------------------------------------------------------------------------

    @staticmethod
    def required_world(parallel: ParallelConfig) -> int | None:
        """The world size a config asks for, or None where an axis is -1 and takes what there is.

        Raises UserError for sizes that no world can serve (0, below -1, more than one -1).
        """
        sizes = _given(parallel)
        return None if -1 in sizes.values() else math.prod(sizes.values())

    @classmethod
    def resolve(cls, parallel: ParallelConfig, world: int) -> Layout:
        """Fill in the -1, if any, and check the product against ``world`` ranks; UserError if it fails."""
        assert world >= 1, world
        sizes = _given(parallel)
        fixed = {name: size for name, size in sizes.items() if size != -1}
        product = math.prod(fixed.values())
        text = " × ".join(f"{name}={size}" for name, size in fixed.items() if size > 1) or "every axis at 1"
        for name in sizes.keys() - fixed.keys():
            if world % product:
                raise UserError(
                    f"parallel: {text} needs a multiple of {product} ranks for {name}=-1 to take the rest, "
                    f"but the world has {world}; start {_around(world, product)} ranks{_shrink(fixed, world)}"
                )
            sizes[name] = world // product
        if math.prod(sizes.values()) != world:
            divides = world % (product // sizes["dp_shard"]) == 0
            free = ", or set parallel.dp_shard=-1 for the rest" if divides else ""
            raise UserError(
                f"parallel: {text} is {product} {_ranks(product)}, but the world has {world}; "
                f"start {product} {_ranks(product)}{free}"
            )
        ep = sizes["dp_shard"] * sizes["cp"] if parallel.ep == -1 else parallel.ep
        return cls(**sizes, ep=ep)

    # ---- arithmetic ------------------------------------------------------------------------------

    @property
    def world(self) -> int:
        return self.pp * self.dp_replicate * self.dp_shard * self.cp * self.tp

    @property
    def data_world(self) -> int:
        """How many ranks read different rows of the batch."""
        return self.dp_replicate * self.dp_shard

    def size(self, axis: Axis) -> int:
        """Ranks in one group of ``axis``."""
        return self._progression(axis)[0]

    def stride(self, axis: Axis) -> int:
        """Distance in rank numbers between neighbours in a group of ``axis``."""
        return self._progression(axis)[1]

    def _progression(self, axis: Axis) -> tuple[int, int]:
        """(size, stride) of an axis; the one place that knows the placement order."""
        tp, cp, shard, replicate = self.tp, self.cp, self.dp_shard, self.dp_replicate
        match axis:
            case "tp":
                return tp, 1
            case "cp":
                return cp, tp
            case "ep":
                return self.ep, tp
            case "expert_fsdp":
                return shard * cp // self.ep, tp * self.ep
            case "dp_shard":
                return shard, cp * tp
            case "dp_replicate":
                return replicate, shard * cp * tp
            case "pp":
                return self.pp, replicate * shard * cp * tp
            case "dp":
                return replicate * shard, cp * tp
            case "fsdp":
                return shard * cp, tp
            case "loss":
                return replicate * shard * cp, tp
            case "world":
                return self.world, 1
            case _:
                raise KeyError(f"no axis {axis!r}; there are {', '.join(AXES)}")

    def index(self, axis: Axis, rank: int) -> int:
        """The place of ``rank`` within its group of ``axis``."""
        assert 0 <= rank < self.world, (rank, self.world)
        size, stride = self._progression(axis)
        return rank // stride % size

    def coords(self, rank: int) -> dict[PlacedAxis, int]:
        """The place of ``rank`` on each of the `PLACED` axes, outermost first."""
        return {axis: self.index(axis, rank) for axis in PLACED}

    def rank(self, *, pp: int = 0, dp_replicate: int = 0, dp_shard: int = 0, cp: int = 0, tp: int = 0) -> int:
        """The inverse of `coords`."""
        at: dict[PlacedAxis, int] = {
            "pp": pp,
            "dp_replicate": dp_replicate,
            "dp_shard": dp_shard,
            "cp": cp,
            "tp": tp,
        }
        total = 0
        for axis, place in at.items():
            size, stride = self._progression(axis)
            assert 0 <= place < size, (axis, place, size)
            total += place * stride
        return total

    def data_rank(self, rank: int) -> int:
        """Which share of the batch ``rank`` reads, 0 .. data_world - 1."""
        return self.index("dp", rank)

    def group_of(self, axis: Axis, rank: int) -> list[int]:
        """The ranks of the group of ``axis`` that ``rank`` is in, ascending."""
        size, stride = self._progression(axis)
        first = rank - self.index(axis, rank) * stride
        return list(range(first, first + size * stride, stride))

    def groups(self, axis: Axis) -> list[list[int]]:
        """Every group of ``axis``, by first rank. They partition the world."""
        size, stride = self._progression(axis)
        block = size * stride
        return [
            list(range(start + offset, start + offset + block, stride))
            for start in range(0, self.world, block)
            for offset in range(stride)
        ]

    # ---- against a model and a machine -----------------------------------------------------------

    def validate(
        self,
        model: ModelConfig,
        train: TrainConfig,
        parallel: ParallelConfig,
        cluster: Cluster | None = None,
    ) -> list[str]:
        """Check that the model, the sequence and the batch divide over this layout.

        Returns warnings, each one line. Raises UserError with every problem found, one a line.
        """
        found = [
            *_model_problems(self, model),
            *_expert_problems(self, parallel.expert),
            *_context_problems(self, model, parallel),
            *_pipeline_problems(self, model, train, parallel.pipeline),
            *_batch_problems(self, train, parallel),
        ]
        if found:
            raise UserError("\n".join(found))
        return [
            *_warnings(self, model, parallel, cluster),
            *_pipeline_warnings(self, model, train, parallel.pipeline),
        ]

    def describe(self, parallel: ParallelConfig | None = None) -> str:
        """One line, e.g. ``dp_shard=2 × tp=2 (+sp)``; sp is named where ``parallel`` says it is on."""
        parts = [f"{name}={getattr(self, name)}" for name in PLACED if getattr(self, name) > 1]
        if not parts:
            return "one process"
        if self.tp > 1 and parallel is not None and parallel.sequence_parallel:
            parts[-1] += " (+sp)"
        inner = f", ep={self.ep} within" if self.ep > 1 else ""
        return " × ".join(parts) + inner


# ---- what divides what -------------------------------------------------------------------------------


def _model_problems(layout: Layout, model: ModelConfig) -> Iterator[str]:
    """What of the model does not split over tp, pp and ep."""
    moe = model.moe
    split_by_tp = {
        "model.n_heads": model.n_heads,
        "model.n_kv_heads": model.kv_heads,
        "model.d_ff": model.d_ff,
        "model.vocab": model.vocab,
    }
    if moe is not None:
        split_by_tp["model.moe.d_ff"] = moe.d_ff
        if moe.shared_hidden:
            split_by_tp["model.moe.shared_d_ff"] = moe.shared_hidden
    uneven = [f"{name}={size}" for name, size in split_by_tp.items() if size % layout.tp]
    if uneven:
        works = _listed(_divisors(math.gcd(*split_by_tp.values())))
        yield (
            f"parallel.tp={layout.tp} does not divide {', '.join(uneven)}; with this model tp can be {works}"
        )
    if layout.ep > 1 and moe is None:
        yield f"parallel.ep={layout.ep} needs experts, but model {model.name} is dense; set parallel.ep=1"
    if moe is not None and moe.n_experts % layout.ep:
        yield (
            f"model.moe.n_experts={moe.n_experts} does not divide by parallel.ep={layout.ep}; "
            f"ep can be {_listed(_divisors(math.gcd(moe.n_experts, layout.dp_shard * layout.cp)))}"
        )


def _expert_problems(layout: Layout, expert: ExpertConfig) -> Iterator[str]:
    """What of the way to experts does not fit ep."""
    inner = expert.node_ranks
    if expert.dispatch == "flat":
        if inner is not None:
            yield (
                f"parallel.expert.node_ranks={inner} is for dispatch=hierarchical; flat knows no nodes: leave it out"
            )
        return
    works = [n for n in _divisors(layout.ep) if 1 < n < layout.ep]
    if layout.ep > 1 and inner not in works:
        choice = f"node_ranks can be {_listed(works)}" if works else "use dispatch=flat"
        yield (
            f"parallel.expert.dispatch=hierarchical cuts parallel.ep={layout.ep} into nodes of several ranks, "
            f"but node_ranks={inner} does not; {choice}"
        )


def _context_problems(layout: Layout, model: ModelConfig, parallel: ParallelConfig) -> Iterator[str]:
    """What the context-parallel flavour cannot serve on the heads that tp leaves it."""
    tp = layout.tp
    if model.n_heads % tp == 0 and model.kv_heads % tp == 0:
        yield from refusals(Request(parallel.context, layout.cp, model.n_heads // tp, model.kv_heads // tp))


def _batch_problems(layout: Layout, train: TrainConfig, parallel: ParallelConfig) -> Iterator[str]:
    """What of the sequence and the batch does not split over cp, tp and the data ranks."""
    seq = train.seq_len
    unit, reason = sequence_unit(parallel.context, layout.cp)
    why = [reason] if reason else []
    if parallel.sequence_parallel and layout.tp > 1:
        # The residual of a context rank's own seq / cp tokens is spread over tp.
        unit = math.lcm(unit, layout.cp * layout.tp)
        over = f"cp={layout.cp} × tp={layout.tp}" if layout.cp > 1 else f"parallel.tp={layout.tp}"
        why.append(f"{over} (parallel.sequence_parallel)")
    if seq % unit:
        works = _around(seq, unit)
        yield f"train.seq_len={seq} does not divide by {' and '.join(why)}; seq_len can be {works}"
    rows = layout.data_world * train.micro_batch
    if train.global_batch % rows:
        factors = f"{layout.dp_replicate} × {layout.dp_shard} × {train.micro_batch} = {rows}"
        yield (
            f"train.global_batch={train.global_batch} does not divide by "
            f"dp_replicate × dp_shard × micro_batch = {factors}; "
            f"global_batch can be {_around(train.global_batch, rows)}"
        )


def _warnings(
    layout: Layout, model: ModelConfig, parallel: ParallelConfig, cluster: Cluster | None
) -> Iterator[str]:
    """What will run, but hardly as meant."""
    if layout.cp == 1 and parallel.context != ContextConfig():
        yield "parallel.context is set but parallel.cp=1: there is no context parallelism to configure"
    if layout.ep == 1 and parallel.expert != ExpertConfig():
        yield "parallel.expert is set but parallel.ep=1: every rank holds all experts and no row travels"
    if model.moe is not None and model.moe.top_k == 1 and model.moe.norm_topk:
        yield (
            "model.moe.top_k=1 with norm_topk=true: the one gate is always 1, so the router learns from balancing "
            "alone; set norm_topk=false"
        )
    if cluster is not None and layout.tp > 1:
        node = cluster.gpus_per_node
        if layout.tp > node:
            yield (
                f"parallel.tp={layout.tp} is more than the {node} devices of a node: "
                f"tensor parallelism will cross the slower network; tp up to {node} stays inside"
            )
        elif node % layout.tp:
            yield (
                f"parallel.tp={layout.tp} does not divide the {node} devices of a node: some tensor-parallel "
                f"groups span two nodes; tp of {_listed(_divisors(node))} stays inside"
            )


def _pipeline_problems(
    layout: Layout, model: ModelConfig, train: TrainConfig, pipeline: PipelineConfig
) -> Iterator[str]:
    """What the schedule cannot serve: stages, micro-batches, options."""
    if layout.pp == 1:
        return
    name, virtual = pipeline.schedule, stages_per_rank(pipeline.schedule, pipeline.virtual_stages)
    stages = layout.pp * virtual
    if stages > model.n_layers:
        each = f" × {virtual} virtual stages a rank" if virtual > 1 else ""
        works = f"pp can be 1 to {model.n_layers // virtual}" if model.n_layers >= virtual else "pp can be 1"
        yield (
            f"parallel.pp={layout.pp}{each} is more stages than model.n_layers={model.n_layers} layers; {works}"
        )
    rows = layout.data_world * train.micro_batch
    if train.global_batch % rows == 0:
        batch = (
            f"(train.global_batch={train.global_batch} / (dp_replicate × dp_shard × micro_batch = {rows}) = "
            f"{train.global_batch // rows} micro-batches)"
        )
        for problem in schedule_problems(name, layout.pp, virtual, train.global_batch // rows):
            yield f"{problem} {batch}" if "micro-batches" in problem else problem
    if pipeline.unit is not None and name != "blockwise":
        yield f"parallel.pipeline.unit={pipeline.unit} is for schedule=blockwise; {name} has none: leave it out"
    if train.compile and splits_backward(name):
        yield (
            f"train.compile with parallel.pipeline.schedule={name}: a compiled block cannot put off its weight "
            "gradients; use 1f1b or interleaved_1f1b, or train.compile=false"
        )


def _pipeline_warnings(
    layout: Layout, model: ModelConfig, train: TrainConfig, pipeline: PipelineConfig
) -> Iterator[str]:
    if layout.pp == 1:
        if pipeline != PipelineConfig():
            yield "parallel.pipeline is set but parallel.pp=1: there is no pipeline to configure"
        return
    virtual = stages_per_rank(pipeline.schedule, pipeline.virtual_stages)
    if model.n_layers % (layout.pp * virtual):
        each = f" × {virtual} virtual stages a rank" if virtual > 1 else ""
        yield (
            f"model.n_layers={model.n_layers} does not divide by parallel.pp={layout.pp}{each}: "
            f"some stages hold one layer more and the others wait for them"
        )
    micros = train.global_batch // (layout.data_world * train.micro_batch)
    if micros < layout.pp:
        yield (
            f"{micros} micro-batches a step are fewer than parallel.pp={layout.pp} ranks: most of them wait most "
            f"of the time; raise train.global_batch or lower train.micro_batch"
        )


def _given(parallel: ParallelConfig) -> dict[PlacedAxis, int]:
    """The sizes as written, by placed axis; UserError for those that no world can serve."""
    for name in SIZED:
        size = getattr(parallel, name)
        if size == 0 or size < -1:
            raise UserError(f"parallel.{name}={size}: a size is 1 or more, or -1 for the ranks that are left")
    rest = [name for name in SIZED if getattr(parallel, name) == -1]
    if len(rest) > 1:
        raise UserError(
            f"{' and '.join(f'parallel.{name}' for name in rest)} are -1: only one axis can take the ranks "
            "that are left; give the others a size"
        )
    return {name: getattr(parallel, name) for name in PLACED}


def _divisors(number: int) -> list[int]:
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})


def _listed(values: Iterable[int]) -> str:
    """1, 2 or 4"""
    *most, last = map(str, values)
    return f"{', '.join(most)} or {last}" if most else last


def _around(value: int, unit: int) -> str:
    """The multiples of ``unit`` on both sides of ``value``."""
    below = value // unit * unit
    return _listed(n for n in (below, below + unit) if n)


def _shrink(fixed: dict[PlacedAxis, int], world: int) -> str:
    """Other sizes of a fixed axis with which ``world`` would do."""
    product = math.prod(fixed.values())
    for name, size in sorted(fixed.items(), key=lambda item: -item[1]):
        others = product // size
        if size > 1 and world % others == 0:
            return f", or set parallel.{name}={_listed(_divisors(world // others))}"
    return ""


def _ranks(number: int) -> str:
    return "rank" if number == 1 else "ranks"
