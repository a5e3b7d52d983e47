"""Whether training went on well from a checkpoint: ``health.json`` beside its manifest. No torch here.

A loss is computed with the weights of the step before, so what an update did to the weights shows one step later at the
earliest. A checkpoint is *healthy* once a later step was normal: its loss and gradient norm finite, its update applied.
Until then it is *unproven*, and *suspect* where the steps next to it, before or after, were skipped instead.
"""

from __future__ import annotations

import json
from contextlib import suppress
from enum import Enum
from pathlib import Path

from trainsys.checkpoint.durable import write_durable
from trainsys.checkpoint.manifest import Manifest

NAME = "health.json"


class Health(Enum):
    HEALTHY = "healthy"
    UNPROVEN = "unproven"
    SUSPECT = "suspect"
    DAMAGED = "damaged"
    """A file was not what its checksum says when it was last read."""


def health(checkpoint: Path, manifest: Manifest) -> Health:
    """What is known of a checkpoint. One of which nobody kept count (an import, an older version) is trusted."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        return Health(json.loads((checkpoint / NAME).read_bytes())["health"])
    if manifest.skipped is None:
        return Health.HEALTHY
    return Health.SUSPECT if manifest.skipped else Health.UNPROVEN


def mark(checkpoint: Path, state: Health, step: int) -> None:
    """Make ``state``, known since ``step``, durable; the manifest and its checksum stay as they are."""
    write_durable(checkpoint / NAME, json.dumps({"health": state.value, "step": step}).encode() + b"\n")
