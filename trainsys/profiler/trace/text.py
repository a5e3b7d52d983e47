"""The report for a terminal: plain text, at most a screen or two, costliest first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from trainsys.profiler.trace.breakdown import Terms
from trainsys.profiler.trace.kernel_names import short_names
from trainsys.profiler.trace.report import RankReport, Report
from trainsys.rank_lists import first_few, ranks_named
from trainsys.terminal_text import SHOWN, Table, layout, too_small

if TYPE_CHECKING:
    from trainsys.profiler.hang.report import HangReport
    from trainsys.profiler.memory_snapshot.report import MemoryReport
    from trainsys.profiler.trace.across import Across
    from trainsys.profiler.trace.optimeline import TimelineReport

MOST_RANKS = 16
MOST_STEPS = MOST_KERNELS = 12
LONGEST_NAME = 90
"""Characters of a kernel's name, however wide the terminal is."""
_SHAPE = str.maketrans("", "", "[] ")


def ms(ns: float) -> str:
    return f"{ns / 1e6:,.3f}"


def share(part: float, whole: float) -> str:
    return f"{part / whole * 100:.1f}%" if whole else "-"


def render(report: Report, width: int | None = None) -> str:
    """``width`` of the output in columns; None: paragraphs are not broken (see ``terminal_text``)."""
    out = [*health(report)]
    if out:
        out = ["Trace health", *(f"  {line}" for line in out), ""]
    parts: list[str | Table] = [*out]
    if report.verdicts:
        parts.append("What is wrong")
        for i, v in enumerate(report.verdicts, 1):
            parts += [f"  {i}. {v.title}", f"     why: {v.evidence}", f"     try: {v.advice}"]
        parts.append("")
    if report.ranks:
        parts += _ranks(report)
    if report.across is not None and report.across.ranks:
        parts += _across(report.across)
    elif report.across is not None:
        parts += ["Across ranks: nothing is compared, for want of evidence (see Trace health)", ""]
    if report.critical is not None:
        c = report.critical
        parts.append(f"Critical path of rank {report.critical_rank} ({ms(c.span_ns)} ms)")
        parts.append(
            Table(
                ("held by", "ms", "share"),
                [(words(k), ms(v), share(v, c.span_ns)) for k, v in folded(c.by_kind, c.span_ns)],
            )
        )
        parts += [
            f"  if {w.what}: {ms(w.span_ns)} ms, {w.saved_share * 100:.1f}% less"
            for w in c.what_if
            if w.saved_share >= 0.001
        ]
        parts += [f"  if {what}: withheld, {why}" for what, why in c.withheld.items()]
        parts.append("")
    if report.hang is not None:
        parts += _hang(report.hang)
    for m in report.memory:
        parts += _memory(m)
    for line in report.timelines:
        parts += _timeline(line)
    return layout([*parts, *_said(report)], width)


def folded(parts: Mapping[str, float], whole: float) -> list[tuple[str, float]]:
    """Largest first; those that would be 0.0% of ``whole`` are one row, unless it is only one."""
    rows = sorted(parts.items(), key=lambda i: -i[1])
    small = [rows[i][1] for i in too_small([v for _, v in rows], whole)]
    return [*rows[: len(rows) - len(small)], (f"{len(small)} others", sum(small))] if small else rows


def words(name: str) -> str:
    """A name of code as words."""
    return name.replace("_", " ")


def health(report: Report) -> list[str]:
    """What is missing, before anything is said: by finding, with the ranks that have it. A line each."""
    by_text: dict[str, list[str]] = {}
    for r in report.ranks:
        for f in r.health:
            by_text.setdefault(f.text, []).append(report.label(r))
    lines = [
        text if len(report.ranks) == 1 else f"rank {first_few(ranks)}: {text}" for text, ranks in by_text.items()
    ]
    n = len({r.rank for r in report.ranks})
    if report.world > n:
        lines.append(f"{n} of {report.world} ranks were given: nothing is said of the others")
    if report.across is not None:
        lines += [f"not compared: {why}" for why in report.across.withheld[:10]]
    return lines


def _ranks(report: Report) -> list[str | Table]:
    ranks = report.ranks
    first = ranks[0]
    devices = sorted({r.device for r in ranks if r.device})
    out: list[str | Table] = [f"{count_ranks(report)}, {', '.join(devices) or 'no device named'}; times in ms"]
    head = ("rank", "span", "matmul", "other", "exposed comm", "exposed copy", "idle", "idle%", "comm hidden")
    rows = []
    for r in ranks[:MOST_RANKS]:
        if r.breakdown is None:
            rows.append((report.label(r), *["-"] * 8))
            continue
        rows.append((report.label(r), *_terms(r.breakdown.whole)))
    out.append(Table(head, rows))
    if len(ranks) > MOST_RANKS:
        out.append(f"  and {len(ranks) - MOST_RANKS} more (--json has all)")
    if first.breakdown is not None:
        if first.breakdown.steps:
            out.append(f"Steps of rank {first.rank}")
            steps = first.breakdown.steps
            out.append(Table(("step", *head[1:]), [(str(t.step), *_terms(t)) for t in steps[:MOST_STEPS]]))
            if len(steps) > MOST_STEPS:
                out.append(f"  and {len(steps) - MOST_STEPS} more (--json has all)")
        out += _parts("Idle by cause", first, "idle_by_cause")
        out += _parts("Exposed communication by group", first, "by_group")
    if first.mfu is not None:
        out.append(
            f"MFU {first.mfu.value * 100:.2f}% of rank {first.rank}: {first.mfu.flops}; peak {first.mfu.peak}"
        )
    elif first.work.products:
        out.append(
            f"Matmuls: {first.work.products / 1e12:.3f} TFLOP from shapes; no MFU: the device's peak is not known"
        )
    if first.kernels:
        out += [f"Kernels of rank {first.rank}", _kernels(first)]
    if first.products:
        out.append(f"Matmuls of rank {first.rank} by shape")
        rows = [
            (
                p.op.removeprefix("aten::"),
                p.dims.translate(_SHAPE).replace("x", " x "),
                str(p.calls),
                f"{p.rate / 1e12:.1f}",
                share(p.rate, p.reachable) if p.reachable else "-",
                p.bound or "-",
            )
            for p in first.products[:8]
        ]
        out.append(Table(("operator", "shape", "calls", "TFLOP/s", "of reachable", "bound"), rows, (0, 1)))
    return [*out, ""]


def _kernels(rank: RankReport) -> Table:
    """The costliest; what else there is, or is 0.0%, is one row, so that the shares sum to all of it."""
    busy = sum(k.total_ns for k in rank.kernels)
    named = [k for k in rank.kernels[:MOST_KERNELS] if k.total_ns >= SHOWN * busy]
    rest = rank.kernels[len(named) :]
    shown = [
        (short, words(k.kind), f"{k.count:,}", ms(k.total_ns), share(k.total_ns, busy))
        for k, short in zip(named, short_names([k.name for k in named], LONGEST_NAME), strict=True)
    ]
    if rest:
        total = sum(k.total_ns for k in rest)
        name = f"and {len(rest)} more (--json has all)"
        shown.append((name, "", f"{sum(k.count for k in rest):,}", ms(total), share(total, busy)))
    return Table(("kernel", "class", "calls", "ms", "share"), shown)


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


def _parts(title: str, rank: RankReport, part: str) -> list[str | Table]:
    assert rank.breakdown is not None
    parts: dict[str, int] = getattr(rank.breakdown.whole, part)
    if not parts:
        return []
    rows = folded(parts, rank.breakdown.whole.span)
    return [f"{title} (rank {rank.rank}): {first_few((f'{k} {ms(v)}' for k, v in rows), 8)}"]


def _across(a: Across) -> list[str | Table]:
    out: list[str | Table] = [
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
    out.append(Table(("rank", "comm ms", "waiting ms", "arrived last", "made others wait ms", "clock us"), rows))
    if len(a.ranks) > MOST_RANKS:
        out.append(f"  and {len(a.ranks) - MOST_RANKS} more (--json has all)")
    if a.bandwidth:
        links = Table(
            ("collective", "group", "members", "MiB", "calls", "shortest ms", "bus GB/s", "link GB/s"),
            [
                (
                    b.op,
                    b.group,
                    str(b.members),
                    f"{b.size / 2**20:.2f}" if b.size >= 0 else "?",
                    str(b.calls),
                    ms(b.shortest_ns),
                    "?" if b.bus_gb_s is None else f"{b.bus_gb_s:.2f}",
                    "?" if b.link_gb_s is None else f"{b.link_gb_s:.0f}",
                )
                for b in a.bandwidth[:10]
            ],
            (1, 0),
        )
        out.append(links)
    return [*out, ""]


def _hang(h: HangReport) -> list[str | Table]:
    from trainsys.profiler.hang.analyse import explain_mismatch

    out: list[str | Table] = [f"Flight recorder of {len(h.ranks)} ranks: {h.verdict}"]
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


def _memory(m: MemoryReport) -> list[str | Table]:
    def gib(n: int) -> str:
        return f"{n / 2**30:.2f}"

    out: list[str | Table] = [
        f"Memory of device {m.device}: {gib(m.reserved)} GiB reserved, {gib(m.active)} in use, peak {gib(m.peak)}; "
        f"largest free block {m.largest_free_block / 2**20:.0f} MiB, largest request {m.largest_request / 2**20:.0f} MiB"
    ]
    if m.private or m.pending_free:
        out.append(
            f"  of it {gib(m.private)} GiB in private pools (CUDA graphs), "
            f"{gib(m.pending_free)} freed and waiting for a stream"
        )
    out.append("  peak by part: " + ", ".join(f"{k} {gib(v)}" for k, v in m.by_part.items()))
    rows = [(h.where, h.part, str(h.blocks), _each(h.each), gib(h.bytes)) for h in m.holders[:10]]
    out.append(Table(("held at the peak by", "part", "blocks", "MiB each", "GiB"), rows, labels=(), tails=(0,)))
    out += [
        f"  out of memory: {o.request / 2**20:.0f} MiB asked at {o.where}; would have fitted: {o.would_fit}"
        for o in m.out_of_memory[:5]
    ]
    return [*out, ""]


def _timeline(t: TimelineReport) -> list[str | Table]:
    out: list[str | Table] = [
        f"Op timeline of {t.workers} workers, {t.steps} steps: {t.step_time_s * 1e3:,.1f} ms per step, "
        f"{t.slowdown:.2f} times what it would be with every operation ideal"
    ]
    rows = [(kind, f"{s:.3f}") for kind, s in sorted(t.by_kind.items(), key=lambda i: -i[1])]
    return [*out, Table(("kind of operation", "slowdown by it alone"), rows), ""]


def _each(sizes: list[int]) -> str:
    low, high = (f"{s / 2**20:.1f}" for s in (min(sizes), max(sizes)))
    return low if low == high else f"{low} to {high}"


def _said(report: Report) -> list[str | Table]:
    total: dict[str, int] = {}
    for said in (
        [r.said for r in report.ranks]
        + [report.across.said if report.across else {}]
        + ([report.hang.said] if report.hang else [])
    ):
        for what, n in said.items():
            total[what] = total.get(what, 0) + n
    out: list[str | Table] = [f"  {what}: {n:,}" for what, n in sorted(total.items())]
    out += [f"  not read: {u.why}" for u in report.unread[:10]]
    if len(report.unread) > 10:
        out.append(f"  and {len(report.unread) - 10} more files not read (--json has all)")
    return ["Notes", *out] if out else []
