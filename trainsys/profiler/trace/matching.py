"""The same collective on several ranks: matched by (group, sequence), or by order where no sequence is given.

Collectives of one communicator happen in one order on all its ranks, so order within the group is a
sequence, up to where each rank's recording began. Where ranks recorded different numbers, each is shifted
to where operations and sizes agree and ends coincide best.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trainsys.profiler.trace.commlist import CommList, GroupKey
from trainsys.profiler.trace.intervals import Ints

SYNCHRONISING = frozenset(
    {"all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send_recv", "communication"}
)
"""Operations no rank can leave before all have come. A broadcast's root may."""


@dataclass(slots=True)
class Matched:
    """All matched collectives of one communicator. Arrays are [N collectives, M members]; ns."""

    key: GroupKey
    ranks: list[int]
    start: Ints
    end: Ints
    op: list[str]
    size: Ints
    """Bytes of each, -1 unknown. [N]"""
    unmatched: int
    """Events of the members that found no partner."""


def match(comms: dict[int, CommList]) -> tuple[list[Matched], dict[str, int]]:
    """Match over ranks. Returns (communicators of two or more recorded members, what was left out by why)."""
    members: dict[tuple[str, tuple[int, ...]], list[tuple[int, int]]] = {}
    keys: dict[tuple[str, tuple[int, ...]], GroupKey] = {}
    said: dict[str, int] = {}
    for rank, comm in sorted(comms.items()):
        for k, key in enumerate(comm.keys):
            # A group's name is the same on all its ranks; its list of ranks, if given, tells its twins apart.
            identity = (key.name, key.ranks)
            keys.setdefault(identity, key)
            members.setdefault(identity, []).append((rank, k))
    out: list[Matched] = []
    for identity, present in members.items():
        if len(present) < 2:
            rank, k = present[0]
            said["communication of groups with one recorded member"] = said.get(
                "communication of groups with one recorded member", 0
            ) + int((comms[rank].key == k).sum())
            continue
        out.append(_match_group(keys[identity], [(r, comms[r], k) for r, k in present]))
    unmatched = sum(m.unmatched for m in out)
    if unmatched:
        said["communications without a partner on the other ranks"] = unmatched
    return [m for m in out if m.start.size], said


def _match_group(key: GroupKey, members: list[tuple[int, CommList, int]]) -> Matched:
    picks = [np.flatnonzero(c.key == k) for _, c, k in members]
    sequenced = all(
        bool((c.seq[p] >= 0).all()) and p.size for (_, c, _), p in zip(members, picks, strict=True)
    )
    if sequenced and all(
        np.unique(c.seq[p]).size == p.size for (_, c, _), p in zip(members, picks, strict=True)
    ):
        common = set(members[0][1].seq[picks[0]].tolist())
        for (_, c, _), p in zip(members, picks, strict=True):
            common &= set(c.seq[p].tolist())
        wanted = np.array(sorted(common), np.int64)
        chosen = []
        for (_, c, _), p in zip(members, picks, strict=True):
            order = p[np.argsort(c.seq[p], kind="stable")]
            chosen.append(order[np.searchsorted(c.seq[order], wanted)])
    else:
        chosen = _by_order(members, picks)
    n = chosen[0].size
    first = members[0][1]
    ops = [first.ops[o] for o in first.op[chosen[0]].tolist()]
    return Matched(
        key,
        [r for r, _, _ in members],
        np.stack([c.start[i] for (_, c, _), i in zip(members, chosen, strict=True)], axis=1).reshape(n, -1),
        np.stack([c.end[i] for (_, c, _), i in zip(members, chosen, strict=True)], axis=1).reshape(n, -1),
        ops,
        np.max([c.size[i] for (_, c, _), i in zip(members, chosen, strict=True)], axis=0),
        sum(p.size - n for p in picks),
    )


def _by_order(members: list[tuple[int, CommList, int]], picks: list[Ints]) -> list[Ints]:
    shortest = int(np.argmin([p.size for p in picks]))
    base_comm, base = members[shortest][1], picks[shortest]
    signature = _signature(base_comm, base)
    agree = np.ones(base.size, bool)
    chosen: list[Ints] = []
    for (_, comm, _), pick in zip(members, picks, strict=True):
        sig = _signature(comm, pick)
        best, best_score = 0, (-1, 0.0)
        for shift in range(pick.size - base.size + 1):
            same = int((sig[shift : shift + base.size] == signature).sum())
            gap = comm.end[pick[shift : shift + base.size]] - base_comm.end[base]
            score = (same, -float(np.ptp(gap)) if gap.size else 0.0)
            if score > best_score:
                best, best_score = shift, score
        agree &= sig[best : best + base.size] == signature
        chosen.append(pick[best : best + base.size])
    return [c[agree] for c in chosen]


def _signature(comm: CommList, pick: Ints) -> np.ndarray[tuple[int], np.dtype[np.object_]]:
    """Operation and size of each; sizes may differ over ranks in all_to_all and send_recv, so they are left out."""
    loose = {"all_to_all", "send_recv", "communication"}
    out = np.empty(pick.size, object)
    for j, i in enumerate(pick.tolist()):
        op = comm.ops[comm.op[i]]
        out[j] = (op, -1 if op in loose else int(comm.size[i]))
    return out


def align_clocks(groups: list[Matched], hosts: dict[int, str]) -> tuple[dict[int, int], int | None]:
    """Offset of each rank's clock (ns, to subtract), from the ends of synchronising collectives.

    All members leave such a collective together, so the ends' differences are the clocks'. A clock belongs
    to a host: ranks of one host share their offset, and with a single host there is none to find. Within a
    group each member's offset from the group's middle is the median over its collectives; over groups the
    offsets are joined by least squares. Offsets that explain less than half of the disagreement are not
    believed. Returns (offsets, median absolute residual after; None with nothing to go by).
    """
    ranks = sorted({r for g in groups for r in g.ranks})
    clock = {r: hosts.get(r) or f"rank {r}" for r in ranks}
    number = {c: i for i, c in enumerate(dict.fromkeys(clock.values()))}
    none = dict.fromkeys(ranks, 0)
    ends: list[tuple[list[int], np.ndarray[tuple[int, int], np.dtype[np.float64]]]] = []
    for g in groups:
        keep = np.array([op in SYNCHRONISING for op in g.op], bool)
        if keep.any():
            away = (g.end[keep] - g.end[keep].min()).astype(float)
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
