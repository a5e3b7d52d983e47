"""When a rank fails: its error printed once, every other rank quiet, and the exit code kept.

torchrun ends the other ranks when one exits, but each of them may first print a traceback of its own
about the connection it lost, and torchrun turns every exit code into 1. So the ranks agree through a
file: the first to fail creates it, prints, and leaves its exit code there for the launcher.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

from trainsys.blame import note, this_node
from trainsys.errors import EXIT_MACHINE_FAULT, EXIT_USER_ERROR, MachineFault, UserError, fault_of

FAILURE_FILE = "TRAINSYS_FAILURE_FILE"
"""Environment variable: the file by which the ranks of a run agree on who failed first."""

RESTARTS = "TRAINSYS_RESTARTS"
"""Environment variable: how often the local launcher has started the ranks before."""

COMMAND = "TRAINSYS_COMMAND"
"""Environment variable: the command line that started the run, where a launcher stands between."""

EXIT_FAILED = 1
EXIT_INTERRUPTED = 130

# A rank whose peer died sees it before the launcher does. It waits this long for the peer's own report.
_PEER_REPORT_S = 5.0
_LOST_PEER = re.compile(
    r"connection (closed|reset|refused|was likely closed)|broken pipe|socket|timed? ?out|remote process", re.I
)
# What a device or its driver says where the device is broken, and a watchdog of a rank that has fallen silent: one
# such report is enough. What NCCL says where a system call or the driver failed is a reason to suspect the node.
_BROKEN = re.compile(
    r"uncorrectable|\bXid\b|double.bit|fallen off the bus|no CUDA-capable device|device is lost|missing: no word",
    re.I,
)
_SUSPECT = re.compile(r"NCCL.*(unhandled (system|cuda)|internal) error", re.I | re.S)
_DISTRIBUTED_ERRORS = ("LostPeer", "DistBackendError", "DistNetworkError", "DistStoreError", "DistQueueEmptyError")


@dataclass(frozen=True)
class Failure:
    """What the first failing rank left behind."""

    rank: int
    code: int
    message: str
    host: str = ""
    """The node it happened on; empty: no node's fault."""
    lost_peer: bool = False
    """It looks like the consequence of another rank's end, which has left no word."""

    @property
    def line(self) -> str:
        return self.message.splitlines()[0] if self.message else ""


@contextmanager
def guard() -> Iterator[None]:
    """Around all the work of a rank, and outside of any clean-up that talks to other ranks.

    A UserError ends the process with exit code 2 and one line, a MachineFault with 75 and one line, any other
    exception with 1 and one block that names the rank; of all ranks only the first to fail prints. With more than
    one rank the process leaves at once, without the clean-up at exit that could wait for dead peers. Process groups
    must not be destroyed between the error and this guard: peers would then fail first.
    """
    try:
        yield
    except KeyboardInterrupt:
        _leave(interrupted_code())
    except Exception as error:
        code = EXIT_FAILED
        try:
            code = report(error)
        finally:  # whatever became of the report: without memory it may fail too
            _leave(code)


def interrupted_code() -> int:
    """What a process exits with after Ctrl-C: 130, but 0 for a rank of torchrun, which would start it again."""
    return 0 if "TORCHELASTIC_RESTART_COUNT" in os.environ else EXIT_INTERRUPTED


def exit_code(error: Exception) -> int:
    """What a process that ends with ``error`` exits with."""
    error = fault_of(error)
    if isinstance(error, UserError):
        return EXIT_USER_ERROR
    return EXIT_MACHINE_FAULT if isinstance(error, MachineFault) else EXIT_FAILED


def error_lines(error: Exception) -> str:
    """What a UserError or MachineFault says, each mistake or fault as one line for the terminal."""
    return "".join(f"trainsys: error: {line}\n" for line in str(error).splitlines() or [""])


def read_failure(path: Path) -> Failure | None:
    """What the ranks of a run's last attempt left in its failure file; None if nothing readable."""
    attempts = sorted(path.parent.glob(f"{path.name}.*"), key=lambda p: int(p.suffix[1:]))
    path = attempts[-1] if attempts else path
    try:
        return Failure(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def accuse(failure: Failure) -> None:
    """Note ``failure`` against the node it happened on: see :mod:`trainsys.blame` for what comes of it."""
    sure = _BROKEN.search(failure.message) is not None
    if failure.host and (sure or not failure.lost_peer or _SUSPECT.search(failure.message)):
        note(failure.host, f"rank {failure.rank}: {failure.line}", sure)


def report(error: Exception) -> int:
    """Print ``error`` if this rank is the first to fail; the exit code."""
    rank, world = _identity()
    error = fault_of(error)
    code = exit_code(error)
    lost_peer = _is_lost_peer(error)
    if (agreed := agreed_file()) is not None:
        if lost_peer:
            _wait_for(agreed, _PEER_REPORT_S)
        if not claim(agreed, Failure(rank, code, _said(error), _host(error), lost_peer)):
            return code
    if isinstance(error, UserError):
        # Without a file to agree by, every rank that reads the same config fails alike: rank 0 speaks.
        text = error_lines(error) if agreed is not None or rank == 0 else ""
    elif isinstance(error, MachineFault):
        text = error_lines(error)
    else:
        whose = f"trainsys: rank {rank} of {world} failed\n" if world > 1 else ""
        own_frame = error.__traceback__
        shown = own_frame.tb_next if own_frame else None
        text = whose + "".join(traceback.format_exception(type(error), error, shown))
    sys.stdout.flush()
    sys.stderr.write(text)
    return code


def _said(error: Exception) -> str:
    return str(error) if isinstance(error, MachineFault) else f"{type(error).__name__}: {error}"


def _host(error: Exception) -> str:
    if isinstance(error, UserError):
        return ""
    host = error.host if isinstance(error, MachineFault) else None
    return this_node() if host is None else host


def claim(path: Path, failure: Failure) -> bool:
    """Create the failure file, whole, unless it is there already; whether this call created it."""
    try:
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
            json.dump(asdict(failure), file)
    except OSError:
        return True  # No shared place to agree by (a full disk): better printed twice than never.
    try:
        os.link(file.name, path)
    except OSError:
        return not path.exists()
    finally:
        os.unlink(file.name)
    return True


def agreed_file() -> Path | None:
    """The file the launcher named, or one in the folder that torchrun makes for each attempt."""
    if named := os.environ.get(FAILURE_FILE):
        # Each attempt of a run that is restarted agrees anew.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return Path(named if attempt == "0" else f"{named}.{attempt}")
    if per_rank := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        return Path(per_rank).parents[1] / "trainsys_failure.json"
    return None


def _is_lost_peer(error: Exception) -> bool:
    """Whether ``error`` looks like the consequence of another rank's end rather than a cause."""
    if _identity()[1] == 1:
        return False
    if isinstance(error, MachineFault) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # those who wait for a rank that never comes see only that nobody answers
    if type(error).__name__ in _DISTRIBUTED_ERRORS or isinstance(error, ConnectionError):
        return True
    return isinstance(error, RuntimeError) and _LOST_PEER.search(str(error)) is not None


def _wait_for(path: Path, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.02)


def _identity() -> tuple[int, int]:
    """(rank, world) as torchrun gives them to a process; (0, 1) outside of it."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def _leave(code: int) -> NoReturn:
    if _identity()[1] == 1:
        raise SystemExit(code)
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
