"""A whole job of several ranks, forked from this process: what torchrun starts, in a tenth of a second."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import support.ranks  # noqa: F401  # imports what must be there before a fork
import trainsys.engines.native  # else every rank imports it for itself
import trainsys.telemetry.report  # noqa: F401
from trainsys.errors import MachineFault, UserError
from trainsys.failure import exit_code
from trainsys.train.main import train


class Job:
    """``world`` ranks that train ``config`` with ``overrides``; what they print goes to ``log``.

    ``prepare`` runs in each rank before it trains. A rank's exit code is the command line's: 0, 2 or 75 after
    a mistake or a fault told in one line, 1 for anything else.
    """

    def __init__(
        self,
        world: int,
        config: Path,
        overrides: list[str],
        log: Path,
        prepare: Callable[[int], None] = lambda rank: None,
    ) -> None:
        self.world, self.log = world, log
        self.codes: dict[int, int] = {}
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = int(free.getsockname()[1])
        self.pids = [self._fork(rank, port, config, overrides, prepare) for rank in range(world)]

    def _fork(
        self, rank: int, port: int, config: Path, overrides: list[str], prepare: Callable[[int], None]
    ) -> int:
        pid = os.fork()
        if pid:
            return pid
        code = 1
        try:
            out = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(out, 1)
            os.dup2(out, 2)
            sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1, closefd=False) for n in (1, 2))
            os.environ.update(
                RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(self.world), LOCAL_WORLD_SIZE=str(self.world),
                MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
            )  # fmt: skip
            prepare(rank)
            code = train(str(config), overrides)
        except (UserError, MachineFault) as error:
            code = exit_code(error)
            os.write(2, f"trainsys: {error}\n".encode())
        except BaseException as error:
            os.write(2, f"rank {rank}: {type(error).__name__}: {error}\n".encode()[:2000])
        finally:
            os._exit(code)

    def poll(self) -> bool:
        """Whether some rank is still there."""
        for pid in self.pids:
            if pid not in self.codes:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    self.codes[pid] = os.waitstatus_to_exitcode(status)
        return len(self.codes) < len(self.pids)

    def wait(self, timeout_s: float = 60.0) -> list[int]:
        """Exit codes by rank; AssertionError, and every rank killed, when they are not all there in time."""
        deadline = time.monotonic() + timeout_s
        while self.poll():
            if time.monotonic() > deadline:
                self.end()
                raise AssertionError(f"ranks still run after {timeout_s} s: {self.log.read_text()[-2000:]}")
            time.sleep(0.01)
        return [self.codes[pid] for pid in self.pids]

    def kill(self, pids: list[int]) -> None:
        for pid in pids:
            if pid not in self.codes:
                os.kill(pid, signal.SIGKILL)

    def end(self) -> None:
        self.kill(self.pids)
        while self.poll():
            time.sleep(0.005)
