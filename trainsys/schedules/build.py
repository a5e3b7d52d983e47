"""The schedules by name, and what each asks of stages and micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from trainsys.errors import UserError
from trainsys.schedules import orders
from trainsys.schedules.actions import Action, Placement, Schedule, stages_of
from trainsys.schedules.blockwise import blockwise


@dataclass(frozen=True)
class _Kind:
    default_stages: int
    """Virtual stages a rank where the user says nothing."""
    placement: Placement = "loop"
    fixed: bool = False
    """No other number of virtual stages will do."""
    fewest: int = 1
    """Virtual stages a rank at least."""
    splits: bool = False
    in_rounds: bool = False
    """Micro-batches must split into equal rounds of at least one a rank."""
    order: Callable[[int, tuple[int, ...], int, int], list[Action]] | None = None
    """(rank, its stages, ranks, micro-batches) -> order"""


_KINDS = {
    "gpipe": _Kind(1, fixed=True, order=orders.gpipe),
    "1f1b": _Kind(1, fixed=True, order=orders.one_f_one_b),
    "interleaved_1f1b": _Kind(2, fewest=2, in_rounds=True, order=orders.interleaved),
    "zero_bubble": _Kind(1, splits=True, in_rounds=True, order=orders.zero_bubble),
    "zbv": _Kind(2, "v", fixed=True, splits=True, order=orders.zbv),
    "dualpipev": _Kind(2, "v", fixed=True, splits=True, order=orders.dualpipev),
    "blockwise": _Kind(2, splits=True),
}
NAMES = tuple(_KINDS)


def stages_per_rank(name: str, virtual_stages: int | None = None) -> int:
    """Virtual stages a rank: as given, or the schedule's own number."""
    return _kind(name).default_stages if virtual_stages is None else virtual_stages


def splits_backward(name: str) -> bool:
    """Whether the schedule does the gradients of weights apart from those of inputs."""
    return _kind(name).splits


def placement(name: str) -> Placement:
    return _kind(name).placement


@dataclass(frozen=True)
class Wanted:
    """A schedule by name, over so many ranks, of so many micro-batches."""

    name: str
    ranks: int
    virtual: int
    micros: int

    @property
    def kind(self) -> _Kind:
        return _kind(self.name)


@dataclass(frozen=True)
class Limit:
    """What a schedule asks of stages or micro-batches; a section of `trainsys.layout.refused`."""

    name: str
    applies: Callable[[Wanted], bool]
    says: Callable[[Wanted], str]
    example: Mapping[str, object]
    of_micros: bool = False
    """Other micro-batches would help, not other stages."""


def _takes(virtual: int) -> str:
    return " and ".join(n for n, k in _KINDS.items() if not k.fixed and k.fewest <= virtual)


def _rounds_that_work(w: Wanted) -> str:
    below = w.micros // w.ranks * w.ranks
    return f"{below} or {below + w.ranks}"


LIMITS = (
    Limit(
        "virtual stages for a schedule with a number of its own",
        lambda w: w.kind.fixed and w.virtual != w.kind.default_stages,
        lambda w: (
            f"parallel.pipeline.virtual_stages={w.virtual}: {w.name} has exactly {w.kind.default_stages} a rank; "
            f"{_takes(w.virtual)} take {w.virtual}"
        ),
        {"parallel.pp": 2, "parallel.pipeline.schedule": "zbv", "parallel.pipeline.virtual_stages": 3},
    ),
    Limit(
        "too few stages to interleave",
        lambda w: not w.kind.fixed and w.virtual < w.kind.fewest,
        lambda w: (
            f"parallel.pipeline.virtual_stages={w.virtual}: {w.name} interleaves at least {w.kind.fewest} stages a "
            "rank; with one a rank use 1f1b or zero_bubble"
        ),
        {
            "parallel.pp": 2,
            "parallel.pipeline.schedule": "interleaved_1f1b",
            "parallel.pipeline.virtual_stages": 1,
        },
    ),
    Limit(
        "too few micro-batches",
        lambda w: w.micros < fewest_micros(w.name, w.ranks),
        lambda w: (
            f"{w.name} over parallel.pp={w.ranks} needs at least {fewest_micros(w.name, w.ranks)} micro-batches per "
            f"step, but there are {w.micros}"
        ),
        {"parallel.pp": 4, "parallel.pipeline.schedule": "dualpipev", "train.micro_batch": 6},
        of_micros=True,
    ),
    Limit(
        "micro-batches that make no equal rounds",
        lambda w: w.kind.in_rounds and w.virtual > 1 and w.micros % orders.rounds(w.ranks, w.micros) != 0,
        lambda w: (
            f"{w.name} over parallel.pp={w.ranks} goes in rounds of equally many micro-batches, at least {w.ranks} "
            f"each, which {w.micros} do not make; {_rounds_that_work(w)} micro-batches work"
        ),
        {"parallel.pp": 2, "parallel.pipeline.schedule": "interleaved_1f1b", "train.global_batch": 5},
        of_micros=True,
    ),
)


def problems(name: str, ranks: int, virtual: int, micros: int) -> Iterator[str]:
    """Why this schedule cannot run, one line each, with what would work."""
    wanted = Wanted(name, ranks, virtual, micros)
    return (limit.says(wanted) for limit in LIMITS if limit.applies(wanted))


def fewest_micros(name: str, ranks: int) -> int:
    """Micro-batches per step below which the schedule has no order."""
    return 2 * ranks if name == "dualpipev" else 1


def build(
    name: str, ranks: int, micros: int, virtual_stages: int | None = None, unit: int | None = None
) -> Schedule:
    """The schedule ``name`` of ``micros`` micro-batches over ``ranks`` pipeline ranks.

    ``unit``: blockwise only: micro-batches between two gatherings of a stage's parameters; None: 2p-1.
    Raises UserError with the first of `problems`.
    """
    assert ranks >= 1
    assert micros >= 1
    kind, virtual = _kind(name), stages_per_rank(name, virtual_stages)
    for problem in problems(name, ranks, virtual, micros):
        raise UserError(problem)
    stages = ranks * virtual
    if kind.order is None:
        lists = blockwise(ranks, stages, micros, unit or 2 * ranks - 1)
    else:
        held = [stages_of(rank, ranks, stages, kind.placement) for rank in range(ranks)]
        lists = [kind.order(rank, held[rank], ranks, micros) for rank in range(ranks)]
    return Schedule(name, ranks, stages, micros, kind.placement, tuple(map(tuple, lists)))


def _kind(name: str) -> _Kind:
    if name not in _KINDS:
        raise UserError(f"parallel.pipeline.schedule={name}: there are {', '.join(_KINDS)}")
    return _KINDS[name]
