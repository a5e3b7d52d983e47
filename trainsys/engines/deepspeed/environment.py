"""What DeepSpeed wants of its surroundings, CPU included. Nothing here changes what runs on a GPU.

On CPU two things differ, and only there:

- ``DS_ACCELERATOR=cpu``, so that a machine with a GPU can be told ``train.device=cpu``;
- its shared-memory collective, which only inference uses, is not compiled at start-up.

On either device updates are torch's fused AdamW, so nothing is compiled: DeepSpeed's own for the GPU and its
DeepSpeedCPUAdam for offloaded states would be, at the first run on each machine.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import os
import warnings
from collections.abc import Iterator

import torch.distributed as dist

from trainsys.engines.noise import hush
from trainsys.parallel.mesh import Mesh


def prepare(mesh: Mesh) -> None:
    """Before ``deepspeed`` is imported: its launcher's variables, a process group, quiet logs."""
    for name, value in (
        ("RANK", mesh.rank),
        ("WORLD_SIZE", mesh.layout.world),
        ("LOCAL_RANK", mesh.device.index or 0),
    ):
        os.environ.setdefault(name, str(value))
    if mesh.device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    if not dist.is_initialized():
        # A run of one process has no group; DeepSpeed counts its ranks by one.
        backend = "gloo" if mesh.device.type == "cpu" else "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    hush()


def prepare_cpu() -> None:
    """After the import, on a CPU device."""
    # By its name in sys.modules: as an attribute of deepspeed.comm it is hidden behind torch itself.
    backend = importlib.import_module("deepspeed.comm.torch")
    backend.build_shm_op = lambda: None  # type: ignore[attr-defined]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Only its warnings are heard: the rest tells of settings that are in ``deepspeed.json``."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", category=UserWarning, module="torch")
        yield
