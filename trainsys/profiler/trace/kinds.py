"""Which of the given files are what, by content: names and suffixes are whatever people make of them."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from trainsys.errors import UserError
from trainsys.profiler.trace.source import SQLITE_MAGIC, peek

_TRACE = re.compile(rb'"(?:traceEvents|schemaVersion|deviceProperties|distributedInfo|ph)"')
_RECORDER = re.compile(rb'"(?:pg_config|pg_status|nccl_version|comm_lib_version)"')
_HEAD = 1 << 16


_EXPORT = {
    ".nsys-rep": "a report of Nsight Systems; export it with `nsys export --type sqlite` and give the .sqlite file",
    ".qdrep": "a report of Nsight Systems; export it with `nsys export --type sqlite` and give the .sqlite file",
    ".ncu-rep": "a report of Nsight Compute, of single kernels; give a timeline of Nsight Systems or PyTorch's profiler",
    ".xplane.pb": "JAX's own protocol buffer; give the .trace.json.gz that jax.profiler writes beside it",
    ".pftrace": "Perfetto's protocol buffer; export JSON instead (rocprofv3: --output-format json is not one either: "
    "use PyTorch's profiler)",
}
"""What to give instead, by the end of a name."""


@dataclass(slots=True)
class Inputs:
    traces: list[Path] = field(default_factory=list)
    dumps: list[Path] = field(default_factory=list)
    snapshots: list[Path] = field(default_factory=list)
    timelines: list[Path] = field(default_factory=list)
    unread: list[tuple[Path, str]] = field(default_factory=list)


def sort_inputs(paths: list[str | Path]) -> Inputs:
    """Files, and all files under folders, by kind.

    A file given by name must be recognised; what a folder holds besides is listed as unread. Raises
    UserError for a path that does not exist, cannot be read, or is of no known kind.
    """
    out = Inputs()
    for given in paths:
        path = Path(given)
        if path.is_dir():
            for file in sorted(p for p in path.rglob("*") if p.is_file()):
                try:
                    _place(file, out)
                except UserError as error:
                    out.unread.append((file, str(error)))
        elif path.exists():
            _place(path, out)
        else:
            raise UserError(f"{path}: no such file or folder")
    return out


def _place(path: Path, out: Inputs) -> None:
    kind = kind_of(path)
    {"trace": out.traces, "dump": out.dumps, "snapshot": out.snapshots, "timeline": out.timelines}[
        kind
    ].append(path)


def kind_of(path: Path) -> str:
    """``trace``, ``dump`` (flight recorder), ``snapshot`` (allocator) or ``timeline``; UserError for anything else."""
    for suffix, what in _EXPORT.items():
        if path.name.endswith(suffix):
            raise UserError(f"{path}: {what}")
    head = peek(path, _HEAD)
    if not head:
        raise UserError(f"{path}: empty file at byte 0")
    if head[:1] == b"\x80":
        return _pickle_kind(path, head)
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    if text[:1] in (b"{", b"["):
        if _RECORDER.search(head) and not _TRACE.search(head):
            return "dump"
        # A trace whose header outgrows the head is still most likely a trace: the reader will tell.
        return "trace"
    if head.startswith(SQLITE_MAGIC):
        return "trace"
    if head[:4] == b"PAR1":
        return "timeline"
    if head[:2] == b"PK":
        raise UserError(f"{path}: a zip archive (byte 0); unpack it and give the folder")
    raise UserError(
        f"{path}: not a profiler trace, flight-recorder dump or memory snapshot (byte 0: {head[:8]!r})"
    )


def _pickle_kind(path: Path, head: bytes) -> str:
    """The keys stand in the first bytes of the pickle in the order the writer put them."""
    if b"segments" in head or b"device_traces" in head:
        return "snapshot"
    if b"pg_config" in head or b"pg_status" in head or b"entries" in head:
        return "dump"
    if path.stat().st_size <= _HEAD:
        from trainsys.profiler.safe_pickle import load_plain

        load_plain(path)
    raise UserError(f"{path}: a pickle that is neither a flight-recorder dump nor a memory snapshot (byte 0)")
