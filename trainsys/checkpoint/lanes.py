"""The sha256 of many buffers at once, on processors whose own instructions do not do it.

OpenSSL hashes 1.5-2 GB/s a core where there are SHA instructions (AMD since Zen, Intel servers since Ice Lake, ARM)
and 0.3-0.4 GB/s where there are none (Cascade Lake: the first A100 machines of two clouds), far below a disk. There
``lanes.c`` takes in sixteen files side by side, in one vector register, three times as fast. It is compiled on
first use and kept in the user's cache; without a compiler, or where what it gives is not sha256, hashlib does it.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

LANES = 16
BLOCK = 64
_AT_ONCE = (8 << 20) // BLOCK
_SOURCE = Path(__file__).with_suffix(".c")
_START = (0x6A09E667, 0xBB67AE85, 0x3C6EF372, 0xA54FF53A, 0x510E527F, 0x9B05688C, 0x1F83D9AB, 0x5BE0CD19)
# With fewer files than this in the lanes one hashlib is as fast.
_FEWEST = 6
# A node runs one rank per device; more threads per rank would compete with those that feed the data.
_THREADS = 4

Pieces = Sequence[memoryview]
"""A file as what is written to it, one after the other."""


def sha256_each(files: Sequence[Pieces], stop: Callable[[], bool] = lambda: False) -> list[str]:
    """The sha256 of each (hex). ``stop`` is asked now and then; true ends it with InterruptedError."""
    kernel = _kernel()
    sizes = [sum(p.nbytes for p in pieces) for pieces in files]
    # One that is much longer than the others would leave the other lanes empty.
    most = 2 * sum(sizes) / LANES
    beside = [i for i, pieces in enumerate(files) if sizes[i] <= most and _whole_blocks(pieces)]
    if kernel is None or len(beside) < _FEWEST:
        beside = []
    alone = sorted(set(range(len(files))).difference(beside), key=lambda i: -sizes[i])
    out = [""] * len(files)
    threads = max(1, min(len(alone) + bool(beside), os.cpu_count() or 1, _THREADS))
    with ThreadPoolExecutor(threads, "trainsys-sha256") as pool:
        together = pool.submit(_together, kernel, [files[i] for i in beside], stop) if beside else None
        for i, digest in zip(alone, pool.map(lambda i: _alone(files[i], stop), alone), strict=True):
            out[i] = digest
        if together is not None:
            for i, digest in zip(beside, together.result(), strict=True):
                out[i] = digest
    return out


def _whole_blocks(pieces: Pieces) -> bool:
    return all(p.nbytes % BLOCK == 0 for p in pieces[:-1])


def _alone(pieces: Pieces, stop: Callable[[], bool]) -> str:
    digest = hashlib.sha256()
    for piece in pieces:
        data = piece.cast("B")
        for start in range(0, len(data), _AT_ONCE * BLOCK):
            if stop():
                raise InterruptedError("hashing was given up")
            digest.update(data[start : start + _AT_ONCE * BLOCK])
    return digest.hexdigest()


class _Lane:
    """One message on its way: arrays of whole blocks, the padding last."""

    def __init__(self, index: int, pieces: Pieces) -> None:
        self.index = index
        parts = [np.frombuffer(p, np.uint8) for p in pieces if p.nbytes]
        length = sum(p.size for p in parts)
        rest = length % BLOCK
        end = parts[-1][parts[-1].size - rest :].tobytes() if rest else b""
        if rest:
            parts[-1] = parts[-1][:-rest]
        end += b"\x80" + bytes(-(len(end) + 9) % BLOCK) + (8 * length).to_bytes(8, "big")
        self._parts = [p for p in (*parts, np.frombuffer(end, np.uint8)) if p.size]
        self._at = 0

    @property
    def left(self) -> int:
        """Blocks in a row."""
        return (self._parts[0].size - self._at) // BLOCK

    @property
    def address(self) -> int:
        return int(self._parts[0].ctypes.data) + self._at

    def advance(self, blocks: int) -> bool:
        """Whether the message is at its end."""
        self._at += blocks * BLOCK
        if self._at == self._parts[0].size:
            self._parts.pop(0)
            self._at = 0
        return not self._parts


def _together(kernel: Any, files: Sequence[Pieces], stop: Callable[[], bool]) -> list[str]:
    out = [""] * len(files)
    # The longest first: the lanes then run empty at nearly the same time.
    waiting = sorted(range(len(files)), key=lambda i: sum(p.nbytes for p in files[i]))
    state = np.tile(np.array(_START, np.uint32)[:, None], (1, LANES))
    lanes: list[_Lane | None] = [None] * LANES
    while True:
        for n in range(LANES):
            if lanes[n] is None and waiting:
                lanes[n] = _Lane(waiting[-1], files[waiting.pop()])
                state[:, n] = _START
        busy = [lane for lane in lanes if lane is not None]
        if not busy:
            return out
        if stop():
            raise InterruptedError("hashing was given up")
        blocks = min(_AT_ONCE, *(lane.left for lane in busy))
        # An empty lane reads along with another; what comes of it is not looked at.
        where = (ctypes.c_void_p * LANES)(*[(lane or busy[0]).address for lane in lanes])
        kernel(state.ctypes.data, where, blocks)
        for n, lane in enumerate(lanes):
            if lane is not None and lane.advance(blocks):
                out[lane.index] = state[:, n].astype(">u4").tobytes().hex()
                lanes[n] = None


@cache
def _kernel() -> Any:
    """The compiled function, or None where it is not needed, cannot be made, or is not right."""
    features = _features()
    if "sha_ni" in features or "sha2" in features or not features & {"avx2", "avx512f"}:
        return None
    with suppress(OSError, subprocess.SubprocessError):
        kernel = ctypes.CDLL(str(_compiled(features))).trainsys_sha256_lanes
        kernel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
        kernel.restype = None
        probe = [[memoryview(bytes(range(256)) * n)[: 256 * n - n]] for n in range(1, LANES + 3)]
        if _together(kernel, probe, lambda: False) == [_alone(p, lambda: False) for p in probe]:
            return kernel
    return None


def _features() -> frozenset[str]:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return frozenset(line.partition(":")[2].split())
    return frozenset()


def _compiled(features: frozenset[str]) -> Path:
    """The library for this processor: made once, under the user's cache."""
    compiler = shlex.split(os.environ.get("CC", "")) or [shutil.which("cc") or shutil.which("gcc") or "cc"]
    # A home folder is shared by machines whose processors differ.
    made_of = _SOURCE.read_bytes() + " ".join([platform.machine(), *compiler, *sorted(features)]).encode()
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trainsys"
    library = root / f"sha256_lanes_{hashlib.sha256(made_of).hexdigest()[:16]}.so"
    if not library.exists():
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root) as folder:
            beside = Path(folder) / library.name
            command = [*compiler, "-O2", "-march=native", "-shared", "-fPIC", "-o", str(beside), str(_SOURCE)]
            subprocess.run(command, check=True, capture_output=True, timeout=60)
            os.replace(beside, library)
    return library
