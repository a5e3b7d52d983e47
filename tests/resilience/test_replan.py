"""Another world than the configured one: the nearest layout that serves model and batch."""

from __future__ import annotations

from typing import Any

import pytest
from checkpoint.matrix import config

from trainsys.config.run import ParallelConfig, RunConfig
from trainsys.errors import UserError
from trainsys.launch.replan import replan
from trainsys.layout import Layout


def cfg_of(global_batch: int = 24, **axes: int) -> RunConfig:
    cfg = config("single")
    train = cfg.train.model_copy(update={"global_batch": global_batch, "micro_batch": 1})
    return cfg.model_copy(update={"parallel": ParallelConfig(**{"dp_shard": 1, **axes}), "train": train})


@pytest.mark.parametrize(
    ("axes", "world", "want"),
    [
        ({"dp_shard": 2, "tp": 2}, 4, {"dp_shard": 2, "tp": 2}),
        ({"dp_shard": 2, "tp": 2}, 2, {"dp_shard": 1, "tp": 2}),
        ({"dp_shard": 2, "tp": 2}, 8, {"dp_shard": 4, "tp": 2}),
        ({"dp_shard": 4}, 3, {"dp_shard": 3}),
        ({"dp_shard": 2, "tp": 2}, 3, {"dp_shard": 3, "tp": 1}),
        ({"dp_replicate": 2, "dp_shard": 2}, 2, {"dp_replicate": 1, "dp_shard": 2}),
        ({"dp_shard": -1, "tp": 2}, 6, {"dp_shard": -1, "tp": 2}),
    ],
)
def test_data_axes_change_before_model_axes(axes: dict[str, int], world: int, want: dict[str, int]) -> None:
    cfg = replan(cfg_of(**axes), world)
    assert {axis: getattr(cfg.parallel, axis) for axis in want} == want
    layout = Layout.resolve(cfg.parallel, world)
    assert layout.world == world
    layout.validate(cfg.model, cfg.train, cfg.parallel)
    assert cfg.train.global_batch == 24, "the batch is the run's, whatever the world"


def test_a_layout_that_fits_is_left_alone() -> None:
    cfg = cfg_of(dp_shard=2, tp=2)
    assert replan(cfg, 4) is cfg


def test_where_nothing_fits_it_says_so() -> None:
    cfg: Any = cfg_of(global_batch=8, dp_shard=2)
    with pytest.raises(UserError, match="no layout of 7 ranks"):
        replan(cfg, 7)
