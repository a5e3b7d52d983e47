"""This process's place in the world: device, threads and the default process group."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from trainsys.blame import note, this_node
from trainsys.checkpoint.ranks import TIMEOUT_S, Ranks
from trainsys.config.run import TrainConfig
from trainsys.errors import MachineFault, UserError
from trainsys.hardware.machine import usable_cores


@dataclass(frozen=True)
class Process:
    rank: int
    world: int
    local_rank: int
    local_world: int
    device: torch.device
    ranks: Ranks = field(default_factory=Ranks)
    """For what the main threads of all ranks tell each other on the host."""


def machine_bytes(proc: Process) -> int:
    """Memory that this machine has for its ranks' tensors, taken or not, on the devices that they use."""
    if proc.device.type == "cuda":
        return proc.local_world * torch.cuda.mem_get_info(proc.device)[1]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def choose_device(cfg: TrainConfig, local_rank: int, local_world: int = 1) -> torch.device:
    """The device that ``train.device`` asks for, of this node's ``local_world`` ranks.

    Where it is not there, a UserError; in a scheduler's job, which was given nodes with devices, a MachineFault.
    """
    available = torch.cuda.is_available()
    if cfg.device == "cuda" and not available:
        _blame_for_devices(0, local_world)
        raise UserError("train.device=cuda, but torch finds no CUDA device; use train.device=cpu or auto")
    if cfg.device == "cpu" or not available:
        if cfg.attention == "flex":
            raise UserError(
                "train.attention=flex on the CPU: flex_attention has no backward there; use train.attention=auto"
            )
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if _bound_by_task(count):
        return torch.device("cuda", 0)
    if local_rank >= count:
        _blame_for_devices(count, max(local_world, local_rank + 1))
        raise UserError(
            f"local rank {local_rank} has no CUDA device: this node shows {count}; "
            f"start at most {count} processes a node"
        )
    return torch.device("cuda", local_rank)


def _bound_by_task(count: int) -> bool:
    """Whether Slurm shows each rank its own devices only (--gpus-per-task, --gpu-bind): the first is the rank's."""
    env = os.environ
    return "SLURM_GPUS_PER_TASK" in env or (
        count == 1 and "SLURM_PROCID" in env and len(env.get("SLURM_STEP_GPUS", "").split(",")) > 1
    )


def _blame_for_devices(count: int, ranks: int) -> None:
    """In a job, which asked for nodes that have the devices: the node is at fault, and the job goes on without it."""
    if "SLURM_JOB_ID" in os.environ or "TRAINSYS_RUN" in os.environ:
        text = f"{count} CUDA devices visible to its {ranks} ranks"
        note(this_node(), text, sure=True)
        raise MachineFault(f"node {this_node()}: {text}")


def agent_store(rank: int, world: int) -> dict[str, Any]:
    """Arguments of ``init_process_group`` in the restarts of a torchrun that keeps its store for the ranks.

    torch 2.13 finds in it what the attempt before has left there, and never connects; a prefix for each attempt
    keeps them apart.
    """
    env = os.environ
    count = env.get("TORCHELASTIC_RESTART_COUNT", "0")
    if count == "0" or env.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return {}
    store = dist.TCPStore(env["MASTER_ADDR"], int(env["MASTER_PORT"]), world, is_master=False)
    return {"store": dist.PrefixStore(f"trainsys/attempt{count}", store), "rank": rank, "world_size": world}


def raise_file_limit() -> None:
    """Open as many files as the hard limit lets: the soft one is 1,024 on most machines, and rank 0's process may
    hold the store, with a connection of every rank."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


@contextmanager
def process(cfg: TrainConfig, timeout_s: float = TIMEOUT_S) -> Iterator[Process]:
    """Join the world that torchrun or srun describes in the environment; one process needs none.

    MachineFault where the ranks do not find each other.
    """
    env = os.environ
    rank, world = int(env.get("RANK", 0)), int(env.get("WORLD_SIZE", 1))
    local_rank, local_world = int(env.get("LOCAL_RANK", 0)), int(env.get("LOCAL_WORLD_SIZE", 1))
    device = choose_device(cfg, local_rank, local_world)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(cfg.threads or max(1, usable_cores() // local_world))
    if world > 1:
        # PyTorch's own record of collectives, which the watchdog dumps; it must be on before the first group.
        os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
        # gloo then connects two ranks when they first speak, not every pair of the world at once.
        os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")
        raise_file_limit()
        try:
            dist.init_process_group(
                # No gloo beside NCCL: what ranks tell each other on the host goes by `Ranks`.
                "nccl" if device.type == "cuda" else "gloo",
                timeout=timedelta(seconds=timeout_s),
                **agent_store(rank, world),
                device_id=device if device.type == "cuda" else None,
            )
        except dist.DistError as error:
            meeting = f"{env.get('MASTER_ADDR')}:{env.get('MASTER_PORT')}"
            said = str(error).splitlines()[0]
            raise MachineFault(
                f"rank {rank} on {this_node()} cannot reach the others at {meeting}: {said}"
            ) from error
    ranks = Ranks(timeout_s)
    yield Process(rank, world, local_rank, local_world, device, ranks)
    # Not after an error: destroying the group would wait for peers, and make them fail first.
    ranks.close()
    if world > 1:
        dist.destroy_process_group()
