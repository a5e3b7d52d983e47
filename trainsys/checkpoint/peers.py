"""Copies of the state in the memory of two nodes, which outlive the processes: a lost node restores without
the file system (Wang et al. 2023, Gemini, SOSP).

Each rank's files are kept in a memory file system (``/dev/shm``) of its node and of a node half the world away,
in the same format as on disk. After a restart the newest copy that is whole over all nodes is found, files
are sent to the nodes that need and lack them, and reading goes on as from disk.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
from dataclasses import dataclass
from pathlib import Path

import torch

from trainsys.checkpoint import manifest as manifests
from trainsys.checkpoint.container import Damaged, hash_file
from trainsys.checkpoint.durable import naming
from trainsys.checkpoint.health import Health, health, mark
from trainsys.checkpoint.manifest import Manifest
from trainsys.checkpoint.ranks import Ranks
from trainsys.errors import UserError


def peer_of(rank: int, nodes: list[str]) -> int | None:
    """The rank that keeps ``rank``'s copy: half the world away, or the next after it on another node; None
    where there is one node only."""
    world = len(nodes)
    for shift in range(world):
        other = (rank + world // 2 + shift) % world
        if nodes[other] != nodes[rank]:
            return other
    return None


class PeerMemory:
    """This node's memory folder for one run. ``run``: what tells this run's copies from others', the same in
    all of its attempts (the checkpoint folder's path)."""

    def __init__(self, memory_dir: str, run: str, ranks: Ranks) -> None:
        tag = hashlib.sha256(os.path.abspath(run).encode()).hexdigest()[:12]
        self.root = Path(memory_dir) / f"trainsys-{os.getuid()}-{tag}"
        self.rank = ranks.rank
        # A node is a host and a memory folder on it: two folders on one host can stand for two nodes.
        self.nodes = ranks.to_all(f"{socket.gethostname()}:{os.path.abspath(memory_dir)}")
        self.leads = self.nodes.index(self.nodes[self.rank]) == self.rank
        """This rank is the first of its node."""
        self.unproven: list[Path] = []
        """Copies of this run that no later step has proven yet, oldest first."""

    @property
    def alone(self) -> bool:
        """One node only: its loss would take every copy with it."""
        return peer_of(self.rank, self.nodes) is None

    # ---- keeping ----

    def keep(self, step: int, name: str, head: bytes, data: memoryview) -> str:
        """Put one file of this rank into its node's memory; its sha256. OSError where it does not fit."""
        folder = self._saving(step)
        folder.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256(head)
        digest.update(data)
        with open(folder / name, "wb", buffering=0) as file, naming(folder / name):
            for part in (memoryview(head), data):
                while len(part):
                    part = part[file.write(part) :]
        return digest.hexdigest()

    def exchange(self, step: int, listed: list[list[tuple[str, int]]], ranks: Ranks) -> None:
        """Send this rank's files to its peer and keep those of the ranks whose peer it is. ``listed``: the
        (name, bytes) of every rank's files. All ranks call it."""
        folder = self._saving(step)
        for source, files in enumerate(listed):
            target = peer_of(source, self.nodes)
            for name, size in files if target is not None else ():
                self._send(folder / name, size, source, target, ranks)
        ranks.to_all(None)  # what follows renames the folder, which a slower rank of this node may still need

    def discard(self, step: int) -> None:
        """Give up a copy that could not be made whole."""
        shutil.rmtree(self._saving(step), ignore_errors=True)

    def commit(self, manifest: Manifest, ranks: Ranks) -> None:
        """Every node now has its files: the copy counts, and older ones go once all nodes have it, but for the
        newest healthy one: that goes when this one is proven, see :meth:`mark`."""
        new = self._kept(manifest.step)
        if self.leads:
            if new.exists():
                shutil.rmtree(new)
            manifests.write(manifest, self._saving(manifest.step))
            self._saving(manifest.step).rename(new)
        # Listed while all ranks are here: a faster one may begin the next copy before the old ones are gone.
        old = self._older(new) if self.leads else []
        ranks.to_all(None)
        for path in old:
            shutil.rmtree(path, ignore_errors=True)
        self.unproven = [*(path for path in self.unproven if path not in (*old, new)), new]

    def mark(self, state: Health, step: int) -> None:
        """Write down what ``step`` has shown of the copies since the last that was proven. Speaks to no other rank."""
        if self.leads:
            for path in self.unproven:
                if path.is_dir():
                    mark(path, state, step)
        if state is Health.HEALTHY and self.unproven:
            proven, self.unproven = self.unproven[-1], []
            for path in self._copies() if self.leads else ():
                if path != proven:
                    shutil.rmtree(path, ignore_errors=True)

    def _older(self, new: Path) -> list[Path]:
        """All that makes room for the copy ``new``."""
        healthy = [p for p in self._copies() if p != new and _health(p) is Health.HEALTHY]
        return [path for path in self.root.iterdir() if path not in (new, *healthy[-1:])]

    def _copies(self) -> list[Path]:
        return sorted(self.root.glob("step_*"))

    def clear(self) -> None:
        """The run is over: give the memory back."""
        if self.leads:
            shutil.rmtree(self.root, ignore_errors=True)

    # ---- finding again ----

    def newest(self, lineage: str, ranks: Ranks) -> tuple[Manifest, Path, Health] | None:
        """The newest copy of run ``lineage`` whose every file is whole on some node, where this node has its part
        of it, and its health; a suspect one only where there is no other. The same on every rank; all call it."""
        own: dict[str, bytes] = {}
        here: dict[str, _Held] = {}
        if self.leads and self.root.is_dir():
            for path in self._copies():
                if (copy := _inventory(path, lineage)) is not None:
                    data, held = copy
                    digest = hashlib.sha256(data).hexdigest()
                    own[digest], here[digest] = data, held
        everywhere = ranks.to_all(here)
        copies: dict[str, tuple[int, int, Health]] = {}
        for digest, any_held in {d: held for node in everywhere for d, held in node.items()}.items():
            known = {node[digest].health for node in everywhere if digest in node}
            # One node may not have come to write the last mark.
            state = next(s for s in (Health.HEALTHY, Health.SUSPECT, Health.UNPROVEN) if s in known)
            copies[digest] = any_held.step, any_held.files, state
        for digest, (step, files, state) in sorted(
            copies.items(), key=lambda item: (item[1][2] is Health.SUSPECT, -item[1][0])
        ):
            found = [set(node[digest].names) if digest in node else set() for node in everywhere]
            if len(set().union(*found)) == files:
                # It lists every file of every rank, so one node alone sends it.
                holder = next(rank for rank, node in enumerate(everywhere) if digest in node)
                sent = ranks.to_first(own[digest] if self.rank == holder else b"")
                manifest = manifests.decode(ranks.from_first(b"".join(sent)), "memory")
                folder = self._kept(step)
                self._found = found
                if self.leads and not (folder / manifests.NAME).is_file():
                    folder.mkdir(parents=True, exist_ok=True)
                    manifests.write(manifest, folder)
                ranks.to_all(None)
                return manifest, folder, state
        return None

    def bring(self, manifest: Manifest, needed: set[int], ranks: Ranks) -> None:
        """Send the files that a node's ranks need and its memory lacks from a node that has them, after
        :meth:`newest`. ``needed``: file numbers of this rank. All ranks call it."""
        wanted = ranks.to_all(needed)
        leaders = {node: self.nodes.index(node) for node in self.nodes}
        folder = self._kept(manifest.step)
        for number, file in enumerate(manifest.files):
            holder = next(rank for rank, held in enumerate(self._found) if file.name in held)
            targets = {leaders[self.nodes[rank]] for rank, numbers in enumerate(wanted) if number in numbers}
            for target in sorted(targets):
                if file.name not in self._found[target]:
                    self._send(folder / file.name, file.bytes, holder, target, ranks)
        ranks.to_all(None)

    def _send(self, path: Path, size: int, source: int, target: int, ranks: Ranks) -> None:
        if self.rank == source:
            data = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
            with ranks.calling(target) as peer:
                peer.send(b"file", 0, memoryview(data.numpy()))
        elif self.rank == target:
            data = torch.from_file(str(path), shared=True, size=size, dtype=torch.uint8)
            with ranks.answering(source) as peer:
                peer.receive_into(b"file", 0, memoryview(data.numpy()))

    def _saving(self, step: int) -> Path:
        return self.root / f".saving-{step:010d}"

    def _kept(self, step: int) -> Path:
        return self.root / f"step_{step:010d}"


@dataclass(frozen=True)
class _Held:
    """What one node has of a copy."""

    step: int
    files: int
    """of the copy, on all nodes"""
    names: list[str]
    """of the files that are whole on this one"""
    health: Health


def _inventory(folder: Path, lineage: str) -> tuple[bytes, _Held] | None:
    """The manifest of one copy, and what is here of it; None if it is of another run."""
    try:
        manifest = manifests.read(folder)
    except (Damaged, UserError):
        return None
    if manifest.lineage != lineage:
        return None
    whole = []
    for file in manifest.files:
        path = folder / file.name
        if path.is_file() and path.stat().st_size == file.bytes and hash_file(path) == file.sha256:
            whole.append(file.name)
    return manifests.encode(manifest), _Held(manifest.step, len(manifest.files), whole, health(folder, manifest))


def _health(folder: Path) -> Health:
    try:
        return health(folder, manifests.read(folder))
    except (Damaged, UserError):
        return Health.DAMAGED
