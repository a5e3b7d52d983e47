"""Flight-recorder dumps as PyTorch writes them (pickle or JSON, versions 2.x), made uniform."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from trainsys.errors import UserError
from trainsys.profiler.safe_pickle import load_plain
from trainsys.profiler.trace.source import read_all

_P2P = re.compile(r"(send|recv) (\d+)(->|<-)(\d+)")
_LIBRARY = re.compile(r"torch[/\\]|site-packages|dist-packages|<frozen|/lib/python3")


@dataclass(frozen=True, slots=True)
class Operation:
    """One recorded operation. ``order`` is that of enqueueing on its rank."""

    order: int
    group: str
    sequence: int
    name: str
    p2p: bool
    peer: int | None
    """The other rank (global) of a send or receive; None for a collective."""
    sizes: str
    dtypes: str
    pending: bool
    device: bool
    """Its completion was observed on a device; gloo reports none."""
    where: str

    def text(self, groups: dict[str, tuple[str, tuple[int, ...]]]) -> str:
        what = self.name.split(":", 1)[-1].split(" ")[0]
        if self.p2p:
            what += f" {'to' if what == 'send' else 'from'} rank {self.peer}"
        label = groups.get(self.group, ("", ()))[0] or self.group
        return f"{what} #{self.sequence} of group {self.group} ({label})"


@dataclass(slots=True)
class Dump:
    """One rank's recorder. ``status``: last enqueued and completed sequence by *local* group number."""

    rank: int
    path: Path
    groups: dict[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict)
    status: dict[str, tuple[int, int]] = field(default_factory=dict)
    numbers: dict[str, str] = field(default_factory=dict)
    """Local number of each group by its name."""
    operations: list[Operation] = field(default_factory=list)

    @property
    def pending(self) -> list[Operation]:
        return [o for o in self.operations if o.pending]


def is_dump(content: Any) -> bool:
    return (
        isinstance(content, dict)
        and isinstance(content.get("entries"), list)
        and (
            "pg_config" in content
            or "pg_status" in content
            or "nccl_version" in content
            or "version" in content
        )
    )


def load_content(path: Path) -> Any:
    """The dump's plain data, from pickle or JSON."""
    head = read_all(path, 1 << 30)
    if head[:1] == b"\x80":
        return load_plain(path)
    try:
        return msgspec.json.decode(head)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path}: neither a pickle nor JSON: {error}") from None


def rank_in_name(path: Path) -> int | None:
    """``rank12.json``, ``nccl_trace_rank_12_node3``; else the last number in the name: ``_dump_12``, ``node3_12``."""
    said = re.findall(r"rank[-_ ]?(\d+)", path.name, re.I)
    if said:
        return int(said[-1])
    found = re.findall(r"\d+", path.stem if path.suffix in (".json", ".pickle", ".pkl", ".gz") else path.name)
    return int(found[-1]) if found else None


def parse_dump(path: Path, content: Any, said: Counter[str]) -> Dump:
    """Raises UserError if the content is not a dump or its rank cannot be told; bad entries are counted."""
    if not is_dump(content):
        raise UserError(f"{path}: not a flight-recorder dump: no 'entries' with 'pg_config' or 'pg_status'")
    rank = content.get("rank")
    if not isinstance(rank, int):
        rank = rank_in_name(path)
    if rank is None:
        raise UserError(f"{path}: which rank's dump is this? Name the file by its rank, as in dump_12")
    dump = Dump(rank, path)
    for key, config in _items(content.get("pg_config")):
        if isinstance(config, dict):
            ranks = _rank_list(config.get("ranks"))
            if ranks:
                dump.groups[str(config.get("name", key))] = (str(config.get("desc", "")), ranks)
    for key, state in _items(content.get("pg_status")):
        if isinstance(state, dict):
            enqueued, completed = (
                state.get("last_enqueued_collective"),
                state.get("last_completed_collective"),
            )
            if isinstance(enqueued, int) and isinstance(completed, int):
                dump.status[str(key)] = (enqueued, completed)
    for entry in content["entries"]:
        try:
            operation, number = _operation(entry, dump)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError):
            said["dropped: flight-recorder entry with missing or wrong fields"] += 1
            continue
        dump.operations.append(operation)
        if number is not None:
            dump.numbers[operation.group] = number
    dump.operations.sort(key=lambda o: o.order)
    return dump


def _items(value: Any) -> list[tuple[Any, Any]]:
    return list(value.items()) if isinstance(value, dict) else []


def _rank_list(value: Any) -> tuple[int, ...]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            return ()
    return tuple(r for r in value if isinstance(r, int)) if isinstance(value, list) else ()


def _plain(value: Any) -> str:
    """``[1024]`` of ``[[1024]]``: one tensor is the rule."""
    return ", ".join(str(v) for v in value) if isinstance(value, list) else ""


def _operation(entry: dict[str, Any], dump: Dump) -> tuple[Operation, str | None]:
    group = str(entry["process_group"][0])
    name = str(entry["profiling_name"])
    p2p = bool(entry.get("is_p2p"))
    peer = None
    found = _P2P.search(name)
    if found:
        members = dump.groups.get(group, ("", ()))[1]
        # Numbers in the name are positions in the group; without its list they are taken for ranks.
        ends = [members[int(n)] if int(n) < len(members) else int(n) for n in (found[4], found[2])]
        # Which end comes first differs between versions: the peer is the one that is not this rank.
        peer = next((r for r in ends if r != dump.rank), ends[0])
    state = str(entry.get("state", ""))
    frames = [f for f in entry.get("frames") or [] if isinstance(f, dict)]
    own = next(
        (f for f in frames if not _LIBRARY.search(str(f.get("filename", "")))), frames[0] if frames else None
    )
    return Operation(
        order=int(entry["record_id"]),
        group=group,
        sequence=int(entry["p2p_seq_id"] if p2p else entry["collective_seq_id"]),
        name=name,
        p2p=p2p,
        peer=peer,
        sizes=_plain(entry.get("input_sizes")),
        dtypes=_plain(entry.get("input_dtypes")),
        pending=state != "completed" and not entry.get("retired", False),
        device=not name.startswith(("gloo:", "mpi:", "ucc:")),
        where=f"{own.get('filename')}:{own.get('line')} in {own.get('name')}" if own else "",
    ), str(entry["pg_id"]) if "pg_id" in entry else None
