"""What a checkpoint says about itself: ``manifest.json``, whose durable presence makes it one. No torch here.

The last field is the sha256 of everything before it, so a flipped byte in the manifest is found as well.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import msgspec

from trainsys.checkpoint.container import Damaged
from trainsys.checkpoint.durable import write_durable
from trainsys.errors import UserError
from trainsys.models.boxes import Box

NAME = "manifest.json"
FORMAT = "trainsys-checkpoint"
SCHEMA = "1.1"
"""Major.minor. A minor version only adds fields, which an older reader ignores; a major one it refuses."""
_SEAL = b',"sha256":"'


class Part(msgspec.Struct, array_like=True, frozen=True):
    """One box of an atom: in file number ``file`` at ``offset`` bytes, row-major."""

    file: int
    offset: int
    box: Box


class Atom(msgspec.Struct, frozen=True):
    """One canonical tensor: a parameter by its name, a moment as ``name@exp_avg``. ``parts`` tile it."""

    dtype: str
    shape: tuple[int, ...]
    parts: list[Part]


class File(msgspec.Struct, frozen=True):
    name: str
    bytes: int
    sha256: str


class Manifest(msgspec.Struct, kw_only=True):
    format: str = FORMAT
    schema: str = SCHEMA
    step: int
    """Optimizer steps done; the 0-based number of the next one."""
    data_step: int
    """The global batch that comes next. Ahead of ``step`` where batches were skipped after a roll-back."""
    samples: int | None = None
    """Samples that the batches before ``data_step`` held, which is the place in the data whatever the batch was and
    will be. None (schema 1.0): ``data_step`` times the batch of ``config``."""
    updates: int
    """Updates that the optimizer made: ``step`` less those that were skipped."""
    serial: int = 0
    """Grows by one with each checkpoint of a folder; the newest has the highest."""
    created_s: float = 0.0
    """Seconds since the epoch."""
    lineage: str = ""
    """The run over all its attempts: what the checkpoint folder was named when it was made."""
    run_id: str = ""
    attempt: int = 0
    resumed_from: str = ""
    engine: str = "native"
    world: int
    layout: dict[str, int] = {}
    loss: float | None = None
    """Loss of the last step before the save; what ``keep_best`` goes by."""
    recent_losses: list[float] = []
    """What the anomaly guard compares the next loss with."""
    config: dict[str, Any] = {}
    """The whole run config."""
    skipped: int | None = None
    """How many steps in a row, right before the save, had their update skipped; None: nobody kept count."""
    data: dict[str, Any] = {}
    """What the data source says of itself, fingerprint included."""
    versions: dict[str, str] = {}
    files: list[File]
    atoms: dict[str, Atom]

    @property
    def nbytes(self) -> int:
        return sum(f.bytes for f in self.files)


def encode(manifest: Manifest) -> bytes:
    body = msgspec.json.encode(manifest)
    assert body.endswith(b"}")
    body = body[:-1]
    return body + _SEAL + hashlib.sha256(body).hexdigest().encode() + b'"}\n'


def decode(data: bytes, where: str | Path) -> Manifest:
    """Damaged where the bytes are not what was written; UserError for a version that is too new."""
    try:
        version = msgspec.json.decode(data, type=_Version)
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise Damaged(f"{where}: not a manifest, or damaged") from None
    body, seal, rest = data.rpartition(_SEAL)
    sealed = bool(seal) and rest[:64] == hashlib.sha256(body).hexdigest().encode()
    major = version.schema.split(".")[0]
    if version.format != FORMAT or not sealed or not major.isdigit():
        raise Damaged(f"{where}: not a manifest, or damaged (its own checksum does not match)")
    if int(major) > int(SCHEMA.split(".")[0]):
        raise UserError(
            f"{where}: checkpoint schema {version.schema} is newer than {SCHEMA}, which this trainsys reads; "
            "update trainsys, or convert the checkpoint with the version that wrote it"
        )
    try:
        return msgspec.json.decode(data, type=Manifest)
    except msgspec.ValidationError as error:
        raise Damaged(f"{where}: {error}") from None


def write(manifest: Manifest, folder: Path) -> None:
    write_durable(folder / NAME, encode(manifest))


def read(folder: Path) -> Manifest:
    """The manifest of one checkpoint. Damaged or UserError as :func:`decode`; Damaged if there is none."""
    path = folder / NAME
    try:
        return decode(path.read_bytes(), path)
    except OSError as error:
        raise Damaged(f"{path}: {error.strerror}") from None


class _Version(msgspec.Struct):
    format: str = ""
    schema: str = ""
