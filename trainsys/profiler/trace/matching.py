"""The same collective on several ranks: communicators of two or more recorded members, each pairing checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from trainsys.profiler.trace.commlist import CommList, GroupKey
from trainsys.profiler.trace.intervals import Ints
from trainsys.profiler.trace.pairing import LOOSE, SYNCHRONISING, Column, Pairing, pair


@dataclass(slots=True)
class Matched:
    """All matched collectives of one communicator. Arrays are [N collectives, M members]; ns."""

    key: GroupKey
    ranks: list[int]
    start: Ints
    end: Ints
    ahead: Ints
    """What a member's clock is ahead of the first one's: subtract it to compare."""
    place: Ints
    """Each one's number among its rank's own: neighbours are neighbours where it grows by one."""
    op: list[str]
    size: Ints
    """Bytes of each, -1 unknown. [N]"""
    unmatched: int
    """Events of the members that found no partner."""

    @property
    def sync(self) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
        return np.array([op in SYNCHRONISING for op in self.op], bool)

    @property
    def end_spread(self) -> Ints:
        """By how much the ends of each synchronising collective differ, clocks aligned. ns"""
        return np.asarray(np.ptp((self.end - self.ahead)[self.sync], axis=1), np.int64)


@dataclass(slots=True)
class Matches:
    """``said``: what was left out and how often. ``withheld``: pairings without evidence, in words."""

    groups: list[Matched] = field(default_factory=list)
    said: dict[str, int] = field(default_factory=dict)
    withheld: list[str] = field(default_factory=list)


def match(comms: Mapping[int, CommList], hosts: Mapping[int, str] | None = None) -> Matches:
    """Match over ranks. ``hosts`` by rank, empty or absent where unknown: ranks of one host have one clock."""
    hosts = hosts or {}
    out = Matches()
    members: dict[tuple[str, tuple[int, ...]], list[tuple[int, int]]] = {}
    keys: dict[tuple[str, tuple[int, ...]], GroupKey] = {}
    for rank, comm in sorted(comms.items()):
        for k, key in enumerate(comm.keys):
            # A group's name is the same on all its ranks; its list of ranks, if given, tells its twins apart.
            identity = (key.name, key.ranks)
            keys.setdefault(identity, key)
            members.setdefault(identity, []).append((rank, k))

    def count(what: str, n: int) -> None:
        if n:
            out.said[what] = out.said.get(what, 0) + n

    for identity, present in members.items():
        if len(present) < 2:
            rank, k = present[0]
            count("communication of groups with one recorded member", int((comms[rank].key == k).sum()))
            continue
        found, withheld = _match_group(keys[identity], [(r, comms[r], k) for r, k in present], hosts)
        out.withheld += withheld
        if found is not None:
            out.groups.append(found)
    count("communications without a partner on the other ranks", sum(m.unmatched for m in out.groups))
    return out


def _match_group(
    key: GroupKey, members: list[tuple[int, CommList, int]], hosts: Mapping[int, str]
) -> tuple[Matched | None, list[str]]:
    """Every member is paired with the one that recorded most; those that cannot be are left out and said."""
    numbers: dict[tuple[str, int], int] = {}
    picks = {r: np.flatnonzero(c.key == k) for r, c, k in members}
    columns = {r: _column(c, picks[r], numbers) for r, c, _ in members}
    lists = {r: c for r, c, _ in members}
    base = max(columns, key=lambda r: (len(columns[r]), -r))
    pairings: dict[int, Pairing] = {}
    withheld = []
    for rank, column in columns.items():
        if rank == base:
            continue
        one_clock = bool(hosts.get(rank)) and hosts.get(rank) == hosts.get(base)
        found = pair(columns[base], column, one_clock)
        if isinstance(found, str):
            withheld.append(f"group {key.label}: rank {rank} is not compared with rank {base}: {found}")
        else:
            pairings[rank] = found
    if not pairings:
        return None, withheld
    common = np.arange(len(columns[base]))
    for p in pairings.values():
        common = np.intersect1d(common, p.left)
    if not common.size:
        return None, [
            *withheld,
            f"group {key.label}: no collective was recorded by all of ranks {sorted(columns)}",
        ]
    ranks = sorted([base, *pairings])
    chosen, ahead = [], []
    for r in ranks:
        if r == base:
            chosen.append(common)
            ahead.append(np.zeros(common.size, np.int64))
        else:
            at = np.searchsorted(pairings[r].left, common)
            chosen.append(pairings[r].right[at])
            ahead.append(pairings[r].ahead[at])
    own = {r: picks[r][c] for r, c in zip(ranks, chosen, strict=True)}
    clock = np.stack(ahead, axis=1)
    sizes = np.max([lists[r].size[i] for r, i in own.items()], axis=0)
    first = lists[ranks[0]]
    return Matched(
        key,
        ranks,
        np.stack([lists[r].start[i] for r, i in own.items()], axis=1),
        np.stack([lists[r].end[i] for r, i in own.items()], axis=1),
        clock - clock[:, :1],
        np.stack(chosen, axis=1),
        [first.ops[o] for o in first.op[own[ranks[0]]].tolist()],
        sizes,
        sum(len(columns[r]) - common.size for r in ranks),
    ), withheld


def _column(comm: CommList, pick: Ints, numbers: dict[tuple[str, int], int]) -> Column:
    op = [comm.ops[o] for o in comm.op[pick].tolist()]
    signature = [
        (o, -1 if o in LOOSE else size) for o, size in zip(op, comm.size[pick].tolist(), strict=True)
    ]
    return Column(
        comm.start[pick],
        comm.end[pick],
        np.array([o in SYNCHRONISING for o in op], bool),
        np.array([numbers.setdefault(s, len(numbers)) for s in signature], np.int64),
        comm.seq[pick],
        comm.step[pick],
        comm.on_host,
    )


def align_clocks(groups: list[Matched], hosts: Mapping[int, str]) -> tuple[dict[int, int], int | None]:
    """Offset of each rank's clock (ns, to subtract), from the ends of synchronising collectives.

    A clock belongs to a host: ranks of one host share their offset, and with a single host there is none to find.
    Within a group each member's offset from the group's middle is the median over its collectives; over groups the
    offsets are joined by least squares. Offsets that explain less than half of the disagreement are not
    believed. Returns (offsets, median absolute residual after; None with nothing to go by).
    """
    ranks = sorted({r for g in groups for r in g.ranks})
    clock = {r: hosts.get(r) or f"rank {r}" for r in ranks}
    number = {c: i for i, c in enumerate(dict.fromkeys(clock.values()))}
    none = dict.fromkeys(ranks, 0)
    ends: list[tuple[list[int], np.ndarray[tuple[int, int], np.dtype[np.float64]]]] = []
    for g in groups:
        if g.sync.any():
            end = g.end[g.sync]
            away = (end - end.min()).astype(float)
            ends.append(([number[clock[r]] for r in g.ranks], away - np.median(away, axis=1, keepdims=True)))
    if not ends:
        return none, None
    before = _typical([away for _, away in ends])
    if len(number) == 1:
        return none, round(before)
    rows, wanted = [], []
    for clocks, away in ends:
        middle = np.median(away, axis=0)
        row = np.zeros((len(clocks), len(number)))
        row[np.arange(len(clocks)), clocks] = 1
        rows.append(row - row.mean(axis=0))
        wanted.append(middle - middle.mean())
    offset = np.linalg.lstsq(np.concatenate(rows), np.concatenate(wanted), rcond=None)[0]
    shifted = [away - offset[clocks] for clocks, away in ends]
    after = _typical([x - np.median(x, axis=1, keepdims=True) for x in shifted])
    if after > before / 2:
        return none, round(before)
    offset -= np.median(offset)
    return {r: round(float(offset[number[clock[r]]])) for r in ranks}, round(after)


def _typical(parts: list[np.ndarray[tuple[int, int], np.dtype[np.float64]]]) -> float:
    return float(np.median(np.abs(np.concatenate([p.ravel() for p in parts]))))
