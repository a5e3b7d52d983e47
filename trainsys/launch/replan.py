"""A layout for a world of another size than the one that was configured: after a restart on more or fewer ranks."""

from __future__ import annotations

from itertools import product

from trainsys.config.run import RunConfig
from trainsys.errors import UserError
from trainsys.layout import Layout

_AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp", "ep")
# How much it costs to change an axis: model axes are chosen for memory and topology, data axes for size. Where
# there are replicas of shards they are changed first, since the shards were made for memory.
_PRICE = {"tp": 8.0, "pp": 6.0, "cp": 6.0, "ep": 4.0, "dp_replicate": 0.8, "dp_shard": 1.0}
_FIRST_REPLICA = 2.0


def replan(cfg: RunConfig, world: int) -> RunConfig:
    """``cfg`` with the valid layout of ``world`` ranks nearest to the configured one; ``cfg`` itself if that fits.

    Data axes change before model axes. The global batch stays, so the run goes on as it was. UserError where no
    layout of ``world`` ranks fits the model and batch.
    """
    first: UserError | None = None
    try:
        Layout.of(cfg, world)
        return cfg
    except UserError as error:
        first = error
    want = {axis: getattr(cfg.parallel, axis) for axis in _AXES}
    choices: list[tuple[float, dict[str, int]]] = []
    divisors = [n for n in range(1, world + 1) if world % n == 0]
    for sizes in product(divisors, repeat=len(_AXES) - 1):
        axes = dict(zip(_AXES, sizes, strict=False))
        if axes["pp"] * axes["dp_replicate"] * axes["dp_shard"] * axes["cp"] * axes["tp"] != world:
            continue
        for ep in (n for n in divisors if axes["dp_shard"] * axes["cp"] % n == 0):
            candidate = {**axes, "ep": ep}
            price = sum(
                (_FIRST_REPLICA if (axis, want[axis]) == ("dp_replicate", 1) else _PRICE[axis])
                * abs(_doublings(candidate[axis]) - _doublings(want[axis]))
                for axis in _AXES
                if want[axis] != -1
            )
            choices.append((price, candidate))
    for _, axes in sorted(choices, key=lambda c: (c[0], sorted(c[1].items()))):
        candidate_cfg = cfg.model_copy(update={"parallel": cfg.parallel.model_copy(update=axes)})
        try:
            Layout.of(candidate_cfg, world)
            return candidate_cfg
        except UserError:
            continue
    raise UserError(f"no layout of {world} ranks serves this run; the configured one: {first}")


def _doublings(n: int) -> float:
    """log2, to any real base alike: how many times an axis is doubled."""
    return n.bit_length() - 1 + n / (1 << (n.bit_length() - 1)) - 1
