"""Asked to stop: SIGTERM, SIGUSR1 (a scheduler's warning) and Ctrl-C become a saved run, a marker file and exit 0.

torchrun reports every exit code but 0 as 1, so the marker tells a drained run from a finished one: a batch
script that finds it starts the job again. Ctrl-C ends with 130 instead, as it does everywhere, but for a rank under
torchrun, which would start it again: there whoever started torchrun says 130.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import NoReturn

from trainsys.checkpoint.durable import write_durable
from trainsys.errors import MachineFault, UserError, fault_of
from trainsys.failure import interrupted_code
from trainsys.launch.proof import MARKER
from trainsys.threads import helper

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
SAME_PRESS_S = 0.5
"""One Ctrl-C may come twice, from the terminal and from a launcher that passes it on; a second press comes later."""


class Drain:
    """While entered, SIGTERM, SIGUSR1 and SIGINT set ``requested`` instead of ending the process; a second SIGINT
    ends it at once.

    Before ``begin`` (imports, process group, compilation, the first step) nothing is to be saved: the process
    writes the marker and leaves at once, from a thread of its own, so a main thread that is deep in a compiler
    or waits for a peer does not matter. After ``begin`` the loop has ``grace_s`` seconds to save and leave;
    then the same thread ends the process with what was last saved.

    ``folder``: where the marker goes, the run's checkpoint folder.
    """

    def __init__(self, folder: str | Path, grace_s: float, rank: int = 0) -> None:
        self.folder, self.grace_s, self.rank = Path(folder), grace_s, rank
        self.saved_step: int | None = None
        """The step of the newest complete checkpoint, told by the loop."""
        self._asked = ""
        self._pressed_s: float | None = None
        self._began = False
        self._over = threading.Event()
        self._lock = threading.Lock()

    @property
    def requested(self) -> bool:
        return bool(self._asked)

    @property
    def interrupted(self) -> bool:
        """It was Ctrl-C that asked."""
        return self._asked == signal.SIGINT.name

    @property
    def exit_code(self) -> int:
        """What a process that was asked to stop, and did, exits with."""
        return interrupted_code() if self.interrupted else 0

    @property
    def has_stepped(self) -> bool:
        """A step was done, by this process or by one before it that saved."""
        return self._began or self.saved_step is not None

    def begin(self) -> None:
        """The first step is done: from now on there is something to save."""
        with self._lock:
            self._began = True

    def mark(self) -> None:
        """Write the marker: this run was drained, not finished. Any rank may; one that knows who asked is heard."""
        with suppress(OSError):  # a full disk must not turn a drained run into a failed one
            self.folder.mkdir(parents=True, exist_ok=True)
            note = {"signal": self._asked, "saved_step": self.saved_step, "time_s": time.time()}
            data = json.dumps(note).encode() + b"\n"
            if self._asked:
                write_durable(self.folder / MARKER, data)
                return
            # Stops because another rank was asked, which may have said so already.
            with (self.folder / MARKER).open("xb") as file:
                file.write(data)

    def lost_peer(self, error: Exception) -> None:
        """An error while a stop was under way: with a peer already gone that is the end of a drained run too,
        with what is saved. A UserError or a MachineFault (a save that failed) stays one."""
        if self.requested and not isinstance(fault_of(error), UserError | MachineFault):
            self._leave(f"while others had left; saved is step {self.saved_step}")

    def __enter__(self) -> Drain:
        if self.rank == 0:
            clear_marker(self.folder)
        self._read, self._write = socket.socketpair()
        self._write.setblocking(False)
        # A handler in Python runs only between two bytecodes of the main thread. The byte that the C handler
        # sends through this socket reaches the thread at once.
        self._before = {number: signal.signal(number, _ignore) for number in SIGNALS}
        self._wakeup = signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        self._thread = helper("drain", self._listen)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._over.set()
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._write.close()
        self._thread.join(1.0)
        self._read.close()

    def _listen(self) -> None:
        while data := self._read.recv(64):
            asked = [number for number in data if number in SIGNALS]
            if signal.SIGINT in asked:
                self._press()
            if asked:
                self.ask(signal.Signals(asked[0]).name)

    def _press(self) -> None:
        now = time.monotonic()
        if self._pressed_s is not None and now - self._pressed_s > SAME_PRESS_S:
            self._asked = signal.SIGINT.name
            self._leave(f"a second time; {self._saved_text()}")
        if self._pressed_s is None:
            self._pressed_s = now
            if self.rank == 0 and self._began:
                sys.stderr.write("trainsys: Ctrl-C: saving after this step; once more leaves at once\n")

    def ask(self, by: str) -> None:
        """What a signal does, for another reason; from any thread. Only the first to ask counts."""
        with self._lock:
            if self._asked:
                return
            self._asked = by
            began = self._began
        if not began:
            self._leave("before the first step: nothing to save")
        helper("grace", self._limit).start()

    def _limit(self) -> None:
        if not self._over.wait(self.grace_s):
            self._leave(f"not done {self.grace_s:g} s after it; {self._saved_text()}")

    def _saved_text(self) -> str:
        return "nothing was saved" if self.saved_step is None else f"step {self.saved_step} is saved"

    def _leave(self, why: str) -> NoReturn:
        self.mark()
        if self.rank == 0:
            sys.stderr.write(f"trainsys: stopped by {self._asked} {why}\n")
            sys.stderr.flush()
        os._exit(self.exit_code)


def _ignore(number: int, frame: FrameType | None) -> None:
    """Caught by the thread; this only keeps the default action, death, from happening."""


def was_drained(folder: str | Path) -> bool:
    """Whether the last run in this checkpoint folder was drained."""
    return (Path(folder) / MARKER).is_file()


def clear_marker(folder: str | Path) -> None:
    with suppress(OSError):
        (Path(folder) / MARKER).unlink()
