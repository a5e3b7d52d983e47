"""PyTorch's flight recorder of a rank that hangs, and what its device waits for.

On a device a collective's launch returns at once, so the host is in none when it hangs: the recorder of the device's
library knows which were enqueued and which are done.
"""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist

from trainsys.errors import UserError
from trainsys.profiler.hang.dumps import Dump, Operation, load_content, parse_dump

# gloo's and NCCL's recorders are two, each with a call of its own.
_CALLS = {"nccl": "_dump_nccl_trace"}
_OTHERS = "_dump_fr_trace"


@dataclass
class DeviceState:
    doing: str = ""
    """The oldest collective that the device has not finished, e.g. ``all_gather on fsdp``; empty: none."""
    last: str = ""
    """The newest that it has finished."""
    counts: dict[str, int] = field(default_factory=dict)
    """axis -> collectives finished"""


def dump_flight_recorder(path: Path) -> DeviceState | None:
    """Write the recorder of the default group's library to ``path``: empty unless TORCH_FR_BUFFER_SIZE was set from
    the start. What a device waits for; None where the library does not tell, as gloo does not."""
    with suppress(ImportError, AttributeError, RuntimeError, TypeError):
        from torch._C import _distributed_c10d as c10d

        backend = dist.get_backend() if dist.is_initialized() else ""
        path.write_bytes(getattr(c10d, _CALLS.get(backend, _OTHERS))())
        if backend in _CALLS:
            return read_state(path)
    return None


def read_state(path: Path) -> DeviceState | None:
    """Device state from one rank's dump; None if it is unreadable."""
    try:
        dump = parse_dump(path, load_content(path), Counter())
    except (UserError, OSError):
        return None
    done = [o for o in dump.operations if not o.pending]
    state = DeviceState()
    if dump.pending:
        state.doing = _text(dump, dump.pending[0])
    if done:
        state.last = _text(dump, done[-1])
    for name, number in dump.numbers.items():
        axis = _axis(dump, name)
        finished = dump.status.get(number, (0, 0))[1]
        state.counts[axis] = state.counts.get(axis, 0) + max(0, finished)
    return state


def _text(dump: Dump, operation: Operation) -> str:
    what: Any = operation.name.split(":", 1)[-1].split(" ")[0]
    if operation.peer is not None:
        what += f" {'to' if what == 'send' else 'from'} rank {operation.peer}"
    return f"{what.lstrip('_')} on {_axis(dump, operation.group)}"


def _axis(dump: Dump, group: str) -> str:
    """Our groups are described by their axis."""
    label = dump.groups.get(group, ("", ()))[0]
    return "world" if label == "default_pg" else label or group
