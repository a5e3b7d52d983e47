"""What to change, and what it would gain: each line from a term of the waterfall and a simple formula."""

from __future__ import annotations

from dataclasses import dataclass

from trainsys.config.run import RunConfig
from trainsys.profiler.memory import MemoryReport
from trainsys.profiler.waterfall import STALL, Waterfall
from trainsys.telemetry.events import COMM
from trainsys.telemetry.text import size

LEAST = 0.02
_COMM = {
    "tp": "a lower parallel.tp, or keep tp within the fastest links",
    "fsdp": "a larger train.micro_batch, more parallel.fsdp.prefetch, or parallel.fsdp.reshard_after_forward=false",
    "dp_shard": "a larger train.micro_batch, or parallel.dp_replicate so that shards stay within a node",
    "dp_replicate": "more micro-batches a step, so that one reduction serves more tokens",
    "cp": "another parallel.context.flavour, or a lower parallel.cp",
    "ep": "keep parallel.ep within a node",
}


@dataclass(frozen=True)
class Advice:
    """``gain``: share of the step's time saved, as predicted; ``basis``: how that is known."""

    what: str
    gain: float
    mfu: float | None
    """MFU that would result, where one is known."""
    basis: str


def advise(fall: Waterfall, cfg: RunConfig | None, memory: MemoryReport | None) -> list[Advice]:
    """Changes that pay, the one with most gain first. A gain is an upper bound: it takes a term away whole."""
    out: list[Advice] = []

    def say(what: str, seconds: float, basis: str) -> None:
        gain = seconds / fall.wall_s if fall.wall_s else 0.0
        if gain >= LEAST:
            mfu = None if fall.mfu is None else fall.mfu / (1 - min(gain, 0.99))
            out.append(Advice(what, gain, mfu, basis))

    free = None
    if memory is not None and memory.capacity:
        free = memory.capacity - memory.peak
    for term in fall.terms:
        if term.name == "padding":
            say("data.packing=concat: documents end to end, no padding", term.seconds, "forward and backward of padding")
        elif term.name == "recompute":
            say(*_recompute(term.seconds, cfg, memory, free))
        elif term.name == "data":
            say("more data.prefetch, faster storage, or shards prepared ahead (trainsys data prepare)",
                term.seconds, "the step waits for its batch")  # fmt: skip
        elif term.name == "bubble":
            say(*_bubble(term.seconds, cfg))
        elif term.name == "straggler":
            say("see who is late, and how often: verdicts, what if, rank by time", term.seconds,
                "all waiting for late peers")  # fmt: skip
        elif term.name == "launch":
            say("train.compile=true, a larger train.micro_batch: fewer and longer kernels", term.seconds,
                "the device had nothing to do in the captured step")  # fmt: skip
        elif term.name == "other_compute" and cfg is not None and not cfg.train.compile:
            # Fusion merges passes over memory; half is what it saves on transformers' element-wise work.
            say("train.compile=true: fused norms, activations and rotary embedding", term.seconds / 2,
                "half of what is not matmuls")  # fmt: skip
        elif term.name.startswith(COMM):
            axis = term.name[len(COMM) :]
            if axis in _COMM:
                say(_COMM[axis], term.seconds, f"all exposed communication of {axis}")
        elif term.name == STALL + "checkpoint" and cfg is not None:
            say("checkpoint.mode=async, or a larger checkpoint.every", term.seconds, "all time in checkpoints")
    if cfg is not None and free is not None and memory is not None:
        out += _spend(fall, cfg, memory, free)
    return sorted(out, key=lambda a: -a.gain)


def _recompute(
    seconds: float, cfg: RunConfig | None, memory: MemoryReport | None, free: float | None
) -> tuple[str, float, str]:
    basis = "forwards that backward repeats"
    if cfg is None or memory is None or free is None:
        return "recompute.policy=selective or none, if memory allows", seconds, basis
    kept = dict(memory.parts).get("activations", 0.0)
    # Full recomputation keeps a block's input; about 16 times that is what a block keeps without (Korthikanti et
    # al. 2022, eq. 2: 34 bytes an element with fused attention, against 2 for the input).
    need = kept * 16.0
    if need < 0.9 * free:
        return f"recompute.policy=none: needs about {size(need)} of the {size(free)} that are free", seconds, basis
    return (
        f"recompute.policy=every_n or selective: {size(free)} are free, none would need about {size(need)}",
        seconds / 2, basis + ", half of them",
    )  # fmt: skip


def _bubble(seconds: float, cfg: RunConfig | None) -> tuple[str, float, str]:
    if cfg is None:
        return "more micro-batches a step, or an interleaved schedule", seconds / 2, "the bubble shrinks with 1/m"
    p = cfg.parallel.pp
    schedule = cfg.parallel.pipeline.schedule
    if schedule in ("gpipe", "1f1b"):
        return (
            "parallel.pipeline.schedule=interleaved_1f1b with 2 virtual stages, or zero_bubble",
            seconds / 2, "bubble of (p-1)/v forwards and backwards (Narayanan et al. 2021)",
        )  # fmt: skip
    return (
        f"twice the micro-batches (train.micro_batch / 2), {p} stages", seconds / 2, "the bubble's share goes with 1/m",
    )  # fmt: skip


def _spend(fall: Waterfall, cfg: RunConfig, memory: MemoryReport, free: float) -> list[Advice]:
    """What a larger micro-batch would buy: whatever a step pays per micro-batch rather than per token halves."""
    transient = sum(v for n, v in memory.parts if n in ("activations", "logits"))
    data_ranks = cfg.parallel.dp_replicate * max(1, cfg.parallel.dp_shard)
    accumulates = cfg.train.global_batch >= 2 * cfg.train.micro_batch * data_ranks
    per_micro = fall.get("launch") + fall.get(COMM + "fsdp")
    gain = 0.5 * per_micro / fall.wall_s if fall.wall_s else 0.0
    if transient <= 0 or transient > 0.9 * free or not accumulates or gain < LEAST or cfg.parallel.pp > 1:
        return []
    mfu = None if fall.mfu is None else fall.mfu / (1 - gain)
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
    state = sum(parts.get(n, 0.0) for n in ("parameters", "gradients", "optimizer"))
    options.append(("twice the ranks on parallel.dp_shard", state / 2))
    return [f"{what}: frees about {size(freed)}" for what, freed in options if freed >= need]
