"""A rank's memory ran out: one line that says what it was doing, how much it asked for, and what would help."""

from __future__ import annotations

import errno
import re

import torch

from trainsys.config.run import RunConfig
from trainsys.errors import MachineFault, UserError

_ASKED = re.compile(r"(?:tried to|unable to) allocate (\d[\d.]* ?(?:bytes|[KMGTPE]?i?B))", re.I)
_HOST = re.compile(r"can't allocate memory|cannot allocate memory|std::bad_alloc|not enough memory", re.I)


def out_of_memory(error: Exception, cfg: RunConfig, held: bool) -> UserError | MachineFault | None:
    """What ``error`` is as one line; None where it is not that memory ran out.

    ``held``: this config has done steps before. Where it has not, it does not fit and would fail alike anywhere: a
    UserError. Where it has, a neighbour, a leak or an odd batch took the rest, and the newest checkpoint is gone on
    from: a MachineFault, which a launcher restarts as often as it may.
    """
    text = str(error)
    device = isinstance(error, torch.OutOfMemoryError)
    host = (
        isinstance(error, MemoryError)
        or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
        or (isinstance(error, RuntimeError) and _HOST.search(text) is not None)
    )
    if not device and not host:
        return None
    doing = next((note for note in getattr(error, "__notes__", ()) if note.startswith("during ")), "during set-up")
    asked = match[1] if (match := _ASKED.search(text)) else ""
    where = "on the GPU" if device else "on the host"
    line = f"out of memory {where} {doing}{f', which asked for {asked}' if asked else ''}; "
    smaller = [
        f"train.micro_batch below {cfg.train.micro_batch}" if cfg.train.micro_batch > 1 else "",
        "recompute.policy=full" if cfg.recompute.policy != "full" else "",
        "train.loss_chunk=1024" if not cfg.train.loss_chunk else "",
        "parallel.dp_shard over more ranks",
        "" if device else "fewer ranks on a node, or more memory asked of the scheduler",
    ]
    line += f"what would take less: {', '.join(filter(None, smaller))}; `trainsys plan` says what fits"
    if held:
        return MachineFault(f"{line}. It did fit in earlier steps: a restart goes on from the newest checkpoint")
    return UserError(line)
