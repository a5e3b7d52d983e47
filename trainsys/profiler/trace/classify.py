"""What a device activity is: matrix product, other compute, communication or copy.

Communication is recognised by what the event says of itself (collective name, process group), then by
kernel name (NCCL, RCCL, MSCCL, DeepEP, multimem, NVSHMEM, one- and two-shot all-reduce, Transformer
Engine's user buffers, vLLM's and TensorRT-LLM's own), then by stream: a kernel of no known compute
library on a stream that does nothing but communicate. The last is counted in ``said``.
"""

from __future__ import annotations

import re

import numpy as np
import numpy.typing as npt

from trainsys.profiler.trace.columns import KERNEL, RankTrace

MATMUL, COMPUTE, COMM, COPY = 0, 1, 2, 3
CLASS_NAMES = ("matmul", "other_compute", "communication", "memcpy")

_COMM = re.compile(
    r"nccl|rccl|msccl|deep_?ep(?:::|_)|multimem|nvshmem|oneccl|hccl|one_?shot|two_?shot|cross_device_reduce"
    r"|quick_?reduce|userbuffers|symm_?mem|all_?reduce|all_?gather|reduce_?scatter|all_?to_?all"
    r"|(?:intra|inter)node::(?:dispatch|combine|notify|cached_notify)",
    re.I,
)
# Tensor contractions, with the split-K reductions and epilogues that belong to them. ``nvjet``: cuBLAS on
# Hopper and Blackwell; ``Cijk``: Tensile; ``ck_tile``/``igemm``: ROCm; ``triton_tem``: Inductor templates.
_MATMUL = re.compile(
    r"gemm|gemv|cutlass|xmma|nvjet|cijk|conv(?!ert)|scudnn|splitk|wgrad|dgrad|fprop|winograd|epilogue::impl"
    r"|flash|fmha|attention|attn_(?:fwd|bwd)|fused_mha|_mha_|matmul|triton_tem|\bdot_kernel",
    re.I,
)
_COMPUTE = re.compile(
    r"at::|at_cuda|triton|cub::|thrust|elementwise|reduce_kernel|cudnn|fbgemm|vectorized|norm|softmax|embedding"
    r"|void c10::|transpose|optimizer|adam|dropout|flashinfer|vllm::|apex|transformer_engine",
    re.I,
)
_OPS = (
    ("all_reduce", re.compile(r"all_?reduce|cross_device_reduce|quick_?reduce|(?:one|two)_?shot", re.I)),
    ("all_gather", re.compile(r"all_?gather", re.I)),
    ("reduce_scatter", re.compile(r"reduce_?scatter", re.I)),
    ("all_to_all", re.compile(r"all_?to_?all|deep_?ep|::dispatch|::combine", re.I)),
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


def is_comm_name(name: str) -> bool:
    return _COMM.search(name) is not None and not name.startswith(("Memcpy", "Memset"))


def is_matmul_name(name: str) -> bool:
    return _MATMUL.search(name) is not None


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
    for i in np.unique(device.name):
        name = trace.names[i]
        if is_comm_name(name):
            by_name[i] = COMM
        elif is_matmul_name(name):
            by_name[i], known[i] = MATMUL, True
        else:
            known[i] = _COMPUTE.search(name) is not None
    kinds = np.where(device.kind == KERNEL, by_name[device.name], COPY)
    kinds[device.comm >= 0] = COMM
    _by_stream(trace, kinds, known)
    return kinds


def _by_stream(trace: RankTrace, kinds: npt.NDArray[np.int64], known: npt.NDArray[np.bool_]) -> None:
    device = trace.device
    doubtful = (kinds == COMPUTE) & ~known[device.name]
    if not doubtful.any() or not (kinds == COMM).any():
        return
    lane = device.device * 1_000_003 + device.stream
    comm_lanes = np.unique(lane[kinds == COMM])
    compute_lanes = np.unique(lane[(kinds == MATMUL) | ((kinds == COMPUTE) & known[device.name])])
    only_comm = np.setdiff1d(comm_lanes, compute_lanes)
    moved = doubtful & np.isin(lane, only_comm)
    if moved.any():
        kinds[moved] = COMM
        trace.said["assumed: kernels of unknown name on a communication stream communicate"] += int(
            moved.sum()
        )
