"""Run a function on several gloo ranks, fast: forked workers that stay for a whole test module.

A fork of a process that has torch imported costs a tenth of a second where torchrun costs seven. The rules
that make it safe: one thread everywhere, heavy modules imported before the fork, a file store, children that
leave by ``os._exit``. A worker that fails or hangs takes its pool with it; the next test gets a new one.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import multiprocessing as mp
import os
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint
import torch.distributed.fsdp
import torch.distributed.pipelining
import torch.distributed.tensor

with contextlib.suppress(ImportError):
    import torch._dynamo

torch.set_num_threads(1)

DEFAULT_TIMEOUT_S = 60.0
_PR_SET_PDEATHSIG = 1
_pools: dict[int, _Pool] = {}


class RankFailed(AssertionError):
    """A rank raised; the message is its traceback."""


def run_ranks(
    world: int, fn: Callable[..., Any], *args: Any, timeout_s: float = DEFAULT_TIMEOUT_S
) -> list[Any]:
    """Call module-level ``fn(*args)`` on each of ``world`` ranks; returns the results by rank.

    The default process group is up (gloo). Raises RankFailed with the first failing rank's traceback, or
    when the ranks have not all answered within ``timeout_s``.
    """
    pool = _pools.get(world)
    if pool is None:
        pool = _pools[world] = _Pool(world)
    try:
        return pool.run(fn, args, timeout_s)
    except RankFailed:
        _pools.pop(world).kill()
        raise


class _Pool:
    def __init__(self, world: int) -> None:
        context = mp.get_context("fork")
        self._folder = tempfile.TemporaryDirectory()
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []
        for rank in range(world):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_work, args=(rank, world, self._folder.name, theirs), daemon=True, name=f"rank{rank}"
            )
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, fn: Callable[..., Any], args: tuple[Any, ...], timeout_s: float) -> list[Any]:
        """Between tasks the ranks are stopped: each process group keeps a thread that polls, a hundred times a second,
        and a few idle pools would take a whole core."""
        self._signal(signal.SIGCONT)
        try:
            return self._run(fn, args, timeout_s)
        finally:
            self._signal(signal.SIGSTOP)

    def _signal(self, number: signal.Signals) -> None:
        for process in self._processes:
            if process.pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, number)

    def _run(self, fn: Callable[..., Any], args: tuple[Any, ...], timeout_s: float) -> list[Any]:
        for rank, pipe in enumerate(self._pipes):
            try:
                pipe.send((sys.path, fn.__module__, fn.__qualname__, args))
            except BrokenPipeError:
                raise RankFailed(self._death(rank)) from None
        results: dict[int, Any] = {}
        deadline = time.monotonic() + timeout_s
        while len(results) < len(self._pipes):
            pending = [p for i, p in enumerate(self._pipes) if i not in results]
            ready = wait(pending, max(0.0, deadline - time.monotonic()))
            if not ready:
                missing = [i for i in range(len(self._pipes)) if i not in results]
                raise RankFailed(f"ranks {missing} did not answer within {timeout_s:.0f} s")
            for pipe in ready:
                rank = self._pipes.index(pipe)
                try:
                    ok, value = pipe.recv()
                except EOFError:
                    raise RankFailed(self._death(rank)) from None
                if not ok:
                    raise RankFailed(f"rank {rank} of {len(self._pipes)}:\n{value}")
                results[rank] = value
        return [results[rank] for rank in range(len(self._pipes))]

    def _death(self, rank: int) -> str:
        """What is known of a rank that is gone: its last words, its exit status (-9: killed, often for memory)."""
        self._processes[rank].join(5)
        words = ""
        with contextlib.suppress(EOFError, OSError):
            if self._pipes[rank].poll():
                words = f":\n{self._pipes[rank].recv()[1]}"
        return f"rank {rank} of {len(self._processes)} died, exit status {self._processes[rank].exitcode}{words}"

    def kill(self) -> None:
        self._signal(signal.SIGKILL)
        for process in self._processes:
            process.join(5)
        self._folder.cleanup()


def _work(rank: int, world: int, folder: str, pipe: Connection) -> None:
    code = 0
    try:
        # A stopped rank would not see that its parent was killed.
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        for other in (p for p in _pools.values()):
            for connection in other._pipes:
                connection.close()
        os.environ.update(
            RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world)
        )
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(os.path.join(folder, "store"), world),
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=DEFAULT_TIMEOUT_S),
        )
        dist.new_group = groups = _Groups()
        while True:
            try:
                path, module, name, args = pipe.recv()
            except EOFError:
                break
            groups.begin()
            sys.path[:] = path
            try:
                target: Any = __import__(module, fromlist=["_"])
                for part in name.split("."):
                    target = getattr(target, part)
                pipe.send((True, target(*args)))
            except BaseException:
                pipe.send((False, traceback.format_exc()))
    except BaseException:
        code = 1
        with contextlib.suppress(OSError):
            pipe.send((False, traceback.format_exc()))
    finally:
        os._exit(code)


class _Groups:
    """In place of ``dist.new_group``: what an earlier task had made for the same ranks, for each group keeps threads
    that poll, and hundreds of tasks would leave thousands of them. Within a task every call gets a group of its own.
    Groups with options of their own (Megatron's) go when the next task begins."""

    def __init__(self) -> None:
        self._real = dist.new_group
        self._made: dict[tuple[tuple[int, ...], int], Any] = {}
        self._asked: Counter[tuple[int, ...]] = Counter()
        self._own: list[dist.ProcessGroup] = []

    def begin(self) -> None:
        self._asked.clear()
        while self._own:
            dist.destroy_process_group(self._own.pop())

    def __call__(self, ranks: list[int] | None = None, *args: Any, **kwargs: Any) -> Any:
        if ranks is None or args or kwargs:
            group = self._real(ranks, *args, **kwargs)
            if isinstance(group, dist.ProcessGroup):  # or a mark of what this rank is not in
                self._own.append(group)
            return group
        key = tuple(ranks)
        self._asked[key] += 1
        place = key, self._asked[key]
        if place not in self._made:
            self._made[place] = self._real(ranks)
        return self._made[place]


@atexit.register
def close() -> None:
    """End every pool. Idle ones are not free: each group of ranks they made keeps threads that poll."""
    while _pools:
        _pools.popitem()[1].kill()
