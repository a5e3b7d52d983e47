"""Every layout of a model on a cluster, as arrays ready to be predicted."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import numpy as np

from trainsys.config.model import ModelConfig
from trainsys.config.run import RunConfig
from trainsys.errors import UserError
from trainsys.flops import layer_params, row_pairs
from trainsys.planner.cases import ATTN_KERNELS, RECOMPUTES, SCHEDULES, Cases
from trainsys.planner.machine import Machine
from trainsys.planner.runnable import runnable
from trainsys.planner.settings import KEYS, config_name, key_and_value
from trainsys.planner.stacks import STACKS, Stack
from trainsys.schedules.actions import rank_of, stages_of
from trainsys.schedules.build import placement, problems, splits_backward
from trainsys.schedules.partition import partition

_MAX_MICRO = 16
_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le, ">=": operator.ge, "==": operator.eq, "=": operator.eq, "<": operator.lt, ">": operator.gt,
}  # fmt: skip


def divisors(n: int) -> list[int]:
    small = [d for d in range(1, int(n**0.5) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})


@dataclass(frozen=True)
class Limit:
    """A constraint such as ``tp<=8``."""

    key: str
    op: str
    value: float

    def allows(self, found: float) -> bool:
        return _OPERATORS[self.op](found, self.value)


def parse_limits(texts: Iterable[str]) -> list[Limit]:
    """Raises UserError for what is no constraint."""
    limits = []
    for text in texts:
        match = re.fullmatch(r"\s*(\w+)\s*(<=|>=|==|=|<|>)\s*([\w+]+)\s*", text)
        if not match:
            raise UserError(
                f"--limit {text!r}: write KEY<=N, KEY>=N or KEY=N with KEY one of {', '.join(KEYS)}"
            )
        try:
            key, value = key_and_value(match[1], match[3])
        except UserError as error:
            raise UserError(f"--limit {text!r}: {error}") from None
        limits.append(Limit(key, match[2], value))
    return limits


@dataclass(frozen=True)
class Job:
    """What is fixed while layouts vary."""

    model: ModelConfig
    seq_len: int
    global_batch: int
    world: int
    machine: Machine
    stack: Stack
    dtype: str = "bf16"
    compiled: bool = False
    flash: str = "flash2"
    ulysses: bool = False
    loss_chunk: int = 0
    split_optim: bool = False
    split_grads: bool = False
    document: int | None = None
    """tokens of a packed document that attends to itself only; None: a row is one"""

    @staticmethod
    def of(
        run: RunConfig, machine: Machine, world: int, stack: str | None = None, dtype: str | None = None
    ) -> Job:
        """``stack`` None: that of the run's engine, which bears its name. Raises UserError for one that is not known."""
        stack = stack or run.engine
        if stack not in STACKS:
            raise UserError(f"--stack {stack}: known are {', '.join(STACKS)}")
        # torch's attention dispatches to cuDNN on Hopper and later, FlashAttention-2 before.
        modern = machine.arch >= 2
        return Job(
            run.model, run.train.seq_len, run.train.global_batch, world, machine, STACKS[stack],
            dtype or "bf16", run.train.compile or STACKS[stack].compiled, "cudnn" if modern else "flash2",
            run.parallel.context.flavour == "ulysses", run.train.loss_chunk,
            run.parallel.shard.optim == "over_replicas", run.parallel.shard.grads == "over_replicas",
            run.data.document_length,
        )  # fmt: skip


def _tp_choices(model: ModelConfig, most: int) -> list[int]:
    sizes = [model.n_heads, model.kv_heads, model.d_ff, model.vocab]
    if model.moe is not None:
        sizes.append(model.moe.d_ff)
    return [t for t in divisors(model.kv_heads) if t <= most and all(s % t == 0 for s in sizes)]


def _schedules(job: Job, pp: int, micro_batches: int) -> list[tuple[str, int]]:
    """(schedule, stages a rank) that can run; fewer micro-batches than ranks never pay."""
    if pp == 1:
        return [("1f1b", 1)]
    if micro_batches < pp:
        return []
    found = [("1f1b", 1), ("zb1", 1), ("zbv", 2), ("dualpipev", 2)]
    found += [("interleaved", v) for v in (2, 4, 5, 8)]
    return [
        (name, v)
        for name, v in found
        if pp * v <= job.model.n_layers
        and not (
            job.compiled and splits_backward(config_name(name))
        )  # compiled blocks cannot put off weights
        and not any(problems(config_name(name), pp, v, micro_batches))
    ]


def enumerate_layouts(
    job: Job, limits: Sequence[Limit] = ()
) -> dict[str, np.ndarray[tuple[int], np.dtype[np.float64]]]:
    """Columns of every layout that divides, that the stack's engine can run and that obeys ``limits``; empty arrays
    where there is none.

    tp stays in the fast domain; replicated data parallelism is tried across domains only (inside one, sharding costs
    nothing); context parallelism only where a micro-batch of one sequence leaves something to split.
    """
    by_key: dict[str, list[Limit]] = {}
    for limit in limits:
        by_key.setdefault(limit.key, []).append(limit)

    def keep(key: str, values: Iterable[int]) -> list[int]:
        return [v for v in values if all(lim.allows(v) for lim in by_key.get(key, ()))]

    model, world, domain = job.model, job.world, int(job.machine.domain)
    experts = model.moe.n_experts if model.moe else 1
    native = job.stack.name == "native"
    recomputes = keep("recompute", [RECOMPUTES.index(r) for r in ("none", _selective(job), "full")])
    rows: list[tuple[float, ...]] = []
    for tp in keep("tp", _tp_choices(model, domain)):
        for pp in (
            keep("pp", [p for p in divisors(world // tp) if p <= model.n_layers]) if world % tp == 0 else []
        ):
            rest = world // tp // pp
            for cp in keep("cp", [c for c in divisors(rest) if c == 1 or job.seq_len // (2 * c * tp) >= 256]):
                if job.seq_len % (2 * cp * tp) and cp * tp > 1:
                    continue
                dp = rest // cp
                if job.global_batch % dp:
                    continue
                shards = [
                    d for d in divisors(dp) if d == dp or (d * cp * tp) % domain == 0 or d * cp * tp == domain
                ]
                for shard in keep("dp_shard", shards):
                    if not keep("dp_replicate", [dp // shard]):
                        continue
                    eps = [e for e in divisors(shard * cp) if experts % e == 0] if model.moe else [1]
                    per_rank = job.global_batch // dp
                    micros = [b for b in divisors(per_rank) if b <= (1 if cp > 1 else _MAX_MICRO)]
                    for ep, mb in product(keep("ep", eps), keep("micro_batch", micros)):
                        for name, vpp in _schedules(job, pp, per_rank // mb):
                            code = SCHEDULES.index(name)
                            if not keep("schedule", [code]) or not keep("vpp", [vpp]):
                                continue
                            for rc in recomputes:
                                kept = keep("reshard", [1, 0] if pp == 1 and shard > 1 else [1])
                                both = native and pp == 1 and shard * cp > 1 and per_rank > mb
                                each = keep("reduce_each", [0, 1] if both else [0])
                                rows += [
                                    (pp, dp // shard, shard, cp, tp, ep, mb, vpp, code, rc, r, e)
                                    for r in kept
                                    for e in each
                                ]
    table = np.asarray(rows, float).reshape(-1, len(KEYS))
    layouts = {key: table[:, i] for i, key in enumerate(KEYS)}
    able = runnable(job.stack.engine, model, layouts, job.ulysses)
    return layouts if able.all() else {key: column[able] for key, column in layouts.items()}


def _selective(job: Job) -> str:
    """What stands between recomputing nothing and everything. The native engine's ``selective`` runs attention alone
    again, which after a fused kernel saves next to nothing."""
    if job.stack.name == "native":
        return "selective++"
    return "half" if job.stack.selective_is_half else "selective"


def to_cases(job: Job, layouts: dict[str, np.ndarray[tuple[int], np.dtype[np.float64]]]) -> Cases:
    """The arrays that the model reads; what the layouts share stays 0-d."""
    m, moe, mach, s = job.model, job.model.moe, job.machine, job.stack
    dp = layouts["dp_replicate"] * layouts["dp_shard"]
    sharded = layouts["dp_shard"] * layouts["cp"]
    fsdp = s.eager or s.name in ("fsdp", "native", "torchtitan", "jax")
    zero = np.where(layouts["reshard"] > 0, 3.0, 2.0) if fsdp else np.full_like(dp, 1.0)
    # DeepSpeed's pipeline goes with ZeRO-1 at most.
    pipeline = (layouts["pp"] > 1) & (s.engine == "deepspeed")
    zero = np.where(pipeline, 1.0, zero)
    attn = layer_params(m)
    low = job.dtype if job.dtype in ("fp8", "fp4") else "bf16"
    columns: dict[str, object] = {
        "n_layers": m.n_layers, "d_model": m.d_model, "n_heads": m.n_heads, "n_kv_heads": m.kv_heads,
        "head_dim": m.dim_per_head, "d_ff": m.d_ff, "glu": m.ffn_kind == "swiglu", "vocab": m.vocab,
        "tied": m.tied_embeddings, "seq": job.seq_len, "attn_params": attn.attention,
        "attended": _attended(m, job.seq_len, job.document),
        "n_experts": moe.n_experts if moe else 0, "top_k": moe.top_k if moe else 1,
        "groups": moe.n_groups if moe else 1, "top_groups": moe.top_groups if moe else 1,
        "d_expert": moe.d_ff if moe else m.d_ff, "d_shared": moe.shared_hidden if moe else 0,
        "dropped": 0.0, "dense_layers": moe.n_dense_layers if moe else 0,
        "gemm_rate": mach.at(low), "gemm_rate_16": mach.gemm_16, "peak_16": mach.peak_16, "sms": mach.sms,
        "hbm_bw": mach.hbm_bw, "mem_bytes": mach.mem_bytes, "link_bw": mach.link_bw, "pair_bw": mach.pair_bw,
        "domain": mach.domain, "nic_bw": mach.nic_bw, "arch": mach.arch, "watts": mach.watts,
        "world": job.world, "dp": dp, "tp": layouts["tp"], "pp": layouts["pp"], "vpp": layouts["vpp"],
        "cp": layouts["cp"], "ep": layouts["ep"], "etp": layouts["tp"] if moe else 1.0,
        "sp": (layouts["tp"] > 1).astype(float), "zero": np.where(sharded > 1, zero, 0.0),
        "opt_shard": sharded, "fsdp_shard": np.where(zero >= 3, sharded, 1.0),
        "micro_batch": layouts["micro_batch"], "global_batch": job.global_batch,
        "recompute": layouts["recompute"], "schedule": layouts["schedule"], "ends_fewer": 0.0,
        "attn_kernel": ATTN_KERNELS.index(job.flash), "fp8": {"fp8": 1.0, "fp4": 4.0}.get(job.dtype, 0.0),
        "grad_bytes": s.grad_bytes, "fused_norm": s.fused_norm or job.compiled, "compiled": job.compiled,
        "modern": s.modern, "eager": s.eager, "tp_overlap": s.tp_overlap, "fp32_reduce": s.fp32_reduce,
        "gathered_logits": s.gathered_logits, "plain_accumulation": s.plain_accumulation,
        "ds_pipeline": pipeline,
        "single_rail": s.single_rail, "ulysses": job.ulysses, "offload": 0.0,
        "native": s.name == "native", "ep_overlap": 0.0, "loss_chunk": job.loss_chunk,
        "split_optim": job.split_optim, "split_grads": job.split_grads,
        # Others reduce whenever they have gradients.
        "reduce_each": layouts["reduce_each"] if s.name == "native" else 1.0,
    }  # fmt: skip
    columns |= dict(zip(("cut_first", "cut_middle", "cut_last"), _cuts(job, layouts), strict=True))
    return Cases(**{k: np.asarray(v, float) for k, v in columns.items()})


def _cuts(
    job: Job, layouts: dict[str, np.ndarray[tuple[int], np.dtype[np.float64]]]
) -> list[np.ndarray[tuple[int], np.dtype[np.float64]]]:
    """Layers of the first, the fullest middle and the last rank of pp, as the native engine cuts them; zeros where it is
    another stack's even split."""
    if job.stack.name != "native":
        return [np.zeros(())] * 3
    keys = np.stack([layouts["pp"], layouts["vpp"], layouts["schedule"]], axis=1)
    kinds, place = np.unique(keys, axis=0, return_inverse=True)
    found = np.array([_cut(job, int(pp), int(vpp), SCHEDULES[int(code)]) for pp, vpp, code in kinds])
    return [found[:, i][place.ravel()] for i in range(3)]


def _cut(job: Job, pp: int, vpp: int, schedule: str) -> tuple[float, float, float]:
    total = job.model.n_layers
    if pp == 1:
        return total, total, total
    parts = cut_of(job.model, pp * vpp, job.seq_len)
    where = placement(config_name(schedule))
    held = [sum(parts[s] for s in stages_of(rank, pp, pp * vpp, where)) for rank in range(pp)]
    last = rank_of(pp * vpp - 1, pp, where)
    return held[0], max(held[1:-1], default=max(held)), held[last]


@lru_cache(maxsize=256)
def cut_of(model: ModelConfig, stages: int, seq_len: int) -> tuple[int, ...]:
    """Layers of each stage, as the native engine's `trainsys.schedules.partition` cuts them."""
    return tuple(len(part.layers) for part in partition(model, stages, seq_len))


def _attended(m: ModelConfig, seq: int, document: int | None) -> float:
    if (m.sliding_window or seq) >= seq and (document or seq) >= seq:
        return 1.0
    return row_pairs(seq, m.sliding_window, document) / (seq * seq / 2.0)
