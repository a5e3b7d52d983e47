"""What can be known of a run on the machine that submits it: are its files there, does it fit its devices?

Everything here takes a fraction of a second and saves the wait in a queue. The config and the layout are checked where
they are read.
"""

from __future__ import annotations

import glob
import os
import sys
from pathlib import Path, PurePosixPath

from trainsys.config.run import RunConfig
from trainsys.errors import UserError
from trainsys.launch.paths import inputs

_LOCAL_SOURCES = ("text", "jsonl", "parquet", "shards", "megatron")
_GIB = 2**30


def warn(text: str) -> None:
    """One line on stderr, so that what --dry-run prints stays a job file."""
    print(f"trainsys: warning: {text}", file=sys.stderr)


def check_paths(run: RunConfig) -> None:
    """UserError for a path that is not there; a warning where it could be on a disk that only the nodes have."""
    for key, text in inputs(run).items():
        if key == "data.path":
            if run.data.source not in _LOCAL_SOURCES:
                continue
            text += ".idx" if run.data.source == "megatron" else ""
        if key == "data.tokenizer" and not text.endswith(".json"):
            continue
        path = os.path.expanduser(text) if key.startswith("data.") else text
        if os.path.exists(path) or any(True for _ in glob.iglob(path, recursive=True)):
            continue
        if _device(path) == _device(run.telemetry.out):
            raise UserError(f"{key}={text}: no such file or folder")
        warn(f"{key}={text}: not on this machine; every node must have it")


def _device(text: str) -> int:
    """The file system of what of the path exists. That of telemetry.out is one that all nodes share."""
    path = Path(text).absolute()
    while not path.exists():
        path = path.parent
    return path.stat().st_dev


def check_memory(run: RunConfig, world: int, accelerator: str | None = None) -> None:
    """UserError where the model's states alone are larger than a device, a warning where the planner's estimate of the
    peak is; nothing where no device is named (launch.cluster, hardware, launch.skypilot.accelerator)."""
    if run.train.device == "cpu" or not (run.launch.cluster or run.hardware or accelerator):
        return
    # Imported here: numpy takes a while, and most runs name no device.
    from trainsys.hardware import devices, lookup
    from trainsys.planner.cluster import load_cluster
    from trainsys.planner.machine import from_device
    from trainsys.planner.memory import peak_memory
    from trainsys.planner.memory_constants import shipped_memory
    from trainsys.planner.one import case_of

    if run.launch.cluster:
        machine = load_cluster(run.launch.cluster).machine()
    elif run.hardware:
        machine = from_device(lookup(run.hardware))
    else:
        # A cloud's H100 is any of the catalogue's; one that the catalogue does not have is not judged.
        kind = str(accelerator).split("-")[0]
        kinds = [d for name, d in devices().items() if name.split("-")[0] == kind]
        if not kinds:
            return
        machine = from_device(max(kinds, key=lambda device: device.memory.usable_gib))
    peak = peak_memory(case_of(run, world, machine), shipped_memory())
    states = float((peak.parameters + peak.gradients + peak.optimizer).ravel()[0]) / _GIB
    total, room = float(peak.total.ravel()[0]) / _GIB, machine.mem_bytes / _GIB
    what = f"{run.model.name} on {world} x {machine.name} with this layout"
    help = f"`trainsys plan RUN.yaml --cluster NAME --gpus {world}` lists layouts that fit"
    if states > room:
        raise UserError(
            f"{what}: weights, gradients and optimizer states alone take {states:.1f} GiB a device of {room:.1f}; {help}"
        )
    if total > room:
        warn(f"{what}: {total:.1f} GiB a device are predicted at the peak, of {room:.1f}; {help}")


def mounted(folder: str, mounts: list[str], working: str | None) -> bool:
    """Whether ``folder``, as a rank sees it, lies on one of ``mounts``. ``working``: what a relative one starts from."""
    if working is None and not PurePosixPath(folder).is_absolute():
        return False
    path = PurePosixPath(os.path.normpath(PurePosixPath(working or "/", folder)))
    return any(path.is_relative_to(mount) for mount in mounts)
