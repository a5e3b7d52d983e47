"""A data rank's share of each global batch, prepared ahead of use.

With R = ``data_world`` and b = ``micro_batch``, accumulation micro-step m on data rank d holds the rows
[(m R + d) b, (m R + d + 1) b) of the global batch: the micro-batches of all ranks, laid out by micro-step and
then by rank, are the global batch in order, and at each micro-step the ranks together hold one contiguous
piece of it.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol

from trainsys.data.packing import Batch, Counts
from trainsys.data.source import Source
from trainsys.errors import UserError
from trainsys.threads import helper

_POLL_S = 0.1


class DataLayout(Protocol):
    """The part of ``trainsys.layout.Layout`` that data needs."""

    @property
    def data_world(self) -> int: ...

    def data_rank(self, rank: int) -> int: ...


@dataclass(frozen=True)
class StepData:
    """One optimizer step on one data rank.

    The ``*_global`` counts are of the whole global batch, the same on every rank, so a loss summed over
    ranks and micro-steps and divided by ``valid_tokens_global`` is the mean that one process would compute.
    """

    step: int
    micro_batches: list[Batch]
    valid_tokens_global: int
    real_tokens_global: int
    padded_tokens_global: int
    attn_pairs_global: int


def micro_batch_rows(global_batch: int, data_world: int, micro_batch: int, data_rank: int) -> list[range]:
    """Rows of each micro-step on ``data_rank``. ``UserError`` where the global batch does not divide."""
    if global_batch % (data_world * micro_batch):
        raise UserError(
            f"train.global_batch={global_batch} is not divisible by {data_world} data ranks x "
            f"train.micro_batch={micro_batch}; use a multiple of {data_world * micro_batch}"
        )
    assert 0 <= data_rank < data_world
    starts = range(data_rank * micro_batch, global_batch, data_world * micro_batch)
    return [range(start, start + micro_batch) for start in starts]


class Loader:
    """Iterates over ``StepData`` from ``start_step`` on, without end.

    The state is one number, the next step: ``Loader(..., start_step=state["step"])`` goes on exactly, on
    any number of ranks. A background thread keeps ``prefetch`` steps ready (0: none, each step is made when
    asked for). An ``OSError`` while reading is tried again up to ``retries`` times with doubling waits and
    noted in ``retried``; what still fails, and any other exception, is raised to the caller of ``next``.
    """

    def __init__(
        self,
        source: Source,
        layout: DataLayout,
        rank: int,
        micro_batch: int,
        *,
        start_step: int = 0,
        prefetch: int = 2,
        retries: int = 3,
        retry_wait_s: float = 0.5,
    ) -> None:
        self._source = source
        self._rows = micro_batch_rows(
            source.global_batch, layout.data_world, micro_batch, layout.data_rank(rank)
        )
        self._step = start_step
        self._retries = retries
        self._retry_wait_s = retry_wait_s
        self.retried: list[str] = []
        self._stop = threading.Event()
        self._ready: queue.Queue[StepData | BaseException] = queue.Queue(prefetch)
        self._thread: threading.Thread | None = None
        if prefetch:
            self._thread = helper("data", self._work, start_step)
            self._thread.start()

    def state_dict(self) -> dict[str, int]:
        """``{"step": next step to be given}``: steps made ahead but not given do not count."""
        return {"step": self._step}

    def __iter__(self) -> Iterator[StepData]:
        return self

    def __next__(self) -> StepData:
        if self._stop.is_set():
            raise StopIteration
        data = self._load(self._step) if self._thread is None else self._ready.get()
        if isinstance(data, BaseException):
            self.close()
            raise data
        assert data.step == self._step
        self._step += 1
        return data

    def close(self) -> None:
        """End the thread. Safe to call twice; ``next`` raises ``StopIteration`` afterwards."""
        self._stop.set()
        if self._thread is not None:
            with suppress(queue.Empty):  # a thread that waits for room is let go at once
                self._ready.get_nowait()
            self._thread.join()
            self._thread = None

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    def _work(self, step: int) -> None:
        while not self._stop.is_set():
            item: StepData | BaseException
            try:
                item = self._load(step)
            except BaseException as error:  # handed to the consumer, whatever it is
                item = error
            while not self._stop.is_set():
                try:
                    self._ready.put(item, timeout=_POLL_S)
                    break
                except queue.Full:
                    continue
            if isinstance(item, BaseException):
                return
            step += 1

    def _load(self, step: int) -> StepData:
        for attempt in range(self._retries + 1):
            try:
                batches = [self._source.rows(step, rows) for rows in self._rows]
                return _step_data(step, batches, self._source.counts(step))
            except OSError as error:
                if attempt == self._retries:
                    raise
                self.retried.append(f"step {step}: attempt {attempt + 1} of {self._retries + 1}: {error}")
                if self._stop.wait(self._retry_wait_s * 2**attempt):
                    raise
        raise AssertionError("unreachable")


def _step_data(step: int, batches: list[Batch], counts: Counts) -> StepData:
    return StepData(
        step=step,
        micro_batches=batches,
        valid_tokens_global=counts.valid_tokens,
        real_tokens_global=counts.real_tokens,
        padded_tokens_global=counts.padded_tokens,
        attn_pairs_global=counts.attn_pairs,
    )
