"""The sizes of the parallel axes, rank <-> coordinates, and the groups of every axis.

Ranks are placed with ``pp`` outermost and ``tp`` innermost (`PLACED`), so tensor parallelism, which
talks most, gets neighbours. With the order fixed, the ranks of any axis, combined ones and ``ep``
included, are an arithmetic progression: `size` members, `stride` ranks apart. Everything here follows
from that pair of numbers, and a layout of 100,000 ranks costs nothing until its groups are listed.

``ep`` is no factor of the world: expert groups are consecutive members of the (dp_shard × cp) plane,
and ``expert_fsdp``, the rest of that plane, holds the ranks with the same experts.
"""

from __future__ import annotations

from dataclasses import dataclass

from trainsys.config.model import ModelConfig
from trainsys.config.run import ParallelConfig, RecomputeConfig, RunConfig, TrainConfig
from trainsys.errors import UserError
from trainsys.layout.advice import Cluster, warnings
from trainsys.layout.names import AXES, PLACED, SIZED, Axis, PlacedAxis
from trainsys.layout.refused import Case, problems
from trainsys.layout.resolve import required_world, resolved_sizes
from trainsys.layout.words import divisors, listed


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
                f"ep can be {listed(divisors(plane))}"
            )

    # ---- from a config ---------------------------------------------------------------------------

    @staticmethod
    def required_world(parallel: ParallelConfig) -> int | None:
        """The world size a config asks for, or None where an axis is -1 and takes what there is.

        Raises UserError for sizes that no world can serve (0, below -1, more than one -1).
        """
        return required_world(parallel)

    @classmethod
    def resolve(cls, parallel: ParallelConfig, world: int) -> Layout:
        """Fill in the -1, if any, and check the product against ``world`` ranks; UserError if it fails."""
        return cls(**resolved_sizes(parallel, world))

    @classmethod
    def of(cls, run: RunConfig, world: int) -> tuple[Layout, list[str]]:
        """The layout of ``run`` on ``world`` ranks, and warnings; UserError for what `resolve` or `validate` refuses."""
        layout = cls.resolve(run.parallel, world)
        return layout, layout.validate(run.model, run.train, run.parallel, recompute=run.recompute)

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
        recompute: RecomputeConfig | None = None,
    ) -> list[str]:
        """Walk the table of what is refused (`trainsys.layout.refused`); ``recompute`` None: nothing is.

        Returns warnings, each one line. Raises UserError with every problem found, one a line.
        """
        found = list(problems(Case(self, model, train, parallel, recompute or RecomputeConfig())))
        if found:
            raise UserError("\n".join(found))
        return list(warnings(self, model, train, parallel, cluster))

    def reduces_each_micro_batch(self, parallel: ParallelConfig) -> bool:
        """Whether FSDP reduces gradients after every micro-batch: as asked, or because each replica keeps a piece of
        them."""
        pieces = self.dp_replicate > 1 and parallel.shard.grads == "over_replicas"
        return self.pp == 1 and (parallel.fsdp.reduce_each_micro_batch or pieces)

    def describe(self, parallel: ParallelConfig | None = None) -> str:
        """One line, e.g. ``dp_shard=2 × tp=2 (+sp)``; sp is named where ``parallel`` says it is on."""
        parts = [f"{name}={getattr(self, name)}" for name in PLACED if getattr(self, name) > 1]
        if not parts:
            return "one process"
        if self.tp > 1 and parallel is not None and parallel.sequence_parallel:
            parts[-1] += " (+sp)"
        inner = f", ep={self.ep} within" if self.ep > 1 else ""
        return " × ".join(parts) + inner
