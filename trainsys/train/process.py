"""This process's place in the world: device, threads and the default process group."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from trainsys.config.run import TrainConfig
from trainsys.errors import UserError
from trainsys.hardware.machine import usable_cores


@dataclass(frozen=True)
class Process:
    rank: int
    world: int
    local_rank: int
    local_world: int
    device: torch.device


def choose_device(cfg: TrainConfig, local_rank: int) -> torch.device:
    """The device that ``train.device`` asks for; UserError where it is not there."""
    available = torch.cuda.is_available()
    if cfg.device == "cuda" and not available:
        raise UserError("train.device=cuda, but torch finds no CUDA device; use train.device=cpu or auto")
    if cfg.device == "cpu" or not available:
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise UserError(
            f"local rank {local_rank} has no CUDA device: this node shows {count}; "
            f"start at most {count} processes a node"
        )
    return torch.device("cuda", local_rank)


@contextmanager
def process(cfg: TrainConfig, timeout_s: float = 600.0) -> Iterator[Process]:
    """Join the world that torchrun describes in the environment; one process needs none."""
    env = os.environ
    rank, world = int(env.get("RANK", 0)), int(env.get("WORLD_SIZE", 1))
    local_rank, local_world = int(env.get("LOCAL_RANK", 0)), int(env.get("LOCAL_WORLD_SIZE", 1))
    device = choose_device(cfg, local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(cfg.threads or max(1, usable_cores() // local_world))
    if world > 1:
        dist.init_process_group(
            # Telemetry gathers on the host even where training communicates on the device.
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            timeout=timedelta(seconds=timeout_s),
            device_id=device if device.type == "cuda" else None,
        )
    yield Process(rank, world, local_rank, local_world, device)
    # Not after an error: destroying the group would wait for peers, and make them fail first.
    if world > 1:
        dist.destroy_process_group()
