"""What a device activity is: matrix product, other compute, communication or copy.

Communication is recognised by what the event says of itself (collective name, process group), then by kernel name
(``kernel_names``), then by stream: a kernel of no known library on a stream that does nothing but communicate. Copies
between devices may be communication (symmetric memory, pipelines in one process) and are counted as such. The last
two are counted in ``said``.
"""

from __future__ import annotations

import re

import numpy as np
import numpy.typing as npt

from trainsys.profiler.trace.columns import KERNEL, RankTrace
from trainsys.profiler.trace.intervals import among, distinct
from trainsys.profiler.trace.kernel_names import CLASS_NAMES, COMM, COMPUTE, COPY, MATMUL, class_of_kernel

_PEER = re.compile(r"^Memcpy PtoP|^CopyPeer", re.I)

__all__ = ["CLASS_NAMES", "COMM", "COMPUTE", "COPY", "MATMUL", "axis_of", "classify", "comm_op"]

_OPS = (
    ("all_reduce", re.compile(r"all_?reduce|cross_device_reduce|quick_?reduce|(?:one|two)_?shot", re.I)),
    ("all_gather", re.compile(r"all_?gather", re.I)),
    ("reduce_scatter", re.compile(r"reduce_?scatter", re.I)),
    ("all_to_all", re.compile(r"all_?to_?all|deep_?ep|::dispatch|::combine", re.I)),
    ("peer_copy", re.compile(r"PtoP", re.I)),
    ("send_recv", re.compile(r"send_?recv|\bsend\b|\brecv\b|_p2p", re.I)),
    ("broadcast", re.compile(r"broadcast", re.I)),
    ("reduce", re.compile(r"reduce", re.I)),
)

_AXES = (
    ("ep", re.compile(r"expert_model|expert_parallel|\bep\b|_ep$|^ep_", re.I)),
    ("pp", re.compile(r"pipeline|\bpp\b|_pp$|embedding_group", re.I)),
    ("cp", re.compile(r"^context|\bcp\b|^mesh_cp$|ring_attn", re.I)),
    ("tp", re.compile(r"tensor|\btp\d*\b|_tp$|model_parallel", re.I)),
    ("dp_replicate", re.compile(r"dp_?replicate|hsdp_replicate", re.I)),
    ("dp_shard", re.compile(r"dp_?shard|fsdp|zero", re.I)),
    ("dp", re.compile(r"data_?parallel|\bdp\b|_dp$|distributed_optimizer", re.I)),
)
# Groups that span tensor and data axes together serve gradient norms and the like, not one axis.
_MANY_AXES = re.compile(r"^(?:tensor_and|expert_tensor|model_parallel_group|default_pg)", re.I)


def comm_op(name: str) -> str:
    """The canonical operation of a name (``_allgather_base``, ``ncclDevKernel_ReduceScatter…``): one word."""
    for op, pattern in _OPS:
        if pattern.search(name):
            return op
    return "communication"


def axis_of(description: str) -> str:
    """The mesh axis a process group's description names; ``world`` for the default group, else empty."""
    if description in ("default_pg", "0", "undefined"):
        return "world" if description == "default_pg" else ""
    if _MANY_AXES.search(description):
        return "several"
    for axis, pattern in _AXES:
        if pattern.search(description):
            return axis
    return ""


def classify(trace: RankTrace) -> npt.NDArray[np.int64]:
    """One class (MATMUL, COMPUTE, COMM, COPY) for each device activity."""
    device = trace.device
    by_name = np.full(len(trace.names), COMPUTE, np.int64)
    known = np.zeros(len(trace.names), bool)
    for i in distinct(device.name):
        by_name[i], why = class_of_kernel(trace.names[i])
        known[i] = bool(why) and by_name[i] != COMM
    kinds = np.where(device.kind == KERNEL, by_name[device.name], COPY)
    peers = np.array([_PEER.search(n) is not None for n in trace.names], bool)
    between = peers[device.name] & (device.kind != KERNEL)
    if between.any():
        kinds[between] = COMM
        trace.said["assumed: copies between devices communicate"] += int(between.sum())
    kinds[device.comm >= 0] = COMM
    _by_stream(trace, kinds, known)
    return kinds


def _by_stream(trace: RankTrace, kinds: npt.NDArray[np.int64], known: npt.NDArray[np.bool_]) -> None:
    device = trace.device
    doubtful = (kinds == COMPUTE) & ~known[device.name]
    if not doubtful.any() or not (kinds == COMM).any():
        return
    lane = device.device * 1_000_003 + device.stream
    comm_lanes = distinct(lane[kinds == COMM])
    compute_lanes = lane[(kinds == MATMUL) | ((kinds == COMPUTE) & known[device.name])]
    only_comm = comm_lanes[~among(comm_lanes, compute_lanes)]
    moved = doubtful & among(lane, only_comm)
    if moved.any():
        kinds[moved] = COMM
        trace.said["assumed: kernels of unknown name on a communication stream communicate"] += int(
            moved.sum()
        )
