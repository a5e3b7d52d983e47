"""A change to what decides the order of the data, or its amount in a batch, is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
from checkpoint.matrix import config

from trainsys.checkpoint.manifest import Manifest
from trainsys.checkpoint.resume import Found, refuse_other_run
from trainsys.errors import UserError


@pytest.mark.parametrize(("field", "value"), [("seed", 9), ("seq_len", 8), ("global_batch", 24)])
def test_each_field_alone_is_refused(field: str, value: int) -> None:
    cfg = config("single")
    old = cfg.model_dump(mode="json")
    assert getattr(cfg.train, field) != value
    manifest = Manifest(step=4, data_step=4, updates=0, world=1, files=[], atoms={}, config=old)
    refuse_other_run(Found(Path("ckpt"), manifest), cfg, {})
    changed = cfg.model_copy(update={"train": cfg.train.model_copy(update={field: value})})
    with pytest.raises(UserError, match=rf"train\.{field}"):
        refuse_other_run(Found(Path("ckpt"), manifest), changed, {})
