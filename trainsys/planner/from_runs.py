"""Turn rows of published runs into planner cases: fill what a row leaves out by stated defaults, refuse the rest.

Only what a user could also say about their own run is read: model, machine, layout, software stack. No measured
column is, and nothing depends on the name of the source.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import fields

import numpy as np

from trainsys.errors import UserError
from trainsys.planner.cases import ARCHS, ATTN_KERNELS, RECOMPUTES, SCHEDULES, Cases
from trainsys.planner.machine import Machine, device_named, from_device, network_from_text
from trainsys.planner.runs_csv import Refusal, Run
from trainsys.planner.stacks import Stack, stack_of

_SHAPE = ("n_layers", "d_model", "n_heads", "d_ff", "vocab", "seq_len")
# Attention variants that a table's shape columns cannot tell, by the model family's public name:
# (query rank, key-value rank, rotary head size) of multi-head latent attention.
_LATENT = {"deepseek": (1536.0, 512.0, 64.0), "kimi": (1536.0, 512.0, 64.0)}
_SLIDING = {"gpt-oss": 128.0}  # every second layer sees this many keys
# (groups of experts, how many of them a token uses), by family and number of experts: DeepSeek-V2 and V3.
_GROUPED = {("deepseek", 160.0): (8.0, 3.0), ("deepseek", 256.0): (8.0, 4.0)}

_EXCHANGE_HIDDEN = re.compile(r"(a2a|moe|ep)[_ -]?overlap|overlap[_ -](a2a|moe|ep)\b")


def _kernel(text: str) -> int:
    low = text.lower()
    if "flash3" in low or "fa3" in low:
        return ATTN_KERNELS.index("flash3")
    if "cudnn" in low or "te" in re.split(r"[^a-z]+", low) or "transformer" in low:
        return ATTN_KERNELS.index("cudnn")
    if "flash1" in low or low in ("flash", "triton"):
        return ATTN_KERNELS.index("flash1")
    if "fused_softmax" in low or "megatron" in low:
        return ATTN_KERNELS.index("fused_softmax")
    if low in ("torch", "unfused", "eager", "math"):
        return ATTN_KERNELS.index("unfused")
    return ATTN_KERNELS.index("flash2")


def _schedule(text: str, vpp: float) -> int:
    low = text.lower().replace("_", "-")
    if "dualpipe" in low:
        return SCHEDULES.index("dualpipev")
    if "zbv" in low or "zb-v" in low:
        return SCHEDULES.index("zbv")
    if "zb" in low or "zero" in low:
        return SCHEDULES.index("zb2" if "2p" in low or "h2" in low else "zb1")
    if "gpipe" in low:
        return SCHEDULES.index("gpipe")
    return SCHEDULES.index("interleaved" if vpp > 1 else "1f1b")


def _attention_params(run: Run, heads: float, kv: float, dim: float) -> float:
    d = run.n("d_model")
    for name, (q_rank, kv_rank, rope) in _LATENT.items():
        if name in run.text["model_name"].lower():
            up = heads * (dim + rope)
            return (
                d * q_rank
                + q_rank * up
                + d * (kv_rank + rope)
                + kv_rank * heads * 2.0 * dim
                + heads * dim * d
            )
    return d * dim * (2.0 * heads + 2.0 * kv)


def _attended(run: Run) -> float:
    seq = run.n("seq_len")
    for name, window in _SLIDING.items():
        if name in run.text["model_name"].lower() and window < seq:
            return 0.5 + 0.5 * (2.0 * window / seq)
    return 1.0


def _expert_groups(run: Run) -> tuple[float, float]:
    name, experts = run.text["model_name"].lower(), run.n("moe_n_experts", 0.0)
    return next((g for (family, n), g in _GROUPED.items() if family in name and n == experts), (1.0, 1.0))


def _dense_layers(run: Run) -> float:
    """A model cut short for a benchmark may stand in a table with the whole one's leading dense layers, which would
    leave next to no experts: 4 layers of DeepSeek-V3, 3 of them dense. It keeps one."""
    dense = run.n("moe_dense_layers", 0.0)
    return dense if dense <= run.n("n_layers") / 2.0 else 1.0


def _missing(run: Run) -> str | None:
    lost = [s for s in _SHAPE if not run.n(s) > 0]
    if lost:
        return f"model shape: no {', '.join(lost)}"
    if not run.n("n_gpus") > 0 or not run.text["gpu"]:
        return "cluster: no GPU or count"
    if "layout_unknown" in run.text["quality"]:
        return "layout unknown, says the table"
    if not run.n("global_batch") > 0:
        return "batch: no global_batch"
    given = [run.n(a) > 0 for a in ("tp", "pp", "dp")]
    if sum(given) < 2 and run.n("n_gpus") > 1 and not (run.flag["fsdp"] or run.n("zero_stage") == 3):
        return "layout: two of tp, pp, dp are not given"
    for name in ("tp", "pp", "dp", "cp"):
        if not 1.0 <= run.n(name, 1.0) < math.inf:
            return f"layout: {name} = {run.n(name):g} is no number of ranks"
    return None


def case_of(run: Run) -> dict[str, float] | Refusal:
    """The fields of one case, or why not."""
    why = _missing(run)
    if why:
        return Refusal(run, why, layout_known=not why.startswith("layout"))
    per_node = max(int(run.n("gpus_per_node", 8.0)), 1)
    try:
        device = device_named(run.text["gpu"])
    except UserError as error:
        return Refusal(run, f"unknown GPU: {error}")
    domain = max(per_node, device.scale_up.domain if device.scale_up.domain > 8 else per_node)
    nic = network_from_text(run.text["interconnect"], min(per_node, 8))
    try:
        machine = from_device(device, nodes_domain=domain, nic_gb_s=nic)
        return _fields(run, machine)
    except UserError as error:
        return Refusal(run, str(error))


def _precision(run: Run, machine: Machine, stack: Stack) -> tuple[float, float]:
    """(fp8 code of ``Cases``, FLOP/s of the matmuls)."""
    text = f"{run.text['dtype']} {run.text['flags']}".lower()
    if "fp4" in run.text["dtype"].lower():
        return 4.0, machine.at("fp4")
    if "fp8" in run.text["dtype"].lower() or "float8" in text:
        # XLA quantises in kernels of its own, as a scale a row does in PyTorch.
        if "rowwise" in text or stack.name == "jax":
            return 3.0, machine.at("fp8")
        return 2.0 if re.search(r"mx|fp8-sc|block", text) else 1.0, machine.at("fp8")
    return 0.0, machine.at("bf16")


def _fields(run: Run, machine: Machine) -> dict[str, float] | Refusal:
    world = run.n("n_gpus")
    heads = run.n("n_heads")
    kv = run.n("n_kv_heads", heads)
    dim = run.n("head_dim", run.n("d_model") / heads)
    pp, cp, ep = run.n("pp", 1.0), run.n("cp", 1.0), max(run.n("ep", 1.0), 1.0)
    tp = run.n("tp", 1.0 if not run.n("dp") > 0 else max(world / (run.n("dp") * pp * cp), 1.0))
    dp = run.n("dp", world / (tp * pp * cp))
    if abs(dp * tp * pp * cp - world) > 0.01 * world:
        return Refusal(run, f"layout: dp*tp*pp*cp = {dp * tp * pp * cp:g} is not n_gpus = {world:g}")
    batch = run.n("global_batch")
    micro = min(run.n("micro_batch", 1.0), max(batch / dp, 1e-9))
    local = re.search(r"local_bs=(\d+)", run.text["flags"])
    if local and pp > 1 and not run.n("micro_batch") > 0:
        micro = max(float(int(local.group(1)) // int(pp)), 1.0)  # torchtitan's default: as many as stages
    experts = run.n("moe_n_experts", 0.0)
    groups, top_groups = _expert_groups(run)
    vpp = run.n("vpp", 1.0)
    stack = stack_of(run, recent=machine.arch >= ARCHS.index("hopper"))
    fp8, gemm = _precision(run, machine, stack)
    folded = ep > dp * cp or "fold" in run.text["flags"].lower() or experts >= 100
    zero = 3.0 if run.flag["fsdp"] else run.n("zero_stage")
    if math.isnan(zero):
        # Not said: sharded optimizer, the common default; fully sharded where even that cannot fit.
        zero = 3.0 if run.n("n_params", 0.0) / (tp * pp) * 4.0 > machine.mem_bytes else float(dp > 1)
    # DeepSpeed splits a pipeline by parameters, so embedding and head stand for whole layers.
    mats = 3.0 if run.gated else 2.0
    layer = _attention_params(run, heads, kv, dim) + mats * run.n("d_model") * run.n("d_ff")
    by_params = float(round(run.n("vocab") * run.n("d_model") / layer)) if stack.gathered_logits else 0.0
    flags = run.text["flags"].lower()
    hybrid = re.search(r"zero1_group=(\d+)", flags)
    shard = min(float(hybrid.group(1)), dp) if hybrid else dp * cp
    recompute = run.text["recompute"].lower() or "none"
    if recompute == "selective" and stack.selective_is_half:
        recompute = "half"
    if recompute not in RECOMPUTES:
        recompute = "full" if "full" in recompute else "none"
    return {
        "n_layers": run.n("n_layers"),
        "d_model": run.n("d_model"),
        "n_heads": heads,
        "n_kv_heads": kv,
        "head_dim": dim,
        "d_ff": run.n("d_ff"),
        "glu": float(run.gated),
        "vocab": run.n("vocab"),
        "tied": float(bool(run.flag["tied_emb"])),
        "seq": run.n("seq_len"),
        "attn_params": _attention_params(run, heads, kv, dim),
        "attended": _attended(run),
        "n_experts": experts,
        "top_k": run.n("moe_top_k", 1.0),
        "groups": groups,
        "top_groups": top_groups,
        "d_expert": run.n("moe_d_ff", run.n("d_ff")),
        "d_shared": run.n("moe_shared_d_ff", 0.0),
        "dropped": float("token drop" in flags),
        "dense_layers": _dense_layers(run),
        "gemm_rate": gemm,
        "gemm_rate_16": machine.gemm_16,
        "peak_16": machine.peak_16,
        "sms": machine.sms,
        "hbm_bw": machine.hbm_bw,
        "mem_bytes": machine.mem_bytes,
        "link_bw": machine.link_bw,
        "pair_bw": machine.pair_bw,
        "domain": machine.domain,
        "nic_bw": machine.nic_bw,
        "arch": float(machine.arch),
        "watts": machine.watts,
        "world": world,
        "dp": dp,
        "tp": tp,
        "pp": pp,
        "vpp": vpp,
        "cp": cp,
        "ep": ep if experts > 0 else 1.0,
        "etp": 1.0 if folded or experts == 0 else tp,
        "sp": float(bool(run.flag["sp"]) and tp > 1),
        "zero": zero,
        "opt_shard": shard if zero > 0 else 1.0,
        "fsdp_shard": dp * cp if zero >= 3 else 1.0,
        "micro_batch": micro,
        "global_batch": batch,
        "recompute": float(RECOMPUTES.index(recompute)),
        "schedule": float(_schedule(run.text["schedule"], vpp)),
        "ends_fewer": 1.0 if re.search("1 layer fewer|transformer.embed", flags) else by_params,
        "attn_kernel": float(_kernel(run.text["attention_kernel"])),
        "fp8": fp8,
        "grad_bytes": 4.0 if "fp32 grad" in flags else stack.grad_bytes,
        "fused_norm": float(stack.fused_norm),
        "compiled": float(stack.compiled),
        "modern": float(stack.modern),
        "eager": float(stack.eager),
        "tp_overlap": float(stack.tp_overlap),
        "fp32_reduce": float(stack.fp32_reduce),
        "gathered_logits": float(stack.gathered_logits),
        "plain_accumulation": float(stack.plain_accumulation),
        "ds_pipeline": float(stack.engine == "deepspeed" and pp > 1),
        "single_rail": float(stack.single_rail),
        "ep_overlap": float("dualpipe" in run.text["schedule"].lower() or bool(_EXCHANGE_HIDDEN.search(flags))),
        "ulysses": float(bool(re.search(r"ulysses|cp_comm=a2a", flags))),
        "offload": float("offload=true" in flags),
        "native": 0.0,
        "split_optim": 0.0,
        "split_grads": 0.0,
        "reduce_each": 1.0,
        "loss_chunk": 0.0,
        "cut_first": 0.0,
        "cut_middle": 0.0,
        "cut_last": 0.0,
    }


def build(runs: Sequence[Run]) -> tuple[Cases | None, list[Run], list[Refusal]]:
    """(cases, their runs in the same order, refusals)."""
    columns: dict[str, list[float]] = {f.name: [] for f in fields(Cases)}
    kept: list[Run] = []
    refused: list[Refusal] = []
    for run in runs:
        found = case_of(run)
        if isinstance(found, Refusal):
            refused.append(found)
            continue
        if any(math.isnan(v) for v in found.values()):
            refused.append(
                Refusal(run, "a number is missing: " + next(k for k, v in found.items() if math.isnan(v)))
            )
            continue
        kept.append(run)
        for name, value in found.items():
            columns[name].append(value)
    cases = Cases(**{n: np.asarray(v, float) for n, v in columns.items()}) if kept else None
    return cases, kept, refused
