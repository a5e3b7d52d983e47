"""From numbers to findings: what is worth saying, what shows it, what to do about it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainsys.profiler.trace.breakdown import Terms
from trainsys.profiler.trace.kernel_names import short_names
from trainsys.profiler.trace.report import RankReport, Report, Verdict

if TYPE_CHECKING:
    from trainsys.profiler.hang.report import HangReport
    from trainsys.profiler.memory_snapshot.report import OutOfMemory
    from trainsys.profiler.trace.optimeline import TimelineReport

_AXIS_ADVICE = {
    "tp": "keep tensor parallelism inside the fast domain, or lower its degree; overlap it with asynchronous TP",
    "dp": "overlap gradient reduction with backward (larger buckets, prefetch), or raise gradient accumulation",
    "dp_shard": "prefetch the next layer's parameters, keep them after forward, or shard over fewer ranks (HSDP)",
    "dp_replicate": "overlap the replicas' all-reduce with backward, or raise gradient accumulation",
    "pp": "more micro-batches or an interleaved or zero-bubble schedule; even out the stages",
    "cp": "overlap the ring's sends with attention, or use Ulysses inside the node",
    "ep": "keep experts' all-to-all inside the node, overlap dispatch with shared experts, balance the router",
}


def judge(report: Report) -> list[Verdict]:
    """Findings, the costliest first."""
    out: list[Verdict] = []
    if report.hang is not None and (report.hang.roots or report.hang.mismatches or report.hang.cycles):
        out.append(_hang(report.hang))
    timed = [
        r
        for r in report.ranks
        if r.breakdown is not None and r.breakdown.whole.span > 0 and r.trusted("time")
    ]
    if timed:
        out += _time(report, timed)
    out += _across(report, timed)
    out += _memory(report)
    out += [v for t in report.timelines if t.slowdown >= 1.05 for v in timeline_verdicts(t)]
    return sorted(out, key=lambda v: -v.share)


_MISMATCH_ADVICE = {
    "size": "make the ranks' tensors equal before that line: uneven or last batches, unpadded sequences, parameters that "
    "not all ranks have",
    "dtype": "make the ranks' dtypes equal before that line: autocast, mixed precision or a cast differs between them",
    "operation": "have all ranks issue the same collectives in the same order: a branch on rank or data, or an early "
    "exit, is before that line",
}


def _hang(hang: HangReport) -> Verdict:
    if hang.mismatches and "mismatch" in hang.verdict:
        first = hang.mismatches[0]
        evidence = f"what the ranks recorded; {len(hang.waiting)} ranks wait in it"
        advice = _MISMATCH_ADVICE[first.what] + "; TORCH_DISTRIBUTED_DEBUG=DETAIL raises at the call"
        return Verdict("hang", hang.verdict, evidence, advice, 1.0)
    evidence = "; ".join(f"rank {r.rank}: {r.evidence}" for r in hang.roots[:4]) or hang.verdict
    advice = "look at these ranks' logs, host stacks and devices; the others only wait"
    return Verdict("hang", hang.verdict, evidence, advice, 1.0)


def timeline_verdicts(t: TimelineReport) -> list[Verdict]:
    lost = 1 - 1 / t.slowdown
    evidence = f"replayed without it, {t.workers} workers over {t.steps} steps; {t.slowdown:.2f} times the ideal step"
    if t.worst_gives_back >= 0.5:
        who = ", ".join(f"data rank {d} stage {s}" for d, s in t.worst[:4])
        title = f"{who}: {_of_lost(t.worst_gives_back)} is gone without what is slow there"
        advice = "check that worker's clocks, thermals and neighbours; exclude it and compare"
        return [Verdict("straggler", title, evidence, advice, lost * min(1.0, t.worst_gives_back))]
    if t.last_stage_gives_back >= 0.5:
        title = f"{_of_lost(t.last_stage_gives_back)} is the last stage's"
        return [
            Verdict(
                "stage", title, evidence, "give the last stage fewer layers: it also computes the loss", lost
            )
        ]
    kind, by = max(t.by_kind.items(), key=lambda i: i[1])
    title = f"uneven {kind} costs {_pct(1 - 1 / by)} of a step, and no single worker or stage explains it"
    return [
        Verdict(
            "uneven", title, evidence, "balance the work of micro-batches: sequence lengths, packing", lost
        )
    ]


def _mean(ranks: list[RankReport], part: str, key: str | None = None) -> float:
    total = 0.0
    for r in ranks:
        assert r.breakdown is not None
        whole: Terms = r.breakdown.whole
        value = getattr(whole, part) if key is None else getattr(whole, part).get(key, 0)
        total += value / whole.span
    return total / len(ranks)


def _of_lost(share: float) -> str:
    """Beyond all of it: the ideal is a mean over all workers, and the others alone are quicker."""
    return "all of the lost time" if share >= 0.9995 else f"{_pct(share)} of the lost time"


def _pct(share: float) -> str:
    return f"{share * 100:.1f}%"


def _time(report: Report, ranks: list[RankReport]) -> list[Verdict]:
    out = []
    axes = sorted({a for r in ranks if r.breakdown for a in r.breakdown.whole.by_axis})
    for axis in axes:
        share = _mean(ranks, "by_axis", axis)
        if share >= 0.05:
            title = f"{_pct(share)} of the time is exposed communication" + (
                f" on axis {axis}" if axis != "unknown" else ""
            )
            if axis == "pp":
                title = f"{_pct(share)} of the time is pipeline bubble (exposed sends and receives)"
            out.append(
                Verdict(
                    "communication",
                    title,
                    _comm_evidence(report, ranks),
                    _comm_advice(report, axis),
                    share,
                )
            )
    causes = {
        "host": (
            "the device waits for the host to launch work",
            "CUDA graphs or torch.compile, larger micro-batches, fewer small kernels",
            0.10,
        ),
        "data": (
            "the device waits for the data loader",
            "more loader workers, prefetch, pinned memory",
            0.02,
        ),
        "sync": (
            "the device drains at synchronising calls",
            "no .item(), print or blocking copy inside the step; log asynchronously",
            0.02,
        ),
        "launch": (
            "the device waits on launch latency with an empty queue",
            "CUDA graphs; the host is only just ahead of the device",
            0.05,
        ),
    }
    for cause, (what, advice, floor) in causes.items() if all(r.trusted("idle") for r in ranks) else ():
        share = _mean(ranks, "idle_by_cause", cause)
        if share >= floor:
            n = sum(r.launch.short_count for r in ranks)
            evidence = f"idle {_pct(_mean(ranks, 'idle'))} in all; {n} kernels shorter than 10 us"
            out.append(Verdict("idle", f"{_pct(share)} of the time {what}", evidence, advice, share))
    share, products = _mean(ranks, "other_compute"), _mean(ranks, "matmul")
    if share >= 0.15 and share > products:
        top = [k for k in ranks[0].kernels if k.kind == "other_compute"][:2]
        names = short_names([k.name for k in top], 60)
        evidence = "; ".join(f"{k.count} x {n}: {k.total_ns / 1e6:.2f} ms" for k, n in zip(top, names, strict=True))
        out.append(
            Verdict(
                "fusion",
                f"{_pct(share)} of the time is compute other than matmuls, which take {_pct(products)}",
                evidence,
                "torch.compile or fused kernels for norms, activations, rotary embedding and casts",
                share,
            )
        )
    share = _mean(ranks, "recompute")
    if share >= 0.02:
        out.append(
            Verdict(
                "recompute",
                f"{_pct(share)} of the time recomputes activations",
                "kernels launched inside recompute_fn",
                "selective recompute, or less of it where memory is free",
                share,
            )
        )
    share = _mean(ranks, "memcpy_exposed")
    if share >= 0.02:
        out.append(
            Verdict(
                "memcpy",
                f"{_pct(share)} of the time is exposed copies",
                "copies that no kernel overlaps",
                "fuse or avoid device copies; pin host memory and copy on a side stream",
                share,
            )
        )
    return out


def _comm_evidence(report: Report, ranks: list[RankReport]) -> str:
    parts = []
    hidden = [
        r.breakdown.whole.overlap for r in ranks if r.breakdown and r.breakdown.whole.overlap is not None
    ]
    if hidden:
        parts.append(f"{_pct(sum(hidden) / len(hidden))} of communication is hidden behind compute")
    if (waiting := _waiting(report)) is not None:
        parts.append(f"{_pct(waiting)} of matched communication is waiting for other ranks")
    return "; ".join(parts)


def _waiting(report: Report) -> float | None:
    """Share of matched communication in which other ranks had not arrived; None: nothing is matched."""
    ranks = [] if report.across is None else report.across.ranks
    total = sum(r.comm_ns for r in ranks)
    return sum(r.wait_ns for r in ranks) / total if total else None


def _comm_advice(report: Report, axis: str) -> str:
    if axis != "pp" and (_waiting(report) or 0.0) > 0.5:
        return (
            "even out when ranks arrive: most of it is waiting, which neither overlap nor a faster link shortens "
            "(stragglers, uneven batches, launch gaps and garbage collection of single ranks)"
        )
    return _AXIS_ADVICE.get(axis, "overlap it with compute, or communicate less often")


def _across(report: Report, timed: list[RankReport]) -> list[Verdict]:
    across = report.across
    if across is None or not across.ranks:
        return []
    out = []
    span = max((r.breakdown.whole.span for r in timed if r.breakdown), default=0)
    named = set()
    for s in across.stragglers:
        named.add(s.rank)
        out.append(
            Verdict(
                "straggler",
                f"rank {s.rank} is {s.slowdown * 100:.0f}% slower than its peers between collectives",
                f"group {s.group}; z = {s.z:.1f}; slow in {s.share * 100:.0f}% of the stretches; every rank "
                f"loses {s.cost_s * 1e3:.2f} ms to it",
                "check that rank's clocks, thermals, ECC and neighbours on the host; exclude it and compare",
                min(1.0, s.slowdown / (1 + s.slowdown)),
            )
        )
    total = sum(r.caused_ns for r in across.ranks)
    peers = len(across.ranks) - 1
    late = [
        r
        for r in across.ranks
        if r.rank not in named
        and r.caused_ns > max(0.5 * total, 0.02 * span * peers)
        and 2 * r.last > r.collectives
    ]
    among = f" of the {peers + 1} recorded ranks" if report.world > peers + 1 else ""
    return out + [
        Verdict(
            "late",
            f"rank {r.rank} arrives last{among} in {r.last} of {r.collectives} matched collectives",
            f"the others waited {r.caused_ns / 1e6:.2f} ms for it, summed; it waited {r.wait_ns / 1e6:.2f} ms",
            "its work before those collectives is the one to shorten: compare its step with a peer's",
            min(1.0, r.caused_ns / max(1, peers) / span) if span else 0.0,
        )
        for r in late
    ]


def _memory(report: Report) -> list[Verdict]:
    out: list[Verdict] = []
    for m in report.memory:
        out += [_refused(m.device, o) for o in m.out_of_memory if o.would_fit or _fits_with_all(o)]
        out += [
            Verdict(
                "memory",
                f"device {m.device}: {leak.where} keeps allocating and nothing frees it: "
                f"{leak.bytes / 2**20:.0f} MiB so far",
                f"{leak.blocks} blocks still in use, allocated throughout the history",
                "a list of losses or outputs, or a graph kept alive: detach() or .item() what is kept, or drop it",
                0.4,
            )
            for leak in m.leaks
        ]
        if m.reserved and m.pending_free / m.reserved > 0.05:
            out.append(
                Verdict(
                    "memory",
                    f"device {m.device}: {m.pending_free / 2**30:.2f} GiB are freed and not usable yet",
                    "their blocks wait for work of another stream (record_stream)",
                    "synchronise that stream before the peak, or avoid record_stream (TORCH_NCCL_AVOID_RECORD_STREAMS=1)",
                    0.05,
                )
            )
        if m.reserved and m.inactive / m.reserved > 0.2:
            out.append(
                Verdict(
                    "memory",
                    f"device {m.device}: {m.inactive / 2**30:.1f} of {m.reserved / 2**30:.1f} GiB reserved are unused",
                    f"largest free block {m.largest_free_block / 2**20:.0f} MiB; peak in use {m.peak / 2**30:.1f} GiB",
                    "normal after a step's peak; if allocations fail, expandable_segments:True",
                    0.01,
                )
            )
    return out


def _fits_with_all(o: OutOfMemory) -> bool:
    return o.request <= o.total_free + o.elsewhere_free + o.device_free


def _refused(device: int, o: OutOfMemory) -> Verdict:
    evidence = (
        f"free in the allocator {o.total_free / 2**20:.0f} MiB (largest block {o.largest_free_block / 2**20:.0f}), "
        f"on the device {o.device_free / 2**20:.0f} MiB"
    )
    if o.elsewhere_free:
        evidence += f"; {o.elsewhere_free / 2**20:.0f} MiB more are free in private pools or of other streams"
    if not o.would_fit:
        how = "that free memory of other pools would have held"
        advice = "let CUDA graphs share one pool (graph_pool_handle), capture fewer shapes, or free them first"
    elif o.expandable:
        how = "that would have fitted"
        advice = "segments are expandable already: allocate fewer different sizes, or torch.cuda.empty_cache() before it"
    else:
        how, advice = "that would have fitted", "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True"
    return Verdict(
        "memory",
        f"device {device}: a request of {o.request / 2**20:.0f} MiB failed {how}",
        evidence,
        advice,
        0.5,
    )
