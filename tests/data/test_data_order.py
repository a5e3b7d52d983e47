"""A changed data option is never accepted in silence: every field has a role, and what changes a batch is compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trainsys.config.run import DataConfig, RunConfig, TrainConfig
from trainsys.data import build_source
from trainsys.data.order import ROLES, differences

OTHERS: dict[str, Any] = {
    "source": "text", "path": "{here}/other.jsonl", "split": "train", "text_key": "body",
    "tokenizer": "{here}/tokenizer.json", "packing": "pad", "document_mask": True, "document_length": 8, "shuffle": False,
    "cache_dir": "{here}/other-cache", "prefetch": 0,
    "steps": 7, "seq_len": 8, "global_batch": 2, "micro_batch": 2, "seed": 5, "dtype": "fp32", "device": "cpu",
    "init_from": "{here}", "loss_chunk": 4, "compile": True, "attention": "flex", "threads": 1,
}  # fmt: skip
"""Another value of every field. A source and a path change together, a split only with the source, and a length of
documents needs their mask."""


def test_every_field_has_a_role() -> None:
    """Whoever adds one says whether it decides what a run sees; see ``trainsys/data/order.py``."""
    assert ROLES["data"].keys() == DataConfig.model_fields.keys()
    assert ROLES["train"].keys() == TrainConfig.model_fields.keys()
    assert OTHERS.keys() == ROLES["data"].keys() | ROLES["train"].keys()


def config(here: Path, **changed: Any) -> RunConfig:
    data = {"source": "jsonl", "path": f"{here}/text.jsonl", "cache_dir": f"{here}/cache"}
    train = {"seq_len": 16, "global_batch": 4}
    for name, value in changed.items():
        (data if name in ROLES["data"] else train)[name] = value
    model = {"n_layers": 1, "d_model": 8, "n_heads": 1, "d_ff": 8, "vocab": 320}
    return RunConfig.model_validate({"model": model, "data": data, "train": train})


@pytest.mark.parametrize("name", [name for name in OTHERS if name not in ("split", "tokenizer", "document_length")])
def test_what_changes_a_batch_is_compared_and_nothing_else(tmp_path: Path, name: str) -> None:
    records = [{"text": "a few words " * n, "body": "others " * n} for n in range(1, 30)]
    for file, lines in (("text", records), ("other", records[1:])):
        (tmp_path / f"{file}.jsonl").write_text("".join(str(r).replace("'", '"') + "\n" for r in lines))
    value = OTHERS[name].format(here=tmp_path) if isinstance(OTHERS[name], str) else OTHERS[name]
    was, now = config(tmp_path), config(tmp_path, **{name: value})
    before, after = build_source(was), build_source(now)
    batches = [
        [np.concatenate([b.tokens, b.labels, b.positions, *([] if b.doc_ids is None else [b.doc_ids])]) for b in both]
        for both in ([s.batch(step) for step in range(6)] for s in (before, after))
    ]
    same = all(x.shape == y.shape and np.array_equal(x, y) for x, y in zip(*batches, strict=True))
    said = differences(was.model_dump(mode="json"), before.describe(), now, after.describe())
    assert same == (said == [])
    assert same == (ROLES["data" if name in ROLES["data"] else "train"][name] == "free")


def test_the_same_text_elsewhere_is_the_same_data(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "text.jsonl").write_text('{"text": "a few words of text"}\n' * 30)
    was, now = config(tmp_path / "one"), config(tmp_path / "two")
    data = build_source(was).describe(), build_source(now).describe()
    assert differences(was.model_dump(mode="json"), data[0], now, data[1]) == []
    # A record of before fingerprints of tokens is compared by what it has.
    assert differences(was.model_dump(mode="json"), {"fingerprint": "f"}, now, {**data[1], "fingerprint": "f"}) == []


def test_another_tokenizer_is_other_data(tmp_path: Path) -> None:
    """By the tokens that come of it, whatever the files say."""
    (tmp_path / "text.jsonl").write_text('{"text": "words and words"}\n' * 30)
    cfg = config(tmp_path)
    data = build_source(cfg).describe()
    other = {**data, "tokens_fingerprint": "of another tokenizer"}
    (line,) = differences(cfg.model_dump(mode="json"), data, cfg, other)
    assert line == f"data {data['tokens_fingerprint']} -> of another tokenizer"
