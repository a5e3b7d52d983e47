"""Events into columns, chunk by chunk: a dictionary lookup on the category, then list comprehensions."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from trainsys.profiler.trace import columns as col
from trainsys.profiler.trace.args import args_of, correlations_of, number, ranks, shapes
from trainsys.profiler.trace.decode import EventDecoder, to_ns
from trainsys.profiler.trace.events import DEVICE, KINDS, NOTE, OPERATOR, PYTHON, RUNTIME, AnyEvent, Args
from trainsys.profiler.trace.health import UNTIMED, timed
from trainsys.profiler.trace.intervals import EMPTY, Ints, Spans, clip, merge, union
from trainsys.profiler.trace.kernel_names import LONGEST
from trainsys.profiler.trace.opflops import COUNTED
from trainsys.profiler.trace.untyped import Tracks

_MERGE_EVERY = 64
_ACTIVITY = {
    "kernel": col.KERNEL,
    "Kernel": col.KERNEL,
    "gpu_memset": col.MEMSET,
    "memset": col.MEMSET,
    "Memset": col.MEMSET,
}
_NOTE_PREFIXES = (
    "ProfilerStep",
    "enumerate(DataLoader)",
    "nccl:",
    "gloo:",
    "mpi:",
    "ucc:",
    "c10d::",
    "Optimizer.",
)


def _ints(values: list[int]) -> Ints:
    """``np.array`` looks at everything twice to find out what it is."""
    return np.fromiter(values, np.int64, len(values))


def _middle(start: Ints) -> int:
    """A start in the middle of those that are no placeholder."""
    real = start[start != 0]
    return int(np.sort(real)[real.size // 2]) if real.size else 0


MAX_NS = 1 << 62
"""The year 2116; two of them still make a number of 64 bits."""


_CONTROL = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|[\x00-\x1f\x7f-\x9f]")


def clean(name: str) -> str:
    """Without terminal escapes and control characters, which would act on the reader's terminal; of bounded length."""
    name = name[:LONGEST]
    return name if name.isprintable() else _CONTROL.sub(" ", name).strip()


class _Numbers(dict[Any, int]):
    """Numbers keys in the order they are first asked for."""

    def __missing__(self, key: Any) -> int:
        self[key] = number = len(self)
        return number


class _Flags(dict[str, int]):
    """Whether an operator is counted (1) or noted (2), worked out once a name."""

    def __missing__(self, name: str) -> int:
        noted = name.startswith(_NOTE_PREFIXES)
        self[name] = flag = 1 if name in COUNTED else 2 if noted else 0
        return flag


class Collector:
    """Takes chunks of events in, gives one ``RankTrace`` out."""

    def __init__(self, path: Path, decoder: EventDecoder) -> None:
        self.path, self.decoder, self.said = path, decoder, decoder.said
        self.trace = col.RankTrace(path, -1, 0, said=decoder.said)
        self._names, self._threads = _Numbers(), _Numbers()
        self._meta: dict[tuple[object, ...], int] = {}
        self._parts: dict[str, list[list[Ints]]] = {"device": [], "runtime": [], "notes": [], "ops": []}
        self._busy: list[Spans] = []
        self._low, self._high = np.iinfo(np.int64).max, np.iinfo(np.int64).min
        self._per_unit = 0
        self._flags = _Flags()
        self._tracks = Tracks()

    def add(self, events: list[AnyEvent]) -> bool:
        """Keep what matters of a chunk. False where its times need decoding as decimals first."""
        buckets: list[list[AnyEvent]] = [[], [], [], [], []]
        rest: list[AnyEvent] = []
        place = {category: buckets[kind].append for category, kind in KINDS.items()}.get
        leave = rest.append
        for event in events:
            place(event.cat, leave)(event)
        timed: list[tuple[list[AnyEvent], Ints, Ints]] = []
        for bucket in buckets:
            times = self._times(bucket)
            if times is None:
                return False
            timed.append(times)
        self._device(*timed[DEVICE])
        self._runtime(*timed[RUNTIME])
        self._operators(*timed[OPERATOR])
        self._notes(*timed[NOTE])
        self._python(*timed[PYTHON])
        self._tracks.add([e for e in rest if not e.cat])
        return True

    def _times(self, bucket: list[AnyEvent]) -> tuple[list[AnyEvent], Ints, Ints] | None:
        """(events, starts, ends) of those with a duration; None if doubles are not exact enough."""
        none = np.zeros(0, np.int64)
        if not bucket:
            return bucket, none, none
        durations = [e.dur for e in bucket]
        if min(durations) < 0:
            bucket = self._holding(bucket, lambda e: e.dur >= 0 and e.ts >= 0, "without a duration or start")
            if not bucket:
                return bucket, none, none
            durations = [e.dur for e in bucket]
        stamps = [e.ts for e in bucket]
        if not self._per_unit:
            # Microseconds since 1970 reach 1e17 in the year 5138: what is above that is nanoseconds.
            self._per_unit = 1 if max(stamps) > 1e17 else 1000
            if self._per_unit == 1:
                self.said["assumed: timestamps above 1e17 are nanoseconds"] += 1
        most = MAX_NS // self._per_unit
        if max(stamps) > most or min(stamps) < -most or max(durations) > most:
            bucket = self._holding(
                bucket, lambda e: -most <= e.ts <= most and e.dur <= most, "whose time is no time of this age"
            )
            if not bucket:
                return bucket, none, none
            stamps, durations = [e.ts for e in bucket], [e.dur for e in bucket]
        start = to_ns(stamps, self._per_unit)  # type: ignore[arg-type]
        length = to_ns(durations, self._per_unit)  # type: ignore[arg-type]
        if start is None or length is None:
            return None
        end = start + length
        self._low, self._high = min(self._low, int(start.min())), max(self._high, int(end.max()))
        return bucket, start, end

    def _holding(
        self, bucket: list[AnyEvent], holds: Callable[[AnyEvent], bool], what: str
    ) -> list[AnyEvent]:
        """Those that hold; the others, of which there is one at least, are counted as dropped."""
        kept = [e for e in bucket if holds(e)]
        self.said[f"dropped: event {what}"] += len(bucket) - len(kept)
        return kept

    def _name_ids(self, bucket: list[AnyEvent]) -> Ints:
        table = self._names
        return _ints([table[e.name] for e in bucket])

    def _thread_ids(self, bucket: list[AnyEvent]) -> Ints:
        table = self._threads
        return _ints([table[e.pid, e.tid] for e in bucket])

    def _device(self, bucket: list[AnyEvent], start: Ints, end: Ints) -> None:
        if not bucket:
            return
        args = args_of(bucket, self.said)
        kinds = _ACTIVITY
        device, stream = [a.device for a in args], [a.stream for a in args]
        if min(device) < 0:
            device = [d if d >= 0 else number(e.pid) for d, e in zip(device, bucket, strict=True)]
        if min(stream) < 0:
            stream = [s if s >= 0 else number(e.tid) for s, e in zip(stream, bucket, strict=True)]
        columns = [
            [kinds.get(e.cat, col.MEMCPY) for e in bucket],
            device,
            stream,
            [a.correlation for a in args],
            [a.external if a.external >= 0 else a.external_old for a in args],
            [a.bytes for a in args],
            [a.graph for a in args],
            [
                -1 if a.op is None and a.group is None and a.group_size < 0 else self._comm_meta(a)
                for a in args
            ],
        ]
        self._parts["device"].append([start, end, self._name_ids(bucket), *map(_ints, columns)])

    def _comm_meta(self, a: Args) -> int:
        if a.op is None and a.group is None and a.group_size < 0:
            return -1
        fields = (
            a.op,
            a.group,
            a.group_desc,
            a.ranks,
            a.group_size,
            a.in_elements,
            a.out_elements,
            a.dtype,
            a.sequence,
        )
        index = self._meta.get(fields)
        if index is None:
            index = self._meta[fields] = len(self.trace.comm_meta)
            self.trace.comm_meta.append(
                col.CommMeta(a.op or "", a.group or "", a.group_desc or "", ranks(a.ranks), *fields[4:])
            )
        return index

    def _runtime(self, bucket: list[AnyEvent], start: Ints, end: Ints) -> None:
        if bucket:
            self._keep("runtime", bucket, start, end, _ints(correlations_of(bucket, self.said)))

    def _keep(
        self, part: str, bucket: list[AnyEvent], start: Ints, end: Ints, extra: Ints | None = None
    ) -> None:
        if extra is None:
            extra = np.full(len(bucket), -1, np.int64)
        self._parts[part].append([start, end, self._name_ids(bucket), self._thread_ids(bucket), extra])

    def _operators(self, bucket: list[AnyEvent], start: Ints, end: Ints) -> None:
        if not bucket:
            return
        self._busy.append(union(start, end))
        if len(self._busy) == _MERGE_EVERY:
            self._busy = [merge(*self._busy)]
        flags = self._flags
        kept = [(i, flag) for i, e in enumerate(bucket) if (flag := flags[e.name])]
        counted = [i for i, flag in kept if flag == 1]
        if counted:
            self._counted([bucket[i] for i in counted], start[counted], end[counted])
        noted = [i for i, flag in kept if flag == 2]
        if noted:
            self._keep("notes", [bucket[i] for i in noted], start[noted], end[noted])

    def _counted(self, bucket: list[AnyEvent], start: Ints, end: Ints) -> None:
        indices = []
        for event, a in zip(bucket, args_of(bucket, self.said), strict=True):
            indices.append(len(self.trace.op_shapes))
            self.trace.op_shapes.append(col.Op(event.name, *shapes(a)))
        self._keep("ops", bucket, start, end, _ints(indices))

    def _notes(self, bucket: list[AnyEvent], start: Ints, end: Ints) -> None:
        if bucket:
            args = args_of(bucket, self.said)
            indices = [self._comm_meta(a) for a in args]
            for i, (event, a) in enumerate(zip(bucket, args, strict=True)):
                if indices[i] < 0 and a.dims and ":" in event.name[:5]:
                    indices[i] = self._meta_from_shape(a)
            self._keep("notes", bucket, start, end, _ints(indices))

    def _meta_from_shape(self, a: Args) -> int:
        """A host collective gives only its tensors: enough for the size of the message."""
        dims, dtype = shapes(a)
        if not dims:
            return -1
        elements = sum(int(np.prod(d)) for d in dims)
        return self._comm_meta(Args(op="", group="", in_elements=elements, dtype=dtype))

    def _python(self, bucket: list[AnyEvent], start: Ints, end: Ints) -> None:
        kept = [i for i, e in enumerate(bucket) if "checkpoint" in e.name and "recompute_fn" in e.name]
        if kept:
            self._keep("notes", [bucket[i] for i in kept], start[kept], end[kept])

    def finish(self) -> col.RankTrace:
        """The columns, in order of start; host spans merged."""
        trace = self.trace
        if not self._parts["device"]:
            self._untyped()
        trace.names = [clean(n) for n in self._names]
        for part, kind, width in (
            ("device", col.Activities, 11),
            ("runtime", col.Calls, 5),
            ("notes", col.Calls, 5),
            ("ops", col.Calls, 5),
        ):
            chunks = self._parts.pop(part)
            if chunks:
                merged = self._of_this_recording(
                    [np.concatenate([c[i] for c in chunks]) for i in range(width)]
                )
                order = np.argsort(merged[0], kind="stable")
                setattr(trace, part, kind(*(m[order] for m in merged)))
        trace.host_busy = merge(*self._busy) if self._busy else EMPTY
        if self._high >= self._low:
            trace.span = (int(self._low), int(self._high))
        if trace.said[UNTIMED]:
            parts = [p for p in (trace.device, trace.runtime, trace.notes, trace.ops) if len(p)]
            trace.span = (min(int(p.start.min()) for p in parts), max(int(p.end.max()) for p in parts))
            trace.host_busy = clip(trace.host_busy, *trace.span)
        return trace

    def _of_this_recording(self, columns: list[Ints]) -> list[Ints]:
        good = timed(columns[0], _middle(columns[0]))
        if good.all():
            return columns
        self.said[UNTIMED] += int((~good).sum())
        return [c[good] for c in columns]

    def _untyped(self) -> None:
        """Device activities of a trace without categories, by its tracks."""
        found = self._tracks.device_events()
        times = self._times([e for e, _, _ in found])
        if not found or times is None or len(times[0]) != len(found):
            return
        self.said["assumed: events without a category are the device's where their track is"] += 1
        args = args_of(times[0], self.said)
        none = [-1] * len(found)
        columns = [
            [
                col.MEMCPY if e.name.lower().startswith(("memcpy", "memset")) else col.KERNEL
                for e, _, _ in found
            ],
            [device for _, device, _ in found],
            [stream for _, _, stream in found],
            none,
            none,
            [a.bytes for a in args],
            [0] * len(found),
            none,
        ]
        self._parts["device"].append([*times[1:], self._name_ids(times[0]), *map(_ints, columns)])
