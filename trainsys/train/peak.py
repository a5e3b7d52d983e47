"""What MFU is a share of, for this run."""

from __future__ import annotations

import os

import torch

from trainsys.bench.matmul import ceiling_in_run
from trainsys.blame import this_node
from trainsys.config.run import RunConfig
from trainsys.hardware import Device, lookup, match_device
from trainsys.hardware.catalogue import DType
from trainsys.hardware.machine import usable_cores
from trainsys.hardware.measured import MeasurementKey, load_measurement, store_measurement
from trainsys.hardware.peak import Peak, peak_for_run
from trainsys.train.process import Process


def find_device(cfg: RunConfig, proc: Process) -> Device | None:
    """The catalogue's entry for what the run is on: as named by ``hardware``, else recognised, else None."""
    if cfg.hardware is not None:
        return lookup(cfg.hardware)
    if proc.device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(proc.device)
    return match_device(properties.name, properties.total_memory / 2**30, properties.multi_processor_count)


def find_peak(cfg: RunConfig, proc: Process, device: Device | None) -> Peak | None:
    """Catalogue peak of the device; where there is none, every rank measures matmul at once, before step 0."""
    known = peak_for_run(device, cfg.train.dtype)
    if known is not None:
        return known
    masks = proc.ranks.to_all((this_node(), _affinity()))
    # Ranks that are bound have the cores of all of them together.
    together = set().union(*(mask for node, mask in masks if node == this_node()))
    measured = ceiling_in_run(
        cfg.train.dtype,
        proc.local_world,
        barrier=proc.ranks.barrier,
        total=lambda value: sum(proc.ranks.to_all(value)),
        device=proc.device,
        store=proc.rank == 0 and proc.world == proc.local_world,
        cores=usable_cores() if together == _affinity() else len(together),
    )
    return peak_for_run(None, cfg.train.dtype, measured)


def _affinity() -> set[int]:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(usable_cores()))


def raise_peak(dtype: DType, proc: Process, flops_per_s: float) -> bool:
    """A run that did more than its measured ceiling has measured a higher one, for the runs to come: ``flops_per_s``
    of all ranks together. True if it is kept; of a job on several hosts nothing is."""
    if proc.rank != 0 or proc.world != proc.local_world:
        return False
    name = torch.cuda.get_device_name() if proc.device.type == "cuda" else None
    known = load_measurement(MeasurementKey.here(dtype, proc.local_world, torch.get_num_threads(), name))
    if known is None or known.flops_per_s >= flops_per_s:
        return False
    try:
        store_measurement(known.model_copy(update={"flops_per_s": flops_per_s}))
    except OSError:
        return False
    return True
