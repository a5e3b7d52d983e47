"""A kernel's class from its name: one table of rules, the first that fits wins.

A rule looks at the function's own name (*leaf*), at whole namespaces, or at the template arguments of a wrapper whose
own name says nothing (``cutlass::Kernel<…>``). So ``fbgemm_gpu::permute_2D`` is no GEMM, and a pointwise kernel of
Inductor that lists an all-reduce among its fused ops is no communication.
"""

# ruff: noqa: E501  (a rule is a line)

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from trainsys.terminal_text import tell_apart

MATMUL, COMPUTE, COMM, COPY = 0, 1, 2, 3
CLASS_NAMES = ("matmul", "other_compute", "communication", "memcpy")
LONGEST = 4096
"""Characters of a name that are looked at."""


@dataclass(frozen=True, slots=True)
class Rule:
    """``where``: ``leaf``, ``namespace`` (one of them, whole) or ``inside`` (template arguments of a wrapper)."""

    where: str
    pattern: re.Pattern[str]
    kind: int
    why: str


def _rule(where: str, kind: int, why: str, pattern: str) -> Rule:
    return Rule(where, re.compile(pattern, re.I), kind, why)


RULES = (
    # Inductor first: its names list ops of every kind, and the prefix alone says what the kernel is.
    _rule("leaf", MATMUL, "Inductor template: matmul, convolution or attention", r"^triton_(?:tem|mm|bmm|flex)_"),
    _rule("leaf", COMPUTE, "Inductor pointwise, reduction or other generated code",
          r"^triton_(?:poi|per|red|for|spl|unk|helpers?)?_|^triton_\d*$"),
    # Communication.
    _rule("leaf", COMM, "NCCL, RCCL", r"^nccl(?!_?test)|^rccl|ncclDevKernel|ncclKernel"),
    _rule("leaf", COMM, "MSCCL, MSCCL++", r"^msccl|mscclpp|^ib_?p2p"),
    _rule("namespace", COMM, "MSCCL++, NVSHMEM, mori, pplx, DeepEP", r"^(?:mscclpp|nvshmemi?|mori|pplx|deep_ep|hybrid_ep|rocshmem|userbuffers)$"),
    _rule("leaf", COMM, "NVSHMEM, rocSHMEM", r"nvshmem|rocshmem"),
    _rule("leaf", COMM, "oneCCL, HCCL", r"oneccl|^hccl|^hcom_|^ccl_kernel"),
    _rule("leaf", COMM, "multimem (NVLink SHARP) collective", r"multimem"),
    _rule("leaf", COMM, "one- or two-shot all-reduce", r"(?:one|two)_?shot|cross_device_reduce|quick_?reduce|lamport"),
    _rule("leaf", COMM, "Transformer Engine user buffers", r"^k?userbuffers|_pushrecv|_pushsend"),
    _rule("leaf", COMM, "symmetric memory", r"symm_?mem|stream_(?:write|wait)_value"),
    _rule("leaf", COMM, "expert-parallel dispatch and combine",
          r"^Ep(?:Dispatch|Combine)|(?:^|_)(?:a2a|alltoall)_|moe_?all_?to_?all|moe_?comm|deep_?ep|hybrid_?ep|cached_notify|notify_(?:dispatch|combine)"),
    _rule("namespace", COMM, "DeepEP", r"^(?:intranode|internode|internode_ll)$"),
    _rule("leaf", COMM, "named after a collective",
          r"all[-_]?reduce|all[-_]?gather|reduce[-_]?scatter|all[-_]?to[-_]?all|^collective-permute|^broadcast_kernel_p2p"),
    # What a library calls by a matmul's name and is none.
    _rule("leaf", COMPUTE, "casts and quantisation", r"quanti[sz]|dequant|_quant_|scaled_fp[48]|^quant_|^(?!flash_).*convert|_cast_|cast_transpose|cast_kernel"),
    _rule("leaf", COMPUTE, "unfolding for a convolution", r"im2col|col2im"),
    _rule("leaf", COMPUTE, "layout change", r"transpose|permute|n(?:chw|hwc)(?:To|Add)|SubTensorOp"),
    _rule("leaf", COMPUTE, "embedding tables", r"embedding|embs|embedding_bag"),
    _rule("leaf", COMPUTE, "mixture-of-experts routing", r"moe_align|topk|gating|permutation|sort_tokens|moe_sum|expert_offsets"),
    _rule("leaf", COMPUTE, "rotary embedding, cache writes", r"rotary|rope|reshape_and_cache|concat_and_cache"),
    # Attention.
    _rule("leaf", MATMUL, "attention", r"flash|fmha|fused_?mha|_mha_|attention|attn_?(?:fwd|bwd|kernel)|_attn_|sdpa|\bmla_|^mla|paged_kv|PagedKVCache|RaggedKVCache|^bwd_kernel_d[kq]"),
    _rule("namespace", MATMUL, "attention", r"^(?:flash|fmha|pytorch_flash|flash_fwd|flashattn|flash_mla)$"),
    # Matrix products and convolutions.
    _rule("leaf", MATMUL, "cuBLAS on Hopper and later", r"^nvjet"),
    _rule("leaf", MATMUL, "TensorRT-LLM generated matmul", r"^bmm_(?:E\dm\d|Bfloat16|Fp16|MxE|E2m1)|^gemm_"),
    _rule("leaf", MATMUL, "matrix product", r"gemm|gemv|matmul|^dot(?:\.\d+)?$|^mm_kernel|_mm_kernel|_bmm_|splitk_?reduce|wvSplitK|marlin|machete|cutlass_\d+_|^dot_kernel|xmma|hgmma|qgmma"),
    _rule("leaf", MATMUL, "Tensile, hipBLASLt, Composable Kernel", r"^cijk|^custom_cijk|xdlops?|_wmma_|streamk"),
    _rule("leaf", MATMUL, "convolution", r"conv(?!ert)|scudnn|fprop|dgrad|wgrad|winograd|igemm"),
    _rule("namespace", MATMUL, "matrix product", r"^(?:gemvx|gemv|deep_gemm|cublasLt|cublaslt|cutlass_cudnn_train|cutlass_cudnn_infer|epilogue)$"),
    _rule("inside", MATMUL, "attention in a wrapper", r"flash|fmha|attention|Mha\b|\bmla"),
    _rule("inside", COMM, "collective in a wrapper", r"all_?reduce|all_?gather|reduce_?scatter|nccl"),
    _rule("inside", COMPUTE, "reduction in a wrapper", r"^[^<]*(?:norm|softmax|elementwise)"),
    _rule("inside", MATMUL, "matrix product in a wrapper", r"gemm|conv(?!ert)|cutlass_|Mma|matmul|wgrad|dgrad|fprop"),
    # The rest, as far as it is known.
    _rule("namespace", COMPUTE, "PyTorch, CUB, Thrust, cuDNN and the like",
          r"^(?:at|c10|cub|thrust|rocprim|hipcub|cudnn|fbgemm_gpu|vllm|flashinfer|apex|transformer_engine|sgl|aiter|tensorrt_llm|at_cuda_detail|xpu)$"),
    _rule("leaf", COMPUTE, "elementwise, reduction, normalisation, optimizer",
          r"elementwise|vectorized|reduce_?kernel|norm|softmax|cross_?entropy|adam|sgd|lamb|optimizer|multi_tensor|dropout|silu|swiglu|geglu|gelu|relu|act_and_mul|cat_?array|copy_kernel|fill_kernel|scatter|gather|index|sort|scan|arange|cumsum|triton|bn_(?:fw|bw)|pooling|masked|where|random|philox|argmax|sampling|LigerKernel|liger|_kernel$"),
)  # fmt: skip
_WRAPPERS = re.compile(
    r"^(?:kernel2?|device_kernel\w*|kentry\w*|kernel_entry\w*|enable_\w+|cutlass_kernel|kernel_cutlass\w*|universal\w*)$",
    re.I,
)
_ANONYMOUS = re.compile(
    r"\((?:anonymous|unnamed) namespace\)::|<unnamed>::|_GLOBAL__N__\w+::|\(anonymous class\)::"
)
_MANGLED = re.compile(r"^_ZN?K?(?=\d|S)")


@dataclass(frozen=True, slots=True)
class KernelName:
    namespaces: tuple[str, ...]
    leaf: str
    inside: str
    """Template arguments, and all else of the name."""


def split_name(name: str) -> KernelName:
    """Namespaces and own name of a function, from its demangled, mangled or plain name."""
    name = name[:LONGEST]
    if _MANGLED.match(name):
        parts = _demangled(name)
        if parts:
            return KernelName(tuple(parts[:-1]), parts[-1], name)
    plain, depth = [], 0
    for c in _ANONYMOUS.sub("", name):
        if c in "<(":
            depth += 1
        elif c in ">)":
            depth = max(0, depth - 1)
        elif not depth:
            plain.append(c)
    words = "".join(plain).strip().split()
    # A return type may stand before; what is left of an argument list is gone.
    path = (words[-1] if words else name).split("::")
    return KernelName(tuple(path[:-1]), path[-1] or name, name)


def _demangled(name: str) -> list[str]:
    """Length-prefixed identifiers up to the first template argument (Itanium ABI)."""
    at, out = _MANGLED.match(name).end(), []  # type: ignore[union-attr]
    while at < len(name):
        number = re.compile(r"(\d+)").match(name, at)
        if not number:
            break
        begin = number.end()
        at = begin + int(number.group(1))
        part = name[begin:at]
        if not part.startswith("_GLOBAL__N"):
            out.append(part)
    return out


@lru_cache(maxsize=65536)
def class_of_kernel(name: str) -> tuple[int, str]:
    """(class, why); the reason is empty where no rule knows the name, which is then other compute."""
    found = split_name(name)
    wrapped = _WRAPPERS.match(found.leaf) is not None
    for rule in RULES:
        if rule.where == "leaf":
            hit = rule.pattern.search(found.leaf) is not None
        elif rule.where == "namespace":
            hit = any(rule.pattern.search(n) for n in found.namespaces)
        else:
            hit = wrapped and rule.pattern.search(found.inside) is not None
        if hit:
            return rule.kind, rule.why
    return COMPUTE, ""


_SCOPES = re.compile(r"(?:\b[A-Za-z_]\w*|\((?:anonymous|unnamed) namespace\)|<unnamed>)::")
_BLANKS = re.compile(r"(?<=[<>,]) (?=>)")


def short_names(names: Sequence[str], width: int) -> list[str]:
    """What to call each kernel in ``width`` characters: without return type, namespaces and arguments where that leaves
    it unlike all others, and told apart where long names differ."""
    plain = [_plain(name) for name in names]
    whole: dict[str, set[str]] = {}
    for name, short in zip(names, plain, strict=True):
        whole.setdefault(short, set()).add(name)
    chosen = [short if len(whole[short]) == 1 else name for name, short in zip(names, plain, strict=True)]
    return tell_apart(chosen, width)


def _plain(name: str) -> str:
    found = split_name(name)
    if _MANGLED.match(name):
        return found.leaf
    name = _SCOPES.sub("", name).removeprefix("void ")
    if name.endswith(")"):
        depth = 0
        for at in range(len(name) - 1, 0, -1):
            depth += {")": 1, "(": -1}.get(name[at], 0)
            if not depth:
                # "operator()" is a name, and what follows a blank is a remark.
                name = name if name[:at].endswith(("operator", " ")) else name[:at]
                break
    return _BLANKS.sub("", name)
