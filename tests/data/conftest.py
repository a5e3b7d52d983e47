"""Makers that the data tests share: small configs and corpora whose every token is known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import settings

from trainsys.config.run import RunConfig
from trainsys.data.corpus import Corpus, Segment

# Two busy cores make any example slow now and then: time is no property of the data.
settings.register_profile("no-deadline", deadline=None)
settings.load_profile("no-deadline")

MakeConfig = Callable[..., RunConfig]
MakeCorpus = Callable[..., Corpus]


@pytest.fixture(scope="session")
def make_config() -> MakeConfig:
    """A run config from flat settings: train fields by name, everything else as ``data`` fields."""
    train_fields = ("seq_len", "global_batch", "micro_batch", "seed")

    def make(vocab: int = 320, window: int | None = None, **settings: Any) -> RunConfig:
        train = {name: settings.pop(name) for name in train_fields if name in settings}
        model = {
            "n_layers": 1,
            "d_model": 8,
            "n_heads": 1,
            "d_ff": 8,
            "vocab": vocab,
            "sliding_window": window,
        }
        return RunConfig.model_validate(
            {"model": model, "train": {"seq_len": 16, "global_batch": 4, **train}, "data": settings}
        )

    return make


@pytest.fixture(scope="session")
def make_corpus() -> MakeCorpus:
    """Documents of the given lengths, cut into segments after each ``segment_docs``; token p of the corpus
    is p."""

    def make(lengths: Sequence[int], segment_docs: int = 10**9, pad: int = 10**6) -> Corpus:
        segments, at = [], 0
        for first in range(0, len(lengths), segment_docs):
            part = lengths[first : first + segment_docs]
            offsets = np.cumsum([0, *part]).astype(np.uint64)
            segments.append(Segment(np.arange(at, at + sum(part)), offsets))
            at += sum(part)
        return Corpus("memory", segments, pad, None)

    return make
