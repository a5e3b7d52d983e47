"""Who stopped: roots of the wait-for graph over ranks.

Each rank is judged by the operation at the head of its queue, the oldest it has not finished. It waits for
the members of that operation that are not there: not yet enqueued, or enqueued behind something of their own.
A rank others wait for, and that waits for nobody, is a root. It either never enqueued the operation (its host
stopped), or its peers have finished what it has not (its device stopped, and its host ran ahead). Everyone
else merely waits, however long their own timeouts say they have.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

from trainsys.errors import UserError
from trainsys.profiler.hang.dumps import Dump, Operation, load_content, parse_dump
from trainsys.profiler.hang.report import HangReport, Mismatch, Root, Waiter
from trainsys.rank_lists import first_few, rank_numbers, ranks_named

# A root's part of a gather or scatter is not its peers'; an all-gather's or reduce-scatter's is.
_SIZES_MAY_DIFFER = re.compile(
    r"all_?to_?all|(?<!all_)(?<!all)gather|(?<!reduce_)(?<!reduce)scatter|send|recv|coalesced"
)


def analyse_dumps(paths: list[Path]) -> HangReport:
    """Read and judge one job's dumps. Raises UserError if none can be read; single bad ones are counted."""
    said: Counter[str] = Counter()
    dumps: dict[int, Dump] = {}
    first: UserError | None = None
    for path in paths:
        try:
            dump = parse_dump(path, load_content(path), said)
        except UserError as error:
            first = first or error
            said[f"unreadable: {error}"] += 1
            continue
        dumps[dump.rank] = dump
    if not dumps:
        raise first or UserError("no flight-recorder dumps given")
    return judge(dumps, said)


class Wait:
    """The state of all ranks, asked one operation at a time."""

    def __init__(self, dumps: dict[int, Dump]) -> None:
        self.dumps = dumps
        self.groups = {name: group for d in dumps.values() for name, group in d.groups.items()}
        numbers = {name: number for d in dumps.values() for name, number in d.numbers.items()}
        # A rank whose queue is empty names no group's number; its peers' numbering is the same one.
        self.number = {rank: numbers | d.numbers for rank, d in dumps.items()}
        self.head = {rank: d.pending[0] if d.pending else None for rank, d in dumps.items()}

    def members(self, rank: int, operation: Operation) -> tuple[int, ...]:
        if operation.peer is not None:
            return (operation.peer,)
        return tuple(r for r in self.groups.get(operation.group, ("", ()))[1] if r != rank)

    def enqueued(self, rank: int, operation: Operation) -> bool:
        """Whether the rank's host has got as far as this collective."""
        dump = self.dumps[rank]
        mine = [o.sequence for o in dump.operations if o.group == operation.group and not o.p2p]
        if mine and max(mine) >= operation.sequence:
            return True
        status = dump.status.get(self.number[rank].get(operation.group, ""))
        return status is not None and status[0] >= operation.sequence

    def finished(self, rank: int, operation: Operation) -> bool:
        """Whether the rank's device is past this collective."""
        status = self.dumps[rank].status.get(self.number[rank].get(operation.group, ""))
        pending = [o.sequence for o in self.dumps[rank].pending if o.group == operation.group and not o.p2p]
        if pending:
            return min(pending) > operation.sequence
        return self.enqueued(rank, operation) and (status is None or status[1] >= operation.sequence)

    def absent(self, rank: int) -> list[int]:
        """Whom the rank waits for."""
        operation = self.head[rank]
        if operation is None:
            return []
        out = []
        for other in self.members(rank, operation):
            if other not in self.dumps:
                out.append(other)
            elif operation.p2p:
                if not self._meets(rank, other):
                    out.append(other)
            elif not self.finished(other, operation):
                head = self.head[other]
                there = (
                    head is not None and head.group == operation.group and head.sequence == operation.sequence
                )
                if not there:
                    out.append(other)
        return out

    def _meets(self, rank: int, other: int) -> bool:
        head = self.head[other]
        return head is not None and head.p2p and head.peer == rank

    def peers_finished(self, rank: int) -> list[int]:
        """Peers past the operation this rank's device is still in."""
        operation = self.head[rank]
        if operation is None or operation.p2p or not operation.device:
            return []
        return [r for r in self.members(rank, operation) if r in self.dumps and self.finished(r, operation)]


def judge(dumps: dict[int, Dump], said: Counter[str]) -> HangReport:
    """The verdict over parsed dumps by rank."""
    wait = Wait(dumps)
    known = {r for _, ranks in wait.groups.values() for r in ranks} | set(dumps)
    report = HangReport(sorted(dumps), sorted(known - set(dumps)))
    on = {rank: wait.absent(rank) for rank in dumps}
    awaited = {r for others in on.values() for r in others}
    ahead = {rank: wait.peers_finished(rank) for rank in dumps}
    # A device merely behind its peers when the dump was taken is nobody's trouble if others are waited for.
    suspects = (
        awaited if any(r not in dumps or not on[r] for r in awaited) else {r for r in dumps if ahead[r]}
    )
    for rank in sorted(suspects):
        if rank not in dumps:
            waiters = sorted(r for r in on if rank in on[r])
            evidence = f"ranks {rank_numbers(waiters)} wait for it and it left no dump"
            report.roots.append(Root(rank, "no_dump", evidence, 0, ""))
        elif not on[rank]:
            report.roots.append(_root(rank, wait, on, ahead[rank]))
    roots = {r.rank for r in report.roots}
    for rank, operation in sorted(wait.head.items()):
        if operation is not None and rank not in roots:
            report.waiting.append(Waiter(rank, operation.text(wait.groups), sorted(on[rank])))
    report.mismatches = _mismatches(dumps, wait)
    report.together = _together(wait, on, roots)
    if not roots:
        report.cycles = _cycles(on)
    report.said = dict(said)
    report.verdict = _verdict(report, wait)
    return report


def _root(rank: int, wait: Wait, on: dict[int, list[int]], finished: list[int]) -> Root:
    dump, head = wait.dumps[rank], wait.head[rank]
    outstanding = len(dump.pending)
    where = dump.operations[-1].where if dump.operations else ""
    waiters = sorted(r for r in on if rank in on[r])
    if head is not None and finished:
        evidence = (
            f"has not finished {head.text(wait.groups)}, which ranks {rank_numbers(finished)} have; "
            f"{outstanding} operations outstanding"
        )
        return Root(rank, "device_stalled", evidence, outstanding, where)
    if head is not None:
        evidence = f"{ranks_named(waiters)} wait for it; it is in {head.text(wait.groups)}, which all its members entered"
        return Root(rank, "in_operation", evidence, outstanding, where)
    heads = [h for r in waiters if (h := wait.head[r]) is not None]
    # The collective most of them wait in says more than one pipeline neighbour's send.
    operation = max(heads, key=lambda o: (not o.p2p, sum(h.group == o.group for h in heads)), default=None)
    assert operation is not None, "a root with an empty queue is one that others wait for"
    evidence = f"never enqueued {operation.text(wait.groups)}, in which ranks {rank_numbers(waiters)} wait"
    return Root(rank, "never_arrived", evidence, outstanding, where)


def _mismatches(dumps: dict[int, Dump], wait: Wait) -> list[Mismatch]:
    """Mismatches among collectives not known to have finished everywhere: those that have were no obstacle."""
    seen: dict[tuple[str, int], dict[int, Operation]] = {}
    for rank, dump in sorted(dumps.items()):
        for o in dump.operations:
            if not o.p2p and len(wait.groups.get(o.group, ("", ()))[1]) > 1:
                seen.setdefault((o.group, o.sequence), {})[rank] = o
    found = []
    for (group, sequence), by_rank in sorted(seen.items()):
        what = _difference(list(by_rank.values()))
        if what and any(o.pending for o in by_rank.values()):
            variants: dict[str, list[int]] = {}
            where: dict[str, str] = {}
            for rank, o in by_rank.items():
                variants.setdefault(_issued(o), []).append(rank)
                where.setdefault(_issued(o), o.where)
            found.append(Mismatch(group, sequence, what, variants, where))
    return found[:20]


def _issued(o: Operation) -> str:
    return " ".join(filter(None, (o.name.split(":", 1)[-1], o.sizes, o.dtypes)))


def _difference(operations: list[Operation]) -> str:
    if len({o.name for o in operations}) > 1:
        return "operation"
    if len({o.dtypes for o in operations}) > 1:
        return "dtype"
    loose = _SIZES_MAY_DIFFER.search(operations[0].name)
    return "size" if not loose and len({o.sizes for o in operations}) > 1 else ""


def explain_mismatch(m: Mismatch) -> str:
    """Who issued what, the few first, with the recorded line of code."""
    ways = []
    for variant, ranks in sorted(m.variants.items(), key=lambda v: len(v[1])):
        line = f" at {m.where[variant]}" if m.where.get(variant) else ""
        ways.append(f"{ranks_named(ranks)}: {variant}{line}")
    return "; ".join(ways)


def _together(wait: Wait, on: dict[int, list[int]], roots: set[int]) -> list[str]:
    out = set()
    for rank, operation in wait.head.items():
        if operation is not None and not on[rank] and rank not in roots and operation.device:
            others = wait.members(rank, operation)
            if others and all(r in wait.dumps and not wait.finished(r, operation) for r in others):
                out.add(f"{operation.text(wait.groups)}, ranks {rank_numbers(sorted((rank, *others)))}")
    return sorted(out)


def _cycles(on: dict[int, list[int]]) -> list[list[int]]:
    """One ring of ranks that wait for each other, found by walking; empty where there is none."""
    for begin in sorted(on):
        path: list[int] = []
        rank: int | None = begin
        while rank is not None and rank not in path:
            path.append(rank)
            rank = min(on.get(rank, []), default=None)
        if rank is not None:
            return [path[path.index(rank) :]]
    return []


def _verdict(report: HangReport, wait: Wait) -> str:
    if report.mismatches and not any(r.kind == "device_stalled" for r in report.roots):
        m = report.mismatches[0]
        label = wait.groups.get(m.group, ("", ()))[0]
        return (
            f"{m.what} mismatch at collective #{m.sequence} of group {m.group}{f' ({label})' if label else ''}: "
            f"{explain_mismatch(m)}"
        )
    if report.roots:
        words = {
            "never_arrived": "never arrived (host stopped)",
            "device_stalled": "device stopped",
            "no_dump": "left no dump (died?)",
            "in_operation": "stuck in an operation",
        }
        who = first_few(f"rank {r.rank} {words[r.kind]}" for r in report.roots)
        return f"{who}; {len(report.waiting)} ranks merely wait"
    if report.cycles:
        return f"{ranks_named(report.cycles[0])} wait for each other in a ring: collectives issued in different orders"
    if report.together:
        return f"all members entered and none finished {report.together[0]}: suspect the network, not a rank"
    if all(o is None for o in wait.head.values()):
        return "every rank had finished all it enqueued: no hang in a collective"
    return "no rank waits for another: no hang in a collective"
