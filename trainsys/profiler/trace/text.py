"""The report for a terminal: plain text, at most a screen or two, costliest first."""

from __future__ import annotations

from collections.abc import Sequence

from trainsys.profiler.hang.analyse import explain_mismatch
from trainsys.profiler.hang.report import HangReport
from trainsys.profiler.memory_snapshot.report import MemoryReport
from trainsys.profiler.trace.across import Across
from trainsys.profiler.trace.breakdown import Terms
from trainsys.profiler.trace.optimeline import TimelineReport
from trainsys.profiler.trace.report import RankReport, Report
from trainsys.rank_lists import first_few, ranks_named

MOST_RANKS = 16


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns aligned, the first to the left, the others to the right."""
    widths = [max(len(r[i]) for r in [head, *rows]) for i in range(len(head))]

    def line(row: Sequence[str]) -> str:
        cells = [
            c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ]
        return "  " + "  ".join(cells).rstrip()

    return [line(head), *map(line, rows)]


def ms(ns: float) -> str:
    return f"{ns / 1e6:,.3f}"


def share(part: float, whole: float) -> str:
    return f"{part / whole * 100:.1f}%" if whole else "-"


def render(report: Report) -> str:
    out = _health(report)
    if report.verdicts:
        out.append("What is wrong")
        for i, v in enumerate(report.verdicts, 1):
            out += [f"  {i}. {v.title}", f"     why: {v.evidence}", f"     try: {v.advice}"]
        out.append("")
    if report.ranks:
        out += _ranks(report)
    if report.across is not None and report.across.ranks:
        out += _across(report.across)
    elif report.across is not None:
        out += ["Across ranks: nothing is compared, for want of evidence (see Trace health)", ""]
    if report.critical is not None:
        c = report.critical
        out.append(f"Critical path of rank {report.critical_rank} ({ms(c.span_ns)} ms)")
        out += table(
            ("held by", "ms", "share"),
            [(k, ms(v), share(v, c.span_ns)) for k, v in sorted(c.by_kind.items(), key=lambda i: -i[1])],
        )
        out += [
            f"  if {w.what}: {ms(w.span_ns)} ms, {w.saved_share * 100:.1f}% less"
            for w in c.what_if
            if w.saved_share >= 0.001
        ]
        out += [f"  if {what}: withheld, {why}" for what, why in c.withheld.items()]
        out.append("")
    if report.hang is not None:
        out += _hang(report.hang)
    for m in report.memory:
        out += _memory(m)
    for line in report.timelines:
        out += _timeline(line)
    out += _said(report)
    return "\n".join(out).rstrip() + "\n"


def _health(report: Report) -> list[str]:
    """What is missing, before anything is said: by finding, with the ranks that have it."""
    by_text: dict[str, list[str]] = {}
    for r in report.ranks:
        for f in r.health:
            by_text.setdefault(f.text, []).append(report.label(r))
    lines = [
        text
        if len(report.ranks) == 1
        else f"rank {first_few(ranks)}: {text}"
        for text, ranks in by_text.items()
    ]
    n = len({r.rank for r in report.ranks})
    if report.world > n:
        lines.append(f"{n} of {report.world} ranks were given: nothing is said of the others")
    if report.across is not None:
        lines += [f"not compared: {why}" for why in report.across.withheld[:10]]
    return ["Trace health", *(f"  {line}" for line in lines), ""] if lines else []


def _ranks(report: Report) -> list[str]:
    ranks = report.ranks
    first = ranks[0]
    devices = sorted({r.device for r in ranks if r.device})
    out = [f"{count_ranks(report)}, {', '.join(devices) or 'no device named'}; times in ms"]
    head = ("rank", "span", "matmul", "other", "exposed comm", "exposed copy", "idle", "idle%", "comm hidden")
    rows = []
    for r in ranks[:MOST_RANKS]:
        if r.breakdown is None:
            rows.append((report.label(r), *["-"] * 8))
            continue
        rows.append((report.label(r), *_terms(r.breakdown.whole)))
    out += table(head, rows)
    if len(ranks) > MOST_RANKS:
        out.append(f"  and {len(ranks) - MOST_RANKS} more (--json has all)")
    if first.breakdown is not None:
        if first.breakdown.steps:
            out.append(f"Steps of rank {first.rank}")
            out += table(("step", *head[1:]), [(str(t.step), *_terms(t)) for t in first.breakdown.steps[:12]])
        out += _parts("Idle by cause", first, "idle_by_cause") + _parts(
            "Exposed communication by group", first, "by_group"
        )
    if first.mfu is not None:
        out.append(
            f"MFU {first.mfu.value * 100:.2f}% of rank {first.rank}: {first.mfu.flops}; peak {first.mfu.peak}"
        )
    elif first.work.products:
        out.append(
            f"Matrix products: {first.work.products / 1e12:.3f} TFLOP from shapes; no MFU: the device's peak is not known"
        )
    if first.kernels:
        out.append(f"Kernels of rank {first.rank}")
        busy = sum(k.total_ns for k in first.kernels)
        out += table(
            ("kernel", "class", "calls", "ms", "share"),
            [
                (k.name[:60], k.kind, str(k.count), ms(k.total_ns), share(k.total_ns, busy))
                for k in first.kernels[:12]
            ],
        )
    if first.products:
        out.append(f"Matrix products of rank {first.rank} by shape")
        out += table(
            ("operator", "shape", "calls", "TFLOP/s", "of reachable", "bound"),
            [
                (
                    p.op,
                    p.dims[:50],
                    str(p.calls),
                    f"{p.rate / 1e12:.1f}",
                    share(p.rate, p.reachable) if p.reachable else "-",
                    p.bound or "-",
                )
                for p in first.products[:8]
            ],
        )
    return [*out, ""]


def count_ranks(report: Report) -> str:
    """``2 of 128 ranks, 3 captures``: what was given, of what there is."""
    n = len({r.rank for r in report.ranks})
    windows = len({r.window for r in report.ranks})
    out = f"{n} of {report.world} ranks" if report.world > n else f"{n} rank{'s' * (n > 1)}"
    return out + (f", {windows} captures" if windows > 1 else "")


def _terms(t: Terms) -> tuple[str, ...]:
    hidden = "-" if t.overlap is None else f"{t.overlap * 100:.1f}%"
    return (
        ms(t.span),
        ms(t.matmul),
        ms(t.other_compute),
        ms(t.comm_exposed),
        ms(t.memcpy_exposed),
        ms(t.idle),
        share(t.idle, t.span),
        hidden,
    )


def _parts(title: str, rank: RankReport, part: str) -> list[str]:
    assert rank.breakdown is not None
    parts: dict[str, int] = getattr(rank.breakdown.whole, part)
    if not parts:
        return []
    text = ", ".join(f"{k} {ms(v)}" for k, v in sorted(parts.items(), key=lambda i: -i[1])[:8])
    return [f"{title} (rank {rank.rank}): {text}"]


def _across(a: Across) -> list[str]:
    out = [
        f"Across ranks: {a.matched} collectives matched; ends agree within {a.end_spread_ns / 1e3:,.1f} us"
    ]
    rows = [
        (
            str(r.rank),
            ms(r.comm_ns),
            ms(r.wait_ns),
            f"{r.last} of {r.collectives}",
            ms(r.caused_ns),
            f"{r.clock_offset_ns / 1e3:,.1f}",
        )
        for r in a.ranks[:MOST_RANKS]
    ]
    out += table(("rank", "comm ms", "waiting ms", "arrived last", "made others wait ms", "clock us"), rows)
    if a.bandwidth:
        out += table(
            ("collective", "group", "members", "MiB", "calls", "shortest ms", "bus GB/s", "link GB/s"),
            [
                (
                    b.op,
                    b.group[:30],
                    str(b.members),
                    f"{b.size / 2**20:.2f}" if b.size >= 0 else "?",
                    str(b.calls),
                    ms(b.shortest_ns),
                    "?" if b.bus_gb_s is None else f"{b.bus_gb_s:.2f}",
                    "?" if b.link_gb_s is None else f"{b.link_gb_s:.0f}",
                )
                for b in a.bandwidth[:10]
            ],
        )
    return [*out, ""]


def _hang(h: HangReport) -> list[str]:
    out = [f"Flight recorder of {len(h.ranks)} ranks: {h.verdict}"]
    out += [
        f"  rank {r.rank} ({r.kind}): {r.evidence}" + (f"; at {r.where}" if r.where else "") for r in h.roots
    ]
    out += [
        f"  rank {w.rank} waits in {w.operation}"
        + (f" for {ranks_named(w.on)}" if w.on else "")
        for w in h.waiting[:8]
    ]
    if len(h.waiting) > 8:
        out.append(f"  and {len(h.waiting) - 8} more wait")
    out += [
        f"  collective #{m.sequence} of group {m.group}, {m.what} mismatch: {explain_mismatch(m)}"
        for m in h.mismatches[1:5]
    ]
    if h.missing:
        out.append(f"  no dump from ranks {h.missing}")
    return [*out, ""]


def _memory(m: MemoryReport) -> list[str]:
    def gib(n: int) -> str:
        return f"{n / 2**30:.2f}"

    out = [
        f"Memory of device {m.device}: {gib(m.reserved)} GiB reserved, {gib(m.active)} in use, peak {gib(m.peak)}; "
        f"largest free block {m.largest_free_block / 2**20:.0f} MiB, largest request {m.largest_request / 2**20:.0f} MiB"
    ]
    if m.private or m.pending_free:
        out.append(
            f"  of it {gib(m.private)} GiB in private pools (CUDA graphs), "
            f"{gib(m.pending_free)} freed and waiting for a stream"
        )
    out.append("  peak by part: " + ", ".join(f"{k} {gib(v)}" for k, v in m.by_part.items()))
    out += table(
        ("held at the peak by", "part", "blocks", "MiB each", "GiB"),
        [(h.where[:70], h.part, str(h.blocks), _each(h.each), gib(h.bytes)) for h in m.holders[:10]],
    )
    out += [
        f"  out of memory: {o.request / 2**20:.0f} MiB asked at {o.where}; would have fitted: {o.would_fit}"
        for o in m.out_of_memory[:5]
    ]
    return [*out, ""]


def _timeline(t: TimelineReport) -> list[str]:
    out = [
        f"Op timeline of {t.workers} workers, {t.steps} steps: {t.step_time_s * 1e3:,.1f} ms per step, "
        f"{t.slowdown:.2f} times what it would be with every operation ideal"
    ]
    rows = [(kind, f"{s:.3f}") for kind, s in sorted(t.by_kind.items(), key=lambda i: -i[1])]
    return [*out, *table(("kind of operation", "slowdown by it alone"), rows), ""]


def _each(sizes: list[int]) -> str:
    low, high = (f"{s / 2**20:.1f}" for s in (min(sizes), max(sizes)))
    return low if low == high else f"{low} to {high}"


def _said(report: Report) -> list[str]:
    total: dict[str, int] = {}
    for said in (
        [r.said for r in report.ranks]
        + [report.across.said if report.across else {}]
        + ([report.hang.said] if report.hang else [])
    ):
        for what, n in said.items():
            total[what] = total.get(what, 0) + n
    out = [f"  {what}: {n}" for what, n in sorted(total.items())]
    out += [f"  not read: {u.why}" for u in report.unread[:10]]
    return ["Notes", *out] if out else []
