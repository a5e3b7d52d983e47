"""What-if on a timeline of operations: how long a step had been, had this worker, stage or kind been ideal.

After Lin et al. 2025, "Understanding Stragglers in Large Model Training Using What-if Analysis". A worker is a
(data rank, pipeline stage). Operations of a step become a dependency graph; a communication's own time is its end less
the latest start of its members, so that waiting is not in it. Ideal is the mean of a kind's compute, the median of a
kind's communication, over the whole recording. Replaying the graph with some operations ideal gives the step time
that would have been.

    S    step time as it was / with everything ideal
    S_x  with everything ideal except x (a kind, worker, stage) / with everything ideal
    M_x  share of the loss that x alone would give back: (T - T with x ideal) / (T - T ideal)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

Worker = tuple[int, int]
"""(data rank, pipeline stage)."""
_SENDS = {"forward-send": ("forward-recv", 1), "backward-send": ("backward-recv", -1)}
_STAGE_WIDE = ("params-all-gather", "grads-reduce-scatter")
_ENDS = "embedding-grads-all-reduce"
_WORLD = "optimizer-clip-main-grad"
_COMPUTE = ("forward-compute", "backward-compute")


@dataclass(frozen=True, slots=True)
class Op:
    """One operation of one worker; seconds. ``order`` counts those of its kind within the step."""

    step: int
    worker: Worker
    kind: str
    start_s: float
    seconds: float
    order: int


@dataclass(slots=True)
class _Node:
    """``parts``: each member's own seconds; all of them end when the last one does."""

    kind: str
    parts: tuple[tuple[Worker, float], ...]
    causes: list[int]


Pick = Callable[[str, Worker], bool]
"""(kind, worker) -> whether its operations of that kind are ideal."""


def read_rows(rows: Iterable[dict[str, Any]]) -> list[Op]:
    """From rows with the columns dp_rank, stage, step, optype, start_ts, duration, seq_id."""
    return [Op(r["step"], (r["dp_rank"], r["stage"]), r["optype"], r["start_ts"], r["duration"], r["seq_id"])
            for r in rows]  # fmt: skip


class Timeline:
    """A recording of several steps; every step must hold the same kinds."""

    def __init__(self, ops: Sequence[Op]) -> None:
        by_step: dict[int, list[Op]] = {}
        for op in ops:
            by_step.setdefault(op.step, []).append(op)
        self.steps = {step: _graph(found) for step, found in sorted(by_step.items())}
        self.workers = sorted({op.worker for op in ops})
        self.kinds = sorted({node.kind for graph in self.steps.values() for node in graph})
        self._ideal = self._ideal_seconds()

    def _ideal_seconds(self) -> dict[str, float]:
        seconds: dict[str, list[float]] = {}
        for graph in self.steps.values():
            for node in graph:
                seconds.setdefault(node.kind, []).extend(own for _, own in node.parts)
        return {kind: float((np.mean if kind in _COMPUTE else np.median)(s)) for kind, s in seconds.items()}

    def step_time(self, ideal: Pick) -> float:
        """Mean over steps of the replayed step time in seconds, with those operations ideal that ``ideal`` picks."""
        return float(np.mean([self._replay(graph, ideal) for graph in self.steps.values()]))

    def _replay(self, graph: list[_Node], ideal: Pick) -> float:
        end: list[float] = []
        # Each pair is asked about once, not once an operation.
        chosen = {(k, w): ideal(k, w) for k in self.kinds for w in self.workers}
        for node in graph:
            ready = max([end[c] for c in node.causes], default=0.0)
            kind, usual = node.kind, self._ideal[node.kind]
            end.append(ready + max([usual if chosen[kind, w] else own for w, own in node.parts]))
        return max(end)

    @cached_property
    def actual_s(self) -> float:
        return self.step_time(lambda kind, worker: False)

    @cached_property
    def ideal_s(self) -> float:
        # Every step is the same graph of the same ideal operations.
        return self._replay(next(iter(self.steps.values())), lambda kind, worker: True)

    @property
    def slowdown(self) -> float:
        """S."""
        return self.actual_s / self.ideal_s

    def by_kind(self) -> dict[str, float]:
        """S_t of each kind of operation."""
        return {k: self.step_time(lambda kind, _, k=k: kind != k) / self.ideal_s for k in self.kinds}  # type: ignore[misc]

    def by_worker(self) -> dict[Worker, float]:
        """S_w of each worker."""
        return {w: self._only(lambda worker, w=w: worker == w) for w in self.workers}  # type: ignore[misc]

    def by_stage(self) -> dict[int, float]:
        return {s: self._only(lambda w, s=s: w[1] == s) for s in sorted({w[1] for w in self.workers})}  # type: ignore[misc]

    def by_data_rank(self) -> dict[int, float]:
        return {d: self._only(lambda w, d=d: w[0] == d) for d in sorted({w[0] for w in self.workers})}  # type: ignore[misc]

    def _only(self, mine: Callable[[Worker], bool]) -> float:
        return self.step_time(lambda kind, worker: not mine(worker)) / self.ideal_s

    def gives_back(self, mine: Callable[[Worker], bool]) -> float:
        """M: the share of the loss that is gone once the chosen workers' operations are ideal; 0 without a loss."""
        lost = self.actual_s - self.ideal_s
        if lost <= 0:
            return 0.0
        return (self.actual_s - self.step_time(lambda kind, worker: mine(worker))) / lost

    def worst_workers(self, share: float = 0.03) -> list[Worker]:
        """The slowest ``share`` of workers, at least one: whose M is M_W."""
        slow = self.by_worker()
        return sorted(self.workers, key=lambda w: -slow[w])[: max(1, round(share * len(self.workers)))]


def _graph(ops: list[Op]) -> list[_Node]:
    """Nodes in an order in which causes come first."""
    found = {(op.worker, op.kind, op.order): op for op in ops}
    members: dict[tuple[object, ...], list[Op]] = {}
    for op in ops:
        if op.kind.endswith("-recv"):
            continue
        d, s = op.worker
        key: tuple[object, ...] = (op.kind, op.worker, op.order)
        if op.kind in _STAGE_WIDE:
            key = (op.kind, s, op.order)
        elif op.kind == _ENDS:
            key = (op.kind, d, op.order)
        elif op.kind == _WORLD:
            key = (op.kind, op.order)
        members.setdefault(key, []).append(op)
        if op.kind in _SENDS:
            name, away = _SENDS[op.kind]
            other = found.get(((d, s + away), name, op.order))
            members[key] += [other] if other is not None else []
    keys = list(members)
    number = {id(op): i for i, key in enumerate(keys) for op in members[key]}
    causes: list[set[int]] = [set() for _ in keys]

    def after(later: Op | None, earlier: Op | None) -> None:
        if later is not None and earlier is not None and id(later) in number and id(earlier) in number:
            causes[number[id(later)]].add(number[id(earlier)])

    by_worker: dict[Worker, list[Op]] = {}
    for op in sorted(ops, key=lambda op: op.start_s):
        by_worker.setdefault(op.worker, []).append(op)
    for worker, mine in by_worker.items():
        # Streams: compute and whatever is not point to point in one, each kind of send and receive in its own.
        streams: dict[str, Op] = {}
        for op in mine:
            stream = op.kind if op.kind.endswith(("-send", "-recv")) else "main"
            after(op, streams.get(stream))
            streams[stream] = op
            if stream != "main":
                compute = found.get((worker, op.kind.rsplit("-", 1)[0] + "-compute", op.order))
                if op.kind.endswith("-send"):
                    after(op, compute)
                else:
                    after(compute, op)
    nodes = []
    for key, found_causes in zip(keys, causes, strict=True):
        group = members[key]
        late = max(op.start_s for op in group)
        own = tuple((op.worker, max(0.0, op.start_s + op.seconds - late)) for op in group)
        nodes.append(_Node(group[0].kind.replace("-send", "-pp-comm"), own, sorted(found_causes)))
    return _sorted(nodes)


def _sorted(nodes: list[_Node]) -> list[_Node]:
    """Causes first (Kahn 1962)."""
    waits = [len(node.causes) for node in nodes]
    effects: list[list[int]] = [[] for _ in nodes]
    for i, node in enumerate(nodes):
        for c in node.causes:
            effects[c].append(i)
    ready = [i for i, n in enumerate(waits) if n == 0]
    order = []
    while ready:
        i = ready.pop()
        order.append(i)
        for e in effects[i]:
            waits[e] -= 1
            if waits[e] == 0:
                ready.append(e)
    assert len(order) == len(nodes), "the operations wait for each other in a circle"
    place = {old: new for new, old in enumerate(order)}
    return [_Node(nodes[i].kind, nodes[i].parts, [place[c] for c in nodes[i].causes]) for i in order]
