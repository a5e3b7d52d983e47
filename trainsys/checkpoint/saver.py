"""Saving: snapshot, write in the background, commit once every rank's files are durable."""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from trainsys.blame import this_node
from trainsys.checkpoint.atoms import DTYPES, Piece, assign, check_tiling, nbytes
from trainsys.checkpoint.container import CHUNK, write_pieces
from trainsys.checkpoint.durable import naming
from trainsys.checkpoint.folder import Folder
from trainsys.checkpoint.health import Health
from trainsys.checkpoint.lanes import sha256_each
from trainsys.checkpoint.manifest import Atom, File, Manifest, Part
from trainsys.checkpoint.peers import PeerMemory
from trainsys.checkpoint.ranks import Ranks
from trainsys.checkpoint.snapshot import (
    Planned,
    Room,
    Snapshot,
    file_bytes,
    order,
    plan_files,
    refuse_too_large,
)
from trainsys.config.run import CheckpointConfig
from trainsys.engines.base import LocalTensor
from trainsys.errors import FULL, MachineFault, UserError, is_machines
from trainsys.hardware.machine import free_memory
from trainsys.rank_lists import by_text
from trainsys.threads import Lane

WRITERS = 3
"""Files of a rank that are written at once: while one is made durable, the next is handed over."""
RETRIES = 3
T = TypeVar("T")


@dataclass
class Progress:
    """Where a run is, besides its tensors."""

    step: int
    data_step: int
    updates: int
    loss: float | None = None
    recent_losses: list[float] = field(default_factory=list)
    skipped: int = 0
    """Steps in a row, up to this one, whose update was skipped."""
    samples: int | None = None


@dataclass(frozen=True)
class Saved:
    """A checkpoint that was committed."""

    name: str
    step: int
    seconds: float
    """From the snapshot to the commit."""


@dataclass
class _Part:
    """What one rank tells rank 0 about its part of a save."""

    files: list[tuple[str, int, str]] = field(default_factory=list)
    parts: list[tuple[Piece, int, int]] = field(default_factory=list)
    """(piece, number of the file within this rank, offset)."""
    error: str = ""
    host: str | None = None
    """Host name of the rank whose machine is at fault; empty: the shared disk is; None: no machine is."""

    def fail(self, error: OSError | UserError | MemoryError, *, own_disk: bool = False) -> None:
        self.error = _tell(error)
        if isinstance(error, OSError) and is_machines(error):
            self.host = "" if error.errno in FULL and not own_disk else this_node()


class Saver:
    """Writes checkpoints of one run into ``folder``; every rank has one and calls it alike.

    ``state``: every tensor of this rank with its place, the same names and places at each call.
    ``header``: the manifest's fields that do not change during a run.
    An error of a save is raised at the next one, at ``wait`` or at ``close``, on every rank: UserError, or MachineFault
    where a disk is full or fails.
    """

    def __init__(
        self,
        cfg: CheckpointConfig,
        folder: Folder,
        ranks: Ranks,
        state: Callable[[], Sequence[LocalTensor]],
        header: dict[str, Any],
        *,
        warn: Callable[[str], None] = lambda text: None,
        pinned: bool = False,
        file_bytes: int | None = None,
        retry_wait_s: float = 0.5,
    ) -> None:
        self.cfg, self.folder, self.ranks = cfg, folder, ranks
        self._state, self._header, self._pinned = state, header, pinned
        self._warn = warn
        self._file_bytes, self._retry_wait_s = file_bytes, retry_wait_s
        self._behind = ranks.beside()
        self._writing = Lane("ckpt-write")
        self._draining = Lane("ckpt-drain")
        self._write: Future[_Part] | None = None
        self._busy: Future[Any] | None = None
        self._drains: list[Future[Saved | UserError | MachineFault | None]] = []
        self._marks: list[Future[None]] = []
        self._awaited, self._doubted = False, False
        """Something was saved that no later step has proven yet; and a later step was skipped."""
        self._unproven: list[str] = []
        """The names of it, oldest first. Once saves are under way, the draining thread's alone."""
        self._closing = threading.Event()
        self._snapshot: Snapshot | None = None
        self.saved: list[Saved] = []
        """Every checkpoint that this run has committed, as far as it has been waited for."""
        self.last_step: int | None = None
        """The step of the newest save that was started, or of what the run has gone back to."""
        self.may_write: Callable[[], None] = lambda: None
        """Asked on rank 0 before anything in the folder counts or goes: raises where it has become another run's."""
        self.memory: PeerMemory | None = None
        """Takes copies into the memory of two nodes, where the run wants them."""

    def save(
        self, progress: Progress, *, disk: bool = True, memory: bool = False, wait: bool = False
    ) -> None:
        """Take a snapshot now; write it to the folder (``disk``) and to two nodes' memory (``memory``) behind.

        Waits for the save before it where that is still being written, and with ``wait`` (or mode sync) until
        this one is committed. UserError or MachineFault where one has failed.
        """
        # Staged, one save may still drain to the shared file system while the next is written locally.
        self._await(leave=1 if self.cfg.local_dir and not wait else 0)
        began = time.perf_counter()
        state = self._state()
        if self._snapshot is None:
            self._plan(state)
        assert self._snapshot is not None
        self._snapshot.fill([state[i].data for i in self._mine])
        self._awaited = True
        if memory and self.memory is not None:
            self._drains.append(self._draining.submit(self._remember, progress))
            self._busy = self._drains[-1]
        if disk:
            self.last_step = progress.step
            token = self.ranks.from_first(f"{time.time_ns():x}")
            write = self._writing.submit(self._write_part, progress.step, token)
            self._write = write
            self._drains.append(self._draining.submit(self._drain, write, progress, token, began))
        if wait or self.cfg.mode == "sync":
            self._await()

    def judged(self, step: int, normal: bool) -> None:
        """``step`` steps are done, and the last was ``normal`` (finite, its update applied) or not: so what was saved
        before it is healthy, or suspect. To be called after each step, before its own save; costs nothing."""
        if self._awaited and (normal or not self._doubted):
            state = Health.HEALTHY if normal else Health.SUSPECT
            self._marks.append(self._draining.submit(self._mark, step, state))
        self._awaited, self._doubted = self._awaited and not normal, not normal

    def went_back(self, step: int, path: Path) -> None:
        """The run goes on from the checkpoint ``path``: the steps that follow speak for it, and for no later one."""
        self.wait()
        self.last_step = step
        self._unproven = [path.name] if path.parent.resolve() == self.folder.root.resolve() else []
        if self.memory is not None:
            self.memory.unproven = [path] if path.parent == self.memory.root else []
        self._awaited, self._doubted = True, False

    def prepare(self) -> None:
        """Plan the files and take the memory of the copy, which the first save would do; UserError where there is too
        little. Once there is a state, and before steps that would be lost."""
        if self._snapshot is None:
            self._plan(self._state())

    def wait(self) -> None:
        """Until every save that was started is committed, and what is known of them written down; UserError or
        MachineFault where a save has failed."""
        self._await()
        while self._marks:
            self._marks.pop(0).result()

    def close(self, *, abandon: bool = False) -> None:
        """End the background work: after it is done, or (``abandon``, on an error elsewhere) as soon as it can."""
        if abandon:
            self._closing.set()
        try:
            if not abandon:
                self.wait()
        finally:
            self._writing.shutdown(wait=not abandon, cancel_futures=abandon)
            self._draining.shutdown(wait=not abandon, cancel_futures=abandon)
            self._behind.close()

    # ---- the step's thread ----

    def _await(self, leave: int = 0) -> None:
        for user in (self._write, self._busy):
            if user is not None:
                user.result()  # the snapshot's memory is free again
        while self._marks and self._marks[0].done():
            self._marks.pop(0).result()
        while len(self._drains) > leave:
            outcome = self._drains.pop(0).result()
            if isinstance(outcome, Exception):
                raise outcome
            if outcome is not None:
                self.saved.append(outcome)

    def _plan(self, state: Sequence[LocalTensor]) -> None:
        """Once a run: rank 0 learns what all hold, and every rank which boxes are its to write."""
        pieces: list[Piece] = [
            (t.name, DTYPES[t.data.dtype], t.place.full_shape, t.place.bounds) for t in state
        ]
        told = self.ranks.to_first((pieces, Room(socket.gethostname(), free_memory())))
        by_rank = [theirs for theirs, _ in told]
        if by_rank:
            check_tiling(by_rank)
        assigned = assign(by_rank)
        sizes = [sum(nbytes(theirs[i]) for i in mine) for theirs, mine in zip(by_rank, assigned, strict=True)]
        self.ranks.on_first(lambda: refuse_too_large(sizes, [room for _, room in told]))
        self._mine = order(pieces, self.ranks.each(assigned))
        mine = [pieces[i] for i in self._mine]
        size = sum(map(nbytes, mine))
        self._files = plan_files(mine, self.ranks.rank, self._file_bytes or file_bytes(size))
        self._snapshot = Snapshot(size, self._pinned)

    # ---- the writing thread: no other rank is spoken to ----

    def _write_part(self, step: int, token: str) -> _Part:
        part = _Part()
        try:
            local = Path(self.cfg.local_dir) if self.cfg.local_dir else None
            target = self._try(
                lambda: Folder(local / f"rank_{self.ranks.rank:05d}" if local else self.folder.root).saving(
                    step, token
                )
            )
            with ThreadPoolExecutor(WRITERS + 1, "trainsys-ckpt-file") as pool:
                # What is in memory is hashed, beside the writing: the disk and the processor wait for neither.
                digests = pool.submit(sha256_each, [*map(self._pieces, self._files)], self._closing.is_set)
                list(pool.map(lambda f: self._try(lambda: self._write_file(target, f)), self._files))
                hashes = digests.result()
        except (OSError, UserError, MemoryError) as error:
            part.fail(error, own_disk=self.cfg.local_dir is not None)
            return part
        for number, (planned, sha256) in enumerate(zip(self._files, hashes, strict=True)):
            part.files.append((planned.name, len(planned.head) + planned.stop - planned.start, sha256))
            part.parts += [(piece, number, offset) for piece, offset in planned.parts]
        return part

    def _write_file(self, target: Path, planned: Planned) -> None:
        write_pieces(target / planned.name, self._pieces(planned), self._closing.is_set)

    def _pieces(self, planned: Planned) -> list[memoryview]:
        assert self._snapshot is not None
        return [memoryview(planned.head), self._snapshot.view(planned.start, planned.stop)]

    def _try(self, work: Callable[[], T]) -> T:
        """``work`` again, up to three times with doubling waits, where the storage fails."""
        for attempt in range(RETRIES + 1):
            try:
                return work()
            except InterruptedError:
                raise
            except OSError:
                if attempt == RETRIES or self._closing.wait(self._retry_wait_s * 2**attempt):
                    raise
        raise AssertionError("unreachable")

    # ---- the draining thread: it alone speaks to the other ranks' draining threads ----

    def _drain(
        self, write: Future[_Part], progress: Progress, token: str, began: float
    ) -> Saved | UserError | MachineFault:
        """Bring this rank's files to the shared folder, then commit together; an error as a value."""
        part = write.result()
        saving = self.folder.root / f".saving-step_{progress.step:010d}-{token}"
        if self.cfg.local_dir and not part.error:
            try:
                self._try(lambda: self._copy_from_local(part, progress.step, token))
            except (OSError, UserError, MemoryError) as error:
                part.fail(error)
        parts = self._behind.to_first(part)
        outcome: Saved | UserError | MachineFault = UserError("")
        if self.ranks.rank == 0:
            try:
                outcome = self._commit(parts, saving, progress, began)
            except (OSError, UserError) as error:
                part.fail(error)
                outcome = _failed([part], f"checkpoint of step {progress.step} was not written: {part.error}")
            if isinstance(outcome, Exception):
                shutil.rmtree(saving, ignore_errors=True)  # its room may be what the next one lacks
        return self._behind.from_first(outcome)

    def _copy_from_local(self, part: _Part, step: int, token: str) -> None:
        assert self.cfg.local_dir is not None
        target = self.folder.saving(step, token)
        source = Folder(Path(self.cfg.local_dir) / f"rank_{self.ranks.rank:05d}").saving(step, token)
        for name, _, sha256 in part.files:
            copy_durable(source / name, target / name, sha256)
        shutil.rmtree(source, ignore_errors=True)

    def _commit(
        self, parts: list[_Part], saving: Path, progress: Progress, began: float
    ) -> Saved | UserError | MachineFault:
        if failed := _errors(parts):
            newest = next(iter(self.folder.read_all()[0]), None)
            rest = f"; the newest complete one is {newest[0]}" if newest else "; there is no complete one yet"
            text = f"checkpoint of step {progress.step} was not written ({failed}){rest}"
            return _failed(parts, text)
        self._try(self.may_write)
        manifest = self._manifest(parts, progress)
        name = self._try(lambda: self.folder.commit(saving, manifest))
        self._unproven.append(name)
        if len(self._unproven) > 1:  # the step that proves a checkpoint is what makes older ones go
            self._retain()
        return Saved(name, progress.step, time.perf_counter() - began)

    def _retain(self) -> None:
        with suppress(OSError):  # old checkpoints that cannot be deleted cost room, not the run
            self.folder.retain(self.cfg.keep_last, self.cfg.keep_every, self.cfg.keep_best)

    def _mark(self, step: int, state: Health) -> None:
        if self.memory is not None:
            self.memory.mark(state, step)
        if not self._unproven:
            return
        try:
            self._try(self.may_write)
            self._try(lambda: self.folder.mark(self._unproven, state, step))
        except (OSError, UserError) as error:
            self._warn(f"that {self._unproven[-1]} is {state.value} was not written down: {_tell(error)}")
            return
        if state is Health.HEALTHY:
            self._unproven = []
            self._retain()

    def _manifest(self, parts: list[_Part], progress: Progress) -> Manifest:
        manifest = Manifest(
            step=progress.step,
            data_step=progress.data_step,
            samples=progress.samples,
            updates=progress.updates,
            loss=progress.loss if progress.loss is not None and abs(progress.loss) < float("inf") else None,
            recent_losses=progress.recent_losses,
            skipped=progress.skipped,
            created_s=time.time(),
            world=self.ranks.world,
            files=[],
            atoms={},
            **self._header,
        )
        for part in parts:
            first = len(manifest.files)
            manifest.files += [File(*file) for file in part.files]
            for (name, dtype, shape, box), number, offset in part.parts:
                atom = manifest.atoms.setdefault(name, Atom(dtype, shape, []))
                atom.parts.append(Part(first + number, offset, box))
        return manifest

    def _remember(self, progress: Progress) -> None:
        """The copy in memory: this rank's files here and on another node, then one manifest on every node."""
        memory, snapshot = self.memory, self._snapshot
        assert memory is not None
        assert snapshot is not None
        part = _Part()
        try:
            for number, planned in enumerate(self._files):
                data = snapshot.view(planned.start, planned.stop)
                sha256 = memory.keep(progress.step, planned.name, planned.head, data)
                part.files.append((planned.name, len(planned.head) + len(data), sha256))
                part.parts += [(piece, number, offset) for piece, offset in planned.parts]
        except (OSError, MemoryError) as error:
            part.error = _tell(error)
        parts = self._behind.to_first(part)
        failed = _errors(parts)
        listed = [[(name, size) for name, size, _ in p.files] for p in parts]
        manifest = self._manifest(parts, progress) if parts and not failed else None
        failed, listed, manifest = self._behind.from_first((failed, listed, manifest))
        if manifest is None:
            memory.discard(progress.step)
            self._warn(f"no copy in memory of step {progress.step}: {failed}")
            return
        memory.exchange(progress.step, listed, self._behind)
        memory.commit(manifest, self._behind)


def copy_durable(source: Path, target: Path, sha256: str) -> None:
    """Copy a file and make it durable, but for its name, which the commit syncs; OSError where what was read is not
    what ``sha256`` says."""
    digest = hashlib.sha256()
    with open(source, "rb", buffering=0) as read, open(target, "wb", buffering=0) as write, naming(target):
        while chunk := read.read(CHUNK):
            digest.update(chunk)
            rest = memoryview(chunk)
            while len(rest):
                rest = rest[write.write(rest) :]
        os.fsync(write.fileno())
    if digest.hexdigest() != sha256:
        raise OSError(f"{source}: was damaged on the local disk before it was copied")


def _failed(parts: Sequence[_Part], text: str) -> UserError | MachineFault:
    """What all ranks raise: a machine's fault where it was one of them, with the node if it was only one."""
    hosts = {part.host for part in parts if part.host is not None}
    if not hosts:
        return UserError(text)
    return MachineFault(text, host=hosts.pop() if len(hosts) == 1 else "")


def _errors(parts: Sequence[_Part]) -> str:
    """What failed on which ranks; empty: nothing."""
    return by_text({rank: part.error for rank, part in enumerate(parts) if part.error})


def _tell(error: Exception) -> str:
    if isinstance(error, MemoryError):
        return "out of host memory"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)
