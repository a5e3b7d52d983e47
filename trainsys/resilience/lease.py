"""One live run to a checkpoint folder: ``lease.json`` says whose it is, and a thread of rank 0 keeps renewing it.

Two runs in one folder would each delete the other's checkpoints. So a second one is refused while the first is alive,
and takes over from one that is not: a process of this machine that is gone, an earlier attempt of the same job, or a
lease that is not renewed for ``STALE_S`` while it is watched. No two machines' clocks are compared for that.
"""

from __future__ import annotations

import os
import secrets
import socket
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import msgspec

from trainsys.checkpoint.durable import make_dir
from trainsys.checkpoint.ranks import Ranks
from trainsys.errors import MachineFault, UserError
from trainsys.threads import helper

NAME = "lease.json"
BEAT_S = 5.0
STALE_S = 45.0


class Owner(msgspec.Struct, frozen=True):
    """Who holds a lease."""

    token: str
    """Random: no two attempts have the same."""
    run: str
    job: str
    """What the scheduler or the launcher calls the job, the same in all of its attempts; empty: unknown."""
    attempt: int
    host: str
    kernel: str
    """Boot ID of the machine, and its PID namespace."""
    pid: int
    started: str
    """When the process started, as its kernel counts: a number that is used again is another process."""
    since_s: float
    beat: int = 0

    @staticmethod
    def here(attempt: int) -> Owner:
        pid = os.getpid()
        return Owner(
            secrets.token_hex(8),
            "",
            _job(),
            attempt,
            socket.gethostname(),
            _kernel(),
            pid,
            _started(pid),
            time.time(),
        )

    def __str__(self) -> str:
        run, job = self.run and f"run {self.run}, ", self.job and f", {self.job}"
        return f"{run}process {self.pid} on {self.host}{job}"

    def over(self, mine: Owner) -> str:
        """Why this owner is certainly gone, seen by ``mine``; empty: it may be alive."""
        if self.kernel and self.kernel == mine.kernel and _started(self.pid) != self.started:
            return "that process is gone"
        if self.job and self.job == mine.job and self.attempt < mine.attempt:
            return "an earlier attempt of this job"
        return ""


class Lease:
    """Entered by every rank of a run before it reads or writes ``folder``. UserError where another run is alive in
    it, MachineFault where the folder cannot be written.

    ``attempt``: how often this job was started before. ``notes``: what is to be told about how it was got.
    """

    def __init__(
        self,
        folder: str | Path,
        ranks: Ranks | None = None,
        attempt: int = 0,
        beat_s: float = BEAT_S,
        stale_s: float = STALE_S,
    ) -> None:
        self.root, self.path = Path(folder), Path(folder) / NAME
        self.notes: list[str] = []
        self._ranks = ranks or Ranks()
        self._attempt, self._beat_s, self._stale_s = attempt, beat_s, stale_s
        self._mine: Owner | None = None
        self._over = threading.Event()
        self._lock = threading.Lock()

    def check(self) -> None:
        """UserError where another run has taken over; on rank 0."""
        now = self._read()
        if self._mine is not None and now is not None and now.token != self._mine.token:
            raise UserError(
                f"{self.root} was taken over by {now}, as this run had not renewed its lease for {self._stale_s:g} s: "
                "it saves and deletes nothing there any more"
            )

    def named(self, run: str) -> None:
        """From now on the lease tells the run's id as well."""
        with suppress(OSError):
            self._renew(run)

    def __enter__(self) -> Lease:
        self._ranks.on_first(self._acquire)
        if self._mine is not None:
            helper("lease", self._keep).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._over.set()
        with self._lock, suppress(OSError):
            now = self._read()
            if self._mine is not None and now is not None and now.token == self._mine.token:
                self.path.unlink()
                self.root.rmdir()  # where nothing was saved

    # ---- getting it ----

    def _acquire(self) -> None:
        mine = Owner.here(self._attempt)
        try:
            make_dir(self.root)
            while not self._create(mine):
                raw = self._raw()
                if raw is None:
                    continue  # it was given back between the two
                owner = _decode(raw)
                why = owner.over(mine) if owner else ""
                if not why and not (why := self._watch(raw, owner)):
                    continue
                self._write(mine)
                self.notes.append(f"took over {self.root} from {owner or 'an unreadable lease'}: {why}")
                break
        except (NotADirectoryError, FileExistsError, PermissionError) as error:
            raise UserError(
                f"checkpoint folder {self.root}: {error.strerror}; set checkpoint.folder"
            ) from None
        except OSError as error:
            raise MachineFault(f"checkpoint folder {self.root}: {error.strerror}") from None
        self._mine = mine

    def _watch(self, raw: bytes, owner: Owner | None) -> str:
        """Why the lease is stale; empty: it was given back. UserError as soon as it is renewed."""
        began = time.monotonic()
        sys.stderr.write(
            f"trainsys: {self.root} is held by {owner or 'an unreadable lease'}; "
            f"watching for {self._stale_s:g} s whether it is alive\n"
        )
        while time.monotonic() - began < self._stale_s:
            time.sleep(min(0.2, self._beat_s / 4))
            now = self._raw()
            if now is None:
                return ""
            if now != raw:
                alive = _decode(now)
                since = (
                    f"since {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(alive.since_s))}"
                    if alive
                    else ""
                )
                raise UserError(
                    f"{self.root} is in use {since} by {alive or 'another run'}, which renewed its lease "
                    f"{self._age():.0f} s ago; two runs would delete each other's checkpoints: stop that one, or give "
                    "this one another name or checkpoint.folder"
                )
        return f"its lease was not renewed for {self._stale_s:g} s"

    def _age(self) -> float:
        """Seconds since the lease was renewed, by the clock of the file system alone."""
        probe = self.root / f".lease.{secrets.token_hex(4)}"
        try:
            probe.touch()
            return max(0.0, probe.stat().st_mtime - self.path.stat().st_mtime)
        finally:
            probe.unlink(missing_ok=True)

    # ---- keeping it ----

    def _keep(self) -> None:
        while not self._over.wait(self._beat_s):
            try:
                self.check()
                self._renew()
            except UserError:
                return  # the next save finds out, and says so
            except OSError:
                continue  # a file system that fails for a while: the next beat may work

    def _renew(self, run: str | None = None) -> None:
        with self._lock:
            if self._mine is not None and not self._over.is_set():
                self._mine = msgspec.structs.replace(
                    self._mine, beat=self._mine.beat + 1, run=self._mine.run if run is None else run
                )
                self._write(self._mine)

    # ---- the file ----

    def _raw(self) -> bytes | None:
        try:
            return self.path.read_bytes()
        except FileNotFoundError:
            return None

    def _read(self) -> Owner | None:
        raw = self._raw()
        return None if raw is None else _decode(raw)

    def _create(self, owner: Owner) -> bool:
        """Write the lease if there is none, as one of any number of processes that try."""
        try:
            with open(self.path, "xb") as file:
                file.write(msgspec.json.encode(owner) + b"\n")
        except FileExistsError:
            return False
        return True

    def _write(self, owner: Owner) -> None:
        # Not synced: after a power cut nobody is alive to hold it.
        beside = self.root / f".lease.{owner.token}"
        beside.write_bytes(msgspec.json.encode(owner) + b"\n")
        os.replace(beside, self.path)


def _decode(raw: bytes) -> Owner | None:
    try:
        return msgspec.json.decode(raw, type=Owner)
    except msgspec.DecodeError:
        return None


def _job() -> str:
    env = os.environ
    if job := env.get("SLURM_JOB_ID"):
        return f"Slurm job {job}"
    if "JOB_COMPLETION_INDEX" in env and (head := env.get("PET_MASTER_ADDR")):
        return f"job of {head}"
    run = env.get("TORCHELASTIC_RUN_ID", "none")
    return "" if run == "none" else f"torchrun {run}"


def _kernel() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _started(pid: int) -> str:
    """The start of a live process in its kernel's ticks; empty: there is none."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except (OSError, ValueError):
        return ""
    return "" if state in "ZX" else fields[18]
