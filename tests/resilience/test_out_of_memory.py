"""Memory that runs out, in a rank's step and in each of its helper threads: a line and an exit code, never a hang."""

from __future__ import annotations

import errno
import os
import queue
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from support.jobs import Job
from trainsys.checkpoint.saver import Saver
from trainsys.checkpoint.snapshot import Room, refuse_too_large
from trainsys.config.run import RunConfig
from trainsys.engines.native import NativeEngine
from trainsys.errors import EXIT_MACHINE_FAULT, MachineFault, UserError
from trainsys.resilience.drain import Drain
from trainsys.resilience.out_of_memory import out_of_memory
from trainsys.resilience.watchdog import Watchdog
from trainsys.telemetry.recorder import Recorder, here
from trainsys.telemetry.writer import EventWriter
from trainsys.threads import Lane, helper

CONFIG = """
name: small
model: {n_layers: 1, d_model: 16, n_heads: 2, d_ff: 32, vocab: 264, max_seq_len: 32}
data: {source: synthetic, prefetch: 1}
train: {steps: 8, seq_len: 16, global_batch: 4, micro_batch: 2, dtype: fp32, device: cpu}
telemetry: {console: "off"}
checkpoint: {every: 1000}
"""


CFG = RunConfig.model_validate(yaml.safe_load(CONFIG))


def _fails() -> None:
    raise MemoryError


def _host() -> Exception:
    try:
        np.empty(1 << 60, np.uint8)
    except MemoryError as error:
        return error
    raise AssertionError


def _torch() -> Exception:
    try:
        torch.empty(1 << 60, dtype=torch.uint8)
    except RuntimeError as error:
        return error
    raise AssertionError


GPU = "CUDA out of memory. Tried to allocate 20.50 MiB. GPU 0 has a total capacity of 79.15 GiB of which 3 MiB is free."


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (torch.OutOfMemoryError(GPU), "out of memory on the GPU during forward, which asked for 20.50 MiB"),
        (_torch(), f"out of memory on the host during forward, which asked for {1 << 60} bytes"),
        (_host(), "out of memory on the host during forward, which asked for 1.00 EiB"),
        (MemoryError(), "out of memory on the host during forward; "),
        (MemoryError("std::bad_alloc"), "out of memory on the host during forward; "),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "out of memory on the host during forward; "),
    ],
    ids=["GPU", "torch", "numpy", "python", "C++", "system"],
)
def test_one_line_says_where_how_much_and_what_would_help(error: Exception, says: str) -> None:
    recorder = Recorder(None, here(run_id="t", rank=0, world=1), watch_gc=False)
    with pytest.raises(type(error)), recorder.phase("step"), recorder.phase("forward"):
        raise error
    told = out_of_memory(error, CFG, held=False)
    assert isinstance(told, UserError)
    assert says in str(told)
    assert "train.micro_batch below 2" in str(told)
    assert "\n" not in str(told)
    assert isinstance(out_of_memory(error, CFG, held=True), MachineFault)


@pytest.mark.parametrize("error", [ValueError("x"), RuntimeError("connection reset"), OSError(errno.ENOSPC, "full")])
def test_other_errors_stay_what_they_are(error: Exception) -> None:
    assert out_of_memory(error, CFG, held=False) is None


def _run(tmp_path: Path, prepare: Callable[[int], None], world: int = 1, *overrides: str) -> tuple[list[int], str]:
    config, log = tmp_path / "run.yaml", tmp_path / "log"
    config.write_text(CONFIG)
    job = Job(world, config, [f"telemetry.out={tmp_path}", *overrides], log, prepare)
    return job.wait(60.0), log.read_text()


def _at_step(step: int) -> Callable[[int], None]:
    real = NativeEngine._accumulate

    def accumulate(self: NativeEngine, model: Any, data: Any) -> Any:
        if data.step == step:
            torch.empty(1 << 60, dtype=torch.uint8)
        return real(self, model, data)

    def prepare(rank: int) -> None:
        NativeEngine._accumulate = accumulate  # type: ignore[method-assign]

    return prepare


def test_in_the_first_step_it_is_the_configs_fault_and_later_the_machines(tmp_path: Path) -> None:
    codes, log = _run(tmp_path, _at_step(0))
    assert codes == [2], log
    assert "out of memory on the host" in log
    codes, log = _run(tmp_path, _at_step(3))
    assert codes == [EXIT_MACHINE_FAULT], log
    assert "Traceback" not in log


# ---- the copy that saves take ----------------------------------------------------------------------------


def test_what_does_not_fit_beside_the_nodes_other_ranks_is_refused_with_sizes() -> None:
    gib = 1 << 30
    rooms = [Room("a", 9 * gib), Room("a", 8 * gib), Room("b", None), Room("c", 100 * gib)]
    refuse_too_large([4 * gib] * 4, rooms)
    with pytest.raises(UserError, match=r"^a: saving copies .* takes 10.0 GiB for the 2 ranks there, and 8.00 GiB are"):
        refuse_too_large([5 * gib] * 4, rooms)


def test_too_little_memory_for_a_save_ends_the_run_before_its_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainsys.checkpoint.saver.free_memory", lambda: 1000)
    codes, log = _run(tmp_path, lambda rank: None, 2, "parallel.dp_shard=2")
    assert codes == [2, 2], log
    assert "for the 2 ranks there, and 1 KiB are free" in log
    assert "Traceback" not in log
    assert not any(tmp_path.rglob("step_*"))
    never = ("checkpoint.every=0", "checkpoint.every_minutes=0")
    codes, log = _run(tmp_path, lambda rank: None, 1, *never, "parallel.dp_shard=1")
    assert codes == [0], log


def test_the_copy_is_there_before_the_first_step(tmp_path: Path) -> None:
    """And not made again by a save."""

    def prepare(rank: int) -> None:
        save = Saver.save

        def first(self: Saver, *args: Any, **options: Any) -> None:
            assert self._snapshot is not None
            memory = self._snapshot.memory.data_ptr()
            save(self, *args, **options)
            assert self._snapshot.memory.data_ptr() == memory
            os.write(1, b"the copy was there")

        Saver.save = first  # type: ignore[method-assign]

    codes, log = _run(tmp_path, prepare)
    assert codes == [0], log
    assert "the copy was there" in log


# ---- helper threads --------------------------------------------------------------------------------------


def _alone(work: Callable[[], object], log: Path) -> tuple[int, str]:
    """``work`` in a process that would else wait for a minute; its exit code and what it said."""
    pid = os.fork()
    if not pid:
        try:
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), 2)
            sys.stderr = os.fdopen(2, "w", closefd=False)
            kept = work()
            time.sleep(60)
            del kept
        finally:
            os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return code, log.read_text()


def _drain(folder: Path) -> Drain:
    Drain.ask = lambda self, by: _fails()  # type: ignore[method-assign]
    drain = Drain(folder, 60.0).__enter__()
    drain._write.send(bytes([15]))
    return drain


def _writer(folder: Path) -> EventWriter:
    EventWriter.flush = lambda self: _fails()  # type: ignore[method-assign]
    return EventWriter(folder / "events.jsonl")


def _watchdog(folder: Path) -> Watchdog:
    Watchdog._abort = lambda self, silent: (_ for _ in ()).throw(KeyError("x"))  # type: ignore[method-assign]
    dog = Watchdog(folder, 0, 1, 0.2, 0.2)
    dog.start()
    return dog


def _lane(folder: Path) -> Lane:
    lane = Lane("ckpt-drain")
    lane._tasks.put(5)  # type: ignore[arg-type]  # no task: its own loop fails
    return lane


@pytest.mark.parametrize(
    ("name", "make", "code"),
    [
        ("drain", _drain, EXIT_MACHINE_FAULT),
        ("events", _writer, EXIT_MACHINE_FAULT),
        ("watchdog", _watchdog, 1),
        ("ckpt-drain", _lane, 1),
        ("mine", lambda folder: helper("mine", _fails).start(), EXIT_MACHINE_FAULT),
    ],
)
def test_a_helper_thread_that_dies_ends_the_process_by_name(
    tmp_path: Path, name: str, make: Callable[[Path], object], code: int
) -> None:
    ended, said = _alone(lambda: make(tmp_path), tmp_path / "log")
    assert ended == code, said
    assert f"the helper thread {name} ended" in said


def test_without_memory_for_words_the_ones_made_before_are_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainsys.threads.report", lambda error: _fails())
    ended, said = _alone(lambda: helper("mine", _fails).start(), tmp_path / "log")
    assert ended == EXIT_MACHINE_FAULT
    assert said == "trainsys: error: the helper thread mine ended, out of memory\n"


def test_a_dead_prefetch_thread_ends_the_run_that_waits_for_it(tmp_path: Path) -> None:
    def prepare(rank: int) -> None:
        put = queue.Queue.put

        def fail(self: Any, item: Any, *args: Any, **kwargs: Any) -> None:
            if getattr(item, "step", 0) == 3:
                raise MemoryError
            put(self, item, *args, **kwargs)

        queue.Queue.put = fail  # type: ignore[method-assign,assignment]

    codes, log = _run(tmp_path, prepare)
    assert codes == [EXIT_MACHINE_FAULT], log
    assert "the helper thread data ended: out of memory" in log
