"""What to change, and what it would gain: each line from a term of the waterfall and a simple formula.

A setting is proposed only where the run's config has another value (``profiler.settings``); where every setting that
could help is on already, the advice says where to look instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trainsys.config.run import RunConfig
from trainsys.profiler.memory import MemoryReport
from trainsys.profiler.settings import Settings
from trainsys.profiler.verdict import OF_NO_RANK, Verdict
from trainsys.profiler.waterfall import STALL, Waterfall
from trainsys.telemetry.events import COMM
from trainsys.telemetry.text import size

LEAST = 0.02
_JITTER = (
    "the hosts: other processes on the ranks' cores, garbage collection (gc.freeze() after set-up), clocks and power "
    "limits, network congestion"
)
_TRACE = "trainsys trace RUN/captures names the kernels and their shapes"


@dataclass(frozen=True)
class Advice:
    """``gain``: share of the wall time saved, as predicted; ``basis``: how that is known."""

    what: str
    gain: float
    mfu: float | None
    """MFU that would result, where one is known and what is saved is inside steps."""
    basis: str


def advise(
    fall: Waterfall, cfg: RunConfig | None, memory: MemoryReport | None, verdicts: Sequence[Verdict] = ()
) -> list[Advice]:
    """Changes that pay, the one with most gain first; the largest loss always has one. A gain is an upper bound: it takes
    a term away whole. ``verdicts``: who is late, if anyone was found to be."""
    out: list[Advice] = []
    free = None
    if memory is not None and memory.capacity:
        free = memory.capacity - memory.peak
    lost = [t for t in fall.terms if t.name not in ("useful", "compute", "unattributed")]
    worst = max(lost, key=lambda t: t.seconds, default=None)
    for term in lost:
        what, share, basis = _for(term.name, Settings(cfg), cfg, memory, free, verdicts)
        seconds = share * term.seconds
        gain = seconds / fall.wall_s if fall.wall_s else 0.0
        if what and (gain >= LEAST or (term is worst and gain >= LEAST / 4)):
            mfu = None
            if fall.mfu is not None and term.mfu_without is not None and seconds < fall.step_s:
                mfu = fall.mfu * fall.step_s / (fall.step_s - seconds)
            out.append(Advice(what, gain, mfu, basis))
    if cfg is not None and free is not None and memory is not None:
        out += _spend(fall, cfg, memory, free)
    return sorted(out, key=lambda a: -a.gain)


def _for(
    term: str, settings: Settings, cfg: RunConfig | None, memory: MemoryReport | None, free: float | None,
    verdicts: Sequence[Verdict],
) -> tuple[str, float, str]:  # fmt: skip
    """(what to change, the share of the term that it can save, how that is known)."""
    if term.startswith(COMM):
        axis = term[len(COMM) :]
        return _communication(axis, settings), 1.0, f"all exposed communication of {axis}, without waiting for late ranks"
    if term == "straggler":
        named = [v for v in verdicts if v.kind not in OF_NO_RANK]
        if named:
            return f"the straggler: {named[0].title}", 1.0, "all waiting for late ranks"
        return f"jitter, now one rank is late and now another: {_JITTER}", 1.0, "all waiting; no rank is late for good"
    if term == "recompute":
        return _recompute(cfg, memory, free)
    if term == "bubble":
        return _bubble(settings, cfg)
    if term in ("compute_below_peak", "matmul_below_peak", "other_compute", "launch"):
        return _compute(term, settings)
    if term == "padding":
        shorter = "a smaller train.seq_len, or documents of like length in a batch"
        return settings.first("data.packing=concat", otherwise=shorter), 1.0, "forward and backward of padding"
    if term == "data":
        ahead = settings.more("data.prefetch", "data.source=shards (trainsys data prepare)")
        return f"{ahead}; faster storage", 1.0, "the step waits for its batch"
    if term == "optimizer":
        replicas = "parallel.shard.optim=over_replicas" if cfg is not None and cfg.parallel.dp_replicate > 1 else ""
        bigger = f"{settings.more('train.global_batch')}: the same update serves more tokens"
        return settings.first(replicas, otherwise=bigger), 0.5, "half of the update"
    if term == "gc":
        return "gc.freeze() after set-up, gc.disable() with a collection every N steps", 1.0, "all garbage collection"
    if term == STALL + "checkpoint":
        rarer = settings.more("checkpoint.every")
        return settings.first("checkpoint.mode=async", otherwise=rarer), 1.0, "all time in checkpoints"
    if term == STALL + "capture":
        return settings.more("telemetry.capture_every"), 1.0, "profiler captures"
    if term == STALL + "eval":
        return "evaluate less often, or on fewer batches", 1.0, "all time in evaluation"
    return "", 0.0, ""


def _communication(axis: str, settings: Settings) -> str:
    if axis == "tp":
        return settings.any_of("parallel.overlap.tensor=true", settings.less("parallel.tp", least=1),
                               otherwise="keep tp within the fastest links")  # fmt: skip
    if axis in ("fsdp", "dp_shard"):
        return settings.any_of(settings.bigger_micro_batch(), settings.more("parallel.fsdp.prefetch"),
                               "parallel.fsdp.reshard_after_forward=false")  # fmt: skip
    if axis == "dp_replicate":
        return settings.any_of("parallel.overlap.gradients=true", settings.more("train.global_batch"))
    if axis == "cp":
        return settings.any_of("parallel.overlap.context=true", settings.less("parallel.cp", least=1),
                               otherwise="another parallel.context.flavour")  # fmt: skip
    if axis == "ep":
        return settings.any_of(settings.more("parallel.expert.chunks"), "parallel.expert.dispatch=hierarchical",
                               otherwise="keep parallel.ep within a node")  # fmt: skip
    return "fewer, larger collectives: they carry little and wait for the slowest link"


def _compute(term: str, settings: Settings) -> tuple[str, float, str]:
    dtype = "train.dtype=bf16" if settings.on_device else ""
    compiled = "train.compile=true" if settings.can_compile else ""
    shapes = f"{settings.shapes()}: {_TRACE}" if settings.shapes() else _TRACE
    if term == "compute_below_peak":
        found = settings.any_of(compiled, dtype, settings.bigger_micro_batch(), otherwise=shapes)
        first = settings.first("telemetry.capture_every=500", otherwise="")
        what = f"{first} to see which kernels; then {found}" if first and not settings.captures else found
        return what, 1.0, "all of forward and backward above the peak's time; a capture tells matmuls from the rest"
    if term == "matmul_below_peak":
        wider = settings.less("parallel.tp", least=1)
        what = settings.any_of(dtype, settings.bigger_micro_batch(), wider, otherwise=shapes)
        return what, 1.0, "matmuls slower than the peak: small ones, or a dtype that the hardware is slow at"
    if term == "other_compute":
        # Fusion merges passes over memory; half is what it saves on transformers' element-wise work.
        return settings.first(compiled, otherwise=_TRACE), 0.5, "half of what is not matmuls: norms, activations, rotary"
    what = settings.any_of(compiled, settings.bigger_micro_batch(), otherwise=_TRACE)
    return what, 1.0, "the device had nothing to do in the captured step: fewer and longer kernels"


def _recompute(cfg: RunConfig | None, memory: MemoryReport | None, free: float | None) -> tuple[str, float, str]:
    basis, settings = "forwards that backward repeats", Settings(cfg)
    if cfg is None or memory is None or free is None:
        what = settings.any_of("recompute.policy=none", *_less_recompute(settings))
        return f"{what}, if memory allows", 1.0, basis
    kept = dict(memory.parts).get("activations", 0.0)
    # Full recomputation keeps a block's input; about 16 times that is what a block keeps without (Korthikanti et
    # al. 2022, eq. 2: 34 bytes an element with fused attention, against 2 for the input).
    need = kept * 16.0
    if need < 0.9 * free:
        return f"recompute.policy=none: needs about {size(need)} of the {size(free)} that are free", 1.0, basis
    what = settings.any_of(*_less_recompute(settings), otherwise="more ranks on parallel.dp_shard, then no recomputation")
    return f"{what}: {size(free)} are free, none would need about {size(need)}", 0.5, basis + ", half of them"


def _less_recompute(settings: Settings) -> tuple[str, ...]:
    """Policies that repeat less than the one that is set, but still some."""
    policy = settings.value("recompute.policy")
    if policy == "every_n":
        return settings.more("recompute.every_n"), "recompute.policy=selective"
    return () if policy == "selective" else ("recompute.policy=every_n", "recompute.policy=selective")


def _bubble(settings: Settings, cfg: RunConfig | None) -> tuple[str, float, str]:
    more = settings.any_of(settings.less("train.micro_batch", least=1), settings.more("train.global_batch"))
    if cfg is not None and cfg.parallel.pipeline.schedule in ("gpipe", "1f1b"):
        other = "" if cfg.train.compile else ", or zero_bubble"  # which needs blocks that are not compiled
        return (
            f"parallel.pipeline.schedule=interleaved_1f1b with 2 virtual stages{other}; else {more}",
            0.5, "bubble of (p-1)/v forwards and backwards (Narayanan et al. 2021)",
        )  # fmt: skip
    return f"more micro-batches per step: {more}", 0.5, "the bubble's share goes with 1/m"


def _spend(fall: Waterfall, cfg: RunConfig, memory: MemoryReport, free: float) -> list[Advice]:
    """What a larger micro-batch would buy: whatever a step pays per micro-batch rather than per token halves."""
    transient = sum(v for n, v in memory.parts if n in ("activations", "logits"))
    data_ranks = cfg.parallel.dp_replicate * max(1, cfg.parallel.dp_shard)
    accumulates = cfg.train.global_batch >= 2 * cfg.train.micro_batch * data_ranks
    per_micro = fall.get("launch") + fall.get(COMM + "fsdp")
    gain = 0.5 * per_micro / fall.wall_s if fall.wall_s else 0.0
    if transient <= 0 or transient > 0.9 * free or not accumulates or gain < LEAST or cfg.parallel.pp > 1:
        return []
    mfu = None if fall.mfu is None else fall.mfu * fall.step_s / (fall.step_s - 0.5 * per_micro)
    return [Advice(
        f"train.micro_batch={2 * cfg.train.micro_batch}: needs about {size(transient)} of the {size(free)} that are free",
        gain, mfu, "gathers and launch gaps are paid once a micro-batch: half as many",
    )]  # fmt: skip


def to_fit(cfg: RunConfig, memory: MemoryReport, need: float) -> list[str]:
    """Changes that would free at least ``need`` bytes, the least costly first; empty where none alone does."""
    parts = dict(memory.parts)
    acts = parts.get("activations", 0.0) + parts.get("logits", 0.0)
    options: list[tuple[str, float]] = []
    if cfg.recompute.policy == "none":
        options.append(("recompute.policy=selective", 0.2 * parts.get("activations", 0.0)))
        options.append(("recompute.policy=full", 0.9 * parts.get("activations", 0.0)))
    if cfg.train.micro_batch > 1:
        options.append((f"train.micro_batch={cfg.train.micro_batch // 2}", acts / 2))
    if not cfg.parallel.fsdp.reshard_after_forward:
        options.append(("parallel.fsdp.reshard_after_forward=true", 0.5 * parts.get("parameters", 0.0)))
    p, shards = cfg.parallel, cfg.parallel.dp_shard * cfg.parallel.cp
    several = cfg.train.global_batch > p.dp_replicate * p.dp_shard * cfg.train.micro_batch
    if p.pp == 1 and shards > 1 and several and not p.fsdp.reduce_each_micro_batch:
        freed = (1.0 - 1.0 / shards) * parts.get("gradients", 0.0)
        options.append(("parallel.fsdp.reduce_each_micro_batch=true", freed))
    state = sum(parts.get(n, 0.0) for n in ("parameters", "gradients", "optimizer"))
    options.append(("twice the ranks on parallel.dp_shard", state / 2))
    return [f"{what}: frees about {size(freed)}" for what, freed in options if freed >= need]
