"""What a run writes down about itself: typed records, one file a rank.

``RUN/events/rank_00000.jsonl`` is append-only: JSON objects, one a line, and packed blocks of them (``telemetry.block``);
the block under way is in ``rank_00000.tail``. Each record carries its type in ``event``; a reader skips what it does not
know, so a newer minor version only ever *adds* fields and types. What changes meaning is a new major version, which an
older reader refuses by name. Version 1 had no blocks, and is read as well.

Seconds are seconds, bytes bytes, FLOPs a count over all ranks. Times of day are seconds since the epoch,
derived from one wall-clock reading at the start plus a monotonic clock, so they never run backwards within a
file.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal

import msgspec

SCHEMA = "2.0"
SCHEMA_MAJOR = 2

# Phases that every engine uses. A phase of another name is kept in the file and counted as "other" in
# ``telemetry.vectors``.
PHASES = ("data", "h2d", "forward", "backward", "optimizer", "gc", "other")
# Mesh axes, then the combined groups that a collective may run over. Their time appears in a step's phases as
# "comm/<axis>".
COMM_AXES = (
    "pp", "dp_replicate", "dp_shard", "cp", "tp", "ep", "expert_fsdp", "dp", "fsdp", "loss", "world",
    "unknown",
)  # fmt: skip
COMM = "comm/"


def _snake(name: str) -> str:
    return "".join(f"_{c.lower()}" if c.isupper() else c for c in name).lstrip("_")


class Event(msgspec.Struct, tag_field="event", tag=_snake, omit_defaults=True, kw_only=True, gc=False):
    """The base of every record; ``event`` in the file is the class name in snake case."""


class RunStart(Event):
    """First line of a file, and of each attempt after a restart: who writes, on what, and what its numbers
    mean."""

    run_id: str
    rank: int
    world: int
    t0_wall: float
    """Seconds since the epoch, read together with ``t0_mono``."""
    t0_mono: float
    """The monotonic clock (``perf_counter``, seconds) at ``t0_wall``."""
    schema: str = SCHEMA
    attempt: int = 0
    name: str = ""
    hostname: str = ""
    switch: str = ""
    """The switch that the host hangs on, where the scheduler tells it."""
    pid: int = 0
    local_rank: int = 0
    engine: str = ""
    layout: dict[str, int] = {}
    """Axis sizes: pp, dp_replicate, dp_shard, cp, tp, ep."""
    coords: dict[str, int] = {}
    """This rank's coordinate on each axis."""
    model: str = ""
    parameters: int | None = None
    dtype: str = ""
    steps: int | None = None
    first_step: int = 0
    origin: list[str] = []
    """What was said at the start about the checkpoint or the weights that it begins with."""
    seq_len: int | None = None
    global_batch: int | None = None
    micro_batch: int | None = None
    versions: dict[str, str] = {}
    hardware: str | None = None
    device_memory: int | None = None
    """Bytes of memory of one device."""
    peak_flops: float | None = None
    """FLOP/s of *one rank*, dense, at ``dtype``; None: unknown, and then there is no MFU."""
    peak_label: str = ""
    """Where ``peak_flops`` comes from, in words, e.g. ``measured 92 GFLOP/s``."""
    peak_source: Literal["", "catalogue", "measured"] = ""
    conventions: dict[str, str] = {}
    """What each FLOPs count includes, by field name (mfu, mfu_palm, hfu)."""


class Memory(msgspec.Struct, omit_defaults=True, gc=False):
    """Bytes at the end of a step. On a device: allocator figures; on CPU only ``rss`` and its peak."""

    allocated: int = 0
    reserved: int = 0
    peak: int = 0
    """The highest ``allocated`` of the step (device), or of the process's life (CPU resident set)."""
    rss: int = 0


class HostTime(msgspec.Struct, omit_defaults=True, gc=False):
    """What the kernel has counted since the process began; read every 100 ms at most, so steps between show the same."""

    cpu_s: float = 0.0
    """The step's thread ran."""
    wait_s: float = 0.0
    """It could have run and waited for a CPU."""
    others_s: float = 0.0
    """The process's other threads ran, together."""
    throttled_s: float = 0.0
    """The control group had used up its quota."""
    faults: int = 0
    """Pages mapped without reading a disk, by all threads."""
    major_faults: int = 0
    """Pages read from a disk."""


class Flops(msgspec.Struct, omit_defaults=True, gc=False):
    """FLOPs of one optimizer step over *all* ranks."""

    model: float
    """Exact: causal attention counts what is computed, packed documents their own squares, no recompute."""
    palm: float | None = None
    """6N + 12LHQT a token (PaLM, appendix B)."""
    hardware: float | None = None
    """``model`` plus recomputation."""


class Comm(msgspec.Struct, array_like=True, gc=False):
    """One operation on one axis within a step, written as ``[calls, bytes, blocked_s]``."""

    calls: int
    bytes: int
    blocked_s: float
    """Seconds in which the step's own thread (or compute stream) waited for it."""


class Step(Event):
    """One optimizer step of one rank. ``phases`` are exclusive and sum to ``step_time_s``.

    ``step_time_s`` runs from the end of the step before, without ``stalls``; so the sum of ``step_time_s``
    and ``stalls`` over all steps is the wall time of the loop, and nothing is lost in between.
    """

    step: int
    start_s: float
    step_time_s: float
    phases: dict[str, float] = {}
    stalls: dict[str, float] = {}
    comm: dict[str, dict[str, Comm]] = {}
    """axis -> operation -> Comm. For each axis ``blocked_s`` sums to ``phases["comm/<axis>"]``."""
    micro_us: dict[str, list[int]] = {}
    """Exclusive microseconds of each call of a phase that ran once a micro-batch (forward, backward), in
    order."""
    tokens: int = 0
    """Real (not padding) tokens this rank's data shard trained on."""
    tokens_padded: int = 0
    """Padding tokens beside them."""
    attn_pairs: int = 0
    """Query-key pairs that attention had to compute for them, one head, one layer."""
    loss: float | None = None
    grad_norm: float | None = None
    lr: float | None = None
    memory: Memory | None = None
    flops: Flops | None = None
    host: HostTime | None = None
    mfu: float | None = None
    """0..1: ``flops.model`` / (step_time_s x world x peak_flops). None where the peak is unknown."""
    mfu_palm: float | None = None
    hfu: float | None = None
    nonfinite: dict[str, str] = {}
    """JSON has no nan or inf: the fields that were, by name; reading gives them back."""

    def __post_init__(self) -> None:
        for name, value in self.nonfinite.items():
            if name in ("loss", "grad_norm", "lr"):
                setattr(self, name, _float(value))

    @property
    def comm_s(self) -> float:
        """Seconds of exposed communication over all axes."""
        return sum(s for name, s in self.phases.items() if name.startswith(COMM))


class DeviceStep(Event):
    """Device time of a step by phase, known only some steps later (no synchronise on the hot path).

    Time between consecutive marks on the compute stream, so the phases sum to ``step_time_s`` here too; a
    device that waits inside ``forward`` counts it as forward. ``step_time_s`` is the device's, stalls left
    out.
    """

    step: int
    step_time_s: float
    phases: dict[str, float] = {}


class Stall(Event):
    """A pause worth its own line: setup, compile, checkpoint, eval, data_retry, gc, ..."""

    kind: str
    start_s: float
    seconds: float
    step: int = -1
    """The step that it preceded or interrupted."""
    detail: str = ""
    in_step: bool = False
    """True: the seconds are part of that step's ``phases``. False: of its ``stalls``, or of no step at
    all."""


class Metrics(Event):
    """Named values that belong to no step record: evaluation losses, probe results."""

    step: int
    values: dict[str, float | None] = {}
    nonfinite: dict[str, str] = {}
    """Names whose value is null in the file because JSON cannot hold it; reading puts nan or inf back."""

    def __post_init__(self) -> None:
        for name, value in self.nonfinite.items():
            self.values[name] = _float(value)


class Finding(Event):
    """What live blame found: who or what holds all ranks up (``profiler.verdict``); again when there is news of it."""

    step: int
    """The last one looked at."""
    kind: str
    """rank, node, switch, link, gc, sequence, stage, run."""
    news: Literal["new", "worse", "lasting", "over"]
    title: str
    evidence: str = ""
    advice: str = ""
    cause: str = ""
    phase: str = ""
    ranks: list[int] = []
    hosts: list[str] = []
    since: int = 0
    until: int | None = None
    """Last step that showed it; None: it still is so."""
    cost_s: float = 0.0
    """Seconds per step that all ranks would save without it."""
    share: float = 0.0
    """``cost_s`` as a share of the step time, 0..1."""


class Message(Event):
    """Something said to the user."""

    level: Literal["info", "warning", "error"]
    text: str
    time_s: float
    step: int = -1


class RunEnd(Event):
    """Last line of an attempt that ended by itself; its absence means that the process was killed."""

    status: Literal["done", "stopped", "failed"]
    """done: all steps; stopped: asked to (signal, drain, time limit); failed: an error."""
    time_s: float
    step: int = -1
    reason: str = ""
    lost: int = 0
    """Records that could not be written (full or stuck disk)."""


AnyEvent = RunStart | Step | DeviceStep | Stall | Metrics | Finding | Message | RunEnd


def split_nonfinite(values: Iterable[tuple[str, float | None]]) -> dict[str, str]:
    """``{name: "nan" | "inf" | "-inf"}`` of the values that JSON cannot hold."""
    return {name: str(value) for name, value in values if value is not None and not math.isfinite(value)}


def _float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
