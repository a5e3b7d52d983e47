"""Helper threads that do not die in silence.

What a thread is there for (prefetching data, writing events, watching for hangs) is waited for elsewhere, so a thread
that ends by an exception would leave its process, and then every other rank, waiting for ever. Here it ends the
process instead, as a rank that failed: one line with the thread's name, once for all ranks, and an exit code.
"""

from __future__ import annotations

import os
import queue
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, NoReturn, TypeVar

from trainsys.errors import EXIT_MACHINE_FAULT, MachineFault
from trainsys.failure import report

T = TypeVar("T")


class HelperDied(RuntimeError):
    """A helper thread has ended by an exception, which is the cause."""


def helper(name: str, target: Callable[..., object], *args: Any) -> threading.Thread:
    """A daemon thread ``trainsys-NAME``, not started yet, that runs ``target(*args)``; if that raises, anything at all,
    the process ends (``die``)."""
    # Made now: when memory has run out there is none for words.
    last_words = f"trainsys: error: the helper thread {name} ended, out of memory\n".encode()

    def run() -> None:
        try:
            target(*args)
        except BaseException as error:
            die(name, error, last_words)

    return threading.Thread(target=run, name=f"trainsys-{name}", daemon=True)


def die(name: str, error: BaseException, last_words: bytes) -> NoReturn:
    """End this process because its helper thread ``name`` has ended by ``error``; ``last_words`` where even saying so
    fails. Exit code 75 when memory ran out (elsewhere, or from the newest checkpoint, it may suffice), else 1."""
    code = EXIT_MACHINE_FAULT
    try:
        told: Exception
        if isinstance(error, MemoryError):
            told = MachineFault(f"the helper thread {name} ended: out of memory")
        else:
            told = HelperDied(f"the helper thread {name} ended: {type(error).__name__}: {error}")
            told.__cause__ = error
        code = report(told)
        sys.stderr.flush()
    except BaseException:
        os.write(2, last_words)
    finally:
        os._exit(code)


class Lane:
    """One helper thread that does what is submitted, in order. A task's exception is its Future's; only the thread's
    own end is the process's."""

    def __init__(self, name: str) -> None:
        self._tasks: queue.SimpleQueue[tuple[Future[Any], Callable[..., Any], tuple[Any, ...]] | None]
        self._tasks = queue.SimpleQueue()
        self._thread = helper(name, self._run)
        self._thread.start()

    def submit(self, work: Callable[..., T], *args: Any) -> Future[T]:
        future: Future[T] = Future()
        self._tasks.put((future, work, args))
        return future

    def shutdown(self, *, wait: bool, cancel_futures: bool = False) -> None:
        """Do what is submitted, or (``cancel_futures``) only what is begun, then end; ``wait`` for that."""
        while cancel_futures and not self._tasks.empty():
            if task := self._tasks.get():
                task[0].cancel()
        self._tasks.put(None)
        if wait:
            self._thread.join()

    def _run(self) -> None:
        while (task := self._tasks.get()) is not None:
            future, work, args = task
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(work(*args))
            except BaseException as error:
                future.set_exception(error)
            del task, future, work, args
