from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainsys.data.loader import Loader, StepData, micro_batch_rows
from trainsys.data.packing import Batch, ConcatPacking
from trainsys.data.source import Source
from trainsys.errors import UserError
from trainsys.layout import Layout


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert not [t for t in threading.enumerate() if t.name == "trainsys-data"]


def make_source(make_corpus: Any, batch: int, kind: type[Source] = Source) -> Source:
    corpus = make_corpus([7, 30, 2, 90, 41] * 5)
    packing = ConcatPacking(corpus, 8, True, None)
    return kind(corpus, packing, seq_len=8, global_batch=batch, vocab=10**7, seed=3, shuffle=True)


@given(
    data_world=st.integers(1, 4),
    micro=st.integers(1, 3),
    accumulate=st.integers(1, 3),
    prefetch=st.integers(0, 2),
)
def test_every_split_lays_out_the_same_global_batch(
    data_world: int, micro: int, accumulate: int, prefetch: int, make_corpus: Any
) -> None:
    source = make_source(make_corpus, data_world * micro * accumulate)
    layout = Layout(dp_shard=data_world)
    loaders = [Loader(source, layout, r, micro, prefetch=prefetch) for r in range(data_world)]
    try:
        for step in range(3):
            parts = [next(loader) for loader in loaders]
            whole = source.batch(step)
            for field in ("tokens", "labels", "positions", "doc_ids"):
                pieces = [
                    getattr(parts[d].micro_batches[m], field)
                    for m in range(accumulate)
                    for d in range(data_world)
                ]
                assert all(len(piece) == micro for piece in pieces)
                assert np.array_equal(np.concatenate(pieces), getattr(whole, field))
            for part in parts:
                assert part.step == step
                assert part.valid_tokens_global == whole.counts.valid_tokens
                assert part.real_tokens_global == whole.counts.real_tokens
                assert part.padded_tokens_global == whole.counts.padded_tokens
                assert part.attn_pairs_global == whole.counts.attn_pairs
            total = sum(b.counts.attn_pairs for part in parts for b in part.micro_batches)
            assert total == whole.counts.attn_pairs
    finally:
        for loader in loaders:
            loader.close()


def test_ranks_of_one_data_rank_read_the_same_rows(make_corpus: Any) -> None:
    source = make_source(make_corpus, 8)
    layout = Layout(dp_shard=2, tp=2)
    steps = []
    for rank in range(4):
        with Loader(source, layout, rank, 2) as loader:
            steps.append(next(loader).micro_batches)
    for rank in range(4):
        twin = next(r for r in range(4) if layout.data_rank(r) == layout.data_rank(rank))
        assert np.array_equal(steps[rank][0].tokens, steps[twin][0].tokens)
    assert {layout.data_rank(r) for r in range(4)} == {0, 1}
    assert not np.array_equal(steps[0][0].tokens, steps[3][0].tokens)


@given(stop=st.integers(0, 6), prefetch=st.integers(0, 3), new_world=st.sampled_from([1, 2, 4]))
def test_resume_equals_uninterrupted_on_another_number_of_ranks(
    stop: int, prefetch: int, new_world: int, make_corpus: Any
) -> None:
    source = make_source(make_corpus, 4)
    with Loader(source, Layout(), 0, 1, prefetch=prefetch) as before:
        for _ in range(stop):
            next(before)
        state = before.state_dict()
    assert state == {"step": stop}
    for rank in range(new_world):
        with Loader(
            source,
            Layout(dp_shard=new_world),
            rank,
            4 // new_world,
            start_step=state["step"],
            prefetch=prefetch,
        ) as after:
            for step in range(stop, stop + 2):
                rows = range(rank * 4 // new_world, (rank + 1) * 4 // new_world)
                data = next(after)
                assert data.step == step
                assert np.array_equal(data.micro_batches[0].tokens, source.rows(step, rows).tokens)


@pytest.mark.parametrize(("batch", "world", "micro"), [(8, 3, 1), (8, 2, 3), (4, 8, 1)])
def test_global_batch_that_does_not_divide(batch: int, world: int, micro: int) -> None:
    match = f"global_batch={batch} is not divisible by {world} data ranks x train.micro_batch={micro}"
    with pytest.raises(UserError, match=match):
        micro_batch_rows(batch, world, micro, 0)


class Flaky(Source):
    """Fails on the reads that ``faults`` counts out, with ``error``."""

    error: Exception = OSError("disk away")
    faults = 0
    at_step = 1

    def rows(self, step: int, rows: Any) -> Batch:
        if step == self.at_step and self.faults > 0:
            self.faults -= 1
            raise self.error
        return super().rows(step, rows)


@pytest.mark.parametrize("prefetch", [0, 2])
def test_read_errors_are_tried_again_and_noted(make_corpus: Any, prefetch: int) -> None:
    source = make_source(make_corpus, 2, Flaky)
    assert isinstance(source, Flaky)
    source.faults = 2
    with Loader(source, Layout(), 0, 2, prefetch=prefetch, retry_wait_s=0.001) as loader:
        got = [next(loader) for _ in range(3)]
        assert loader.retried == [f"step 1: attempt {i} of 4: disk away" for i in (1, 2)]
    assert [data.step for data in got] == [0, 1, 2]
    assert np.array_equal(got[1].micro_batches[0].tokens, source.batch(1).tokens)


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("error", [OSError("disk gone"), UserError("bad token"), KeyError("defect")])
def test_what_cannot_be_read_reaches_the_consumer(make_corpus: Any, prefetch: int, error: Exception) -> None:
    source = make_source(make_corpus, 2, Flaky)
    assert isinstance(source, Flaky)
    source.faults, source.error = 4, error
    loader = Loader(source, Layout(), 0, 2, prefetch=prefetch, retry_wait_s=0.001)
    assert next(loader).step == 0
    with pytest.raises(type(error)) as caught:
        next(loader)
    assert caught.value is error
    assert loader.state_dict() == {"step": 1}
    assert len(loader.retried) == (3 if isinstance(error, OSError) else 0)


class Counting(Source):
    asked: list[int]

    def rows(self, step: int, rows: Any) -> Batch:
        self.asked = [*getattr(self, "asked", []), step]
        return super().rows(step, rows)


def test_prefetch_is_bounded_and_state_is_what_was_given(make_corpus: Any) -> None:
    source = make_source(make_corpus, 2, Counting)
    assert isinstance(source, Counting)
    with Loader(source, Layout(), 0, 2, prefetch=2) as loader:
        for _ in range(5):
            next(loader)
        assert loader.state_dict() == {"step": 5}
        time.sleep(0.3)  # time to run away, were there no bound
    assert max(source.asked) <= 5 + 2 + 1, "two wait in the queue, one in hand"
    assert source.asked == sorted(set(source.asked))


def test_close_ends_a_full_queue_and_is_safe_twice(make_corpus: Any) -> None:
    loader = Loader(make_source(make_corpus, 2), Layout(), 0, 2, prefetch=1)
    data: StepData = next(loader)
    assert data.step == 0
    loader.close()
    loader.close()
    assert list(loader) == []
