"""A schedule as a picture: text for a terminal, SVG for a page."""

from __future__ import annotations

from html import escape

from trainsys.schedules.simulate import Span, Timeline

# One colour an operation, the second and later stages of a rank darker; readable by colour-blind people too.
_FILL = {"F": "#9ecae1", "B": "#fdae6b", "I": "#fdd0a2", "W": "#a1d99b"}
_DARK = {"F": "#4292c6", "B": "#f16913", "I": "#fd8d3c", "W": "#41ab5d"}


def title(timeline: Timeline) -> str:
    """One line: what it is, how long, how much of it is waiting, how much is held."""
    s = timeline.schedule
    return (
        f"{s.name}: {s.ranks} ranks × {s.stages // s.ranks} stages, {s.micros} micro-batches, "
        f"step {timeline.step_time:g}, bubble {timeline.bubble:.1%}, "
        f"micro-batches in flight by rank {', '.join(map(str, timeline.in_flight_rank))}"
    )


def text(timeline: Timeline, width: int = 120) -> str:
    """One row a rank; an action is its letter (lower case on a rank's second, third… stage) and micro-batch,
    as wide as it is long; a dot is a wait. ``width``: columns at most, unless an action would get none."""
    shortest = min(s.end - s.start for spans in timeline.ranks for s in spans if s.end > s.start)
    digits = len(str(timeline.schedule.micros - 1)) + 1
    room = width - len(f"rank {timeline.schedule.ranks - 1}  ")
    # Columns a unit of time: the shortest action shows its letter at least, and its number if it fits.
    scale = min(digits / shortest, max(room / timeline.step_time, 1.0 / shortest))
    rows = [title(timeline)]
    for rank, spans in enumerate(timeline.ranks):
        row = ["·"] * round(timeline.step_time * scale)
        for span in spans:
            start, end = round(span.start * scale), round(span.end * scale)
            label = _label(timeline, rank, span)
            row[start:end] = list((label if len(label) <= end - start else label[:1]).ljust(end - start))[
                : end - start
            ]
        rows.append(f"rank {rank:<{len(str(timeline.schedule.ranks - 1))}}  {''.join(row)}")
    return "\n".join(rows)


def _label(timeline: Timeline, rank: int, span: Span) -> str:
    op, stage, micro = span.action
    first = stage == timeline.schedule.stages_of(rank)[0]
    return f"{op if first else op.lower()}{micro}"


def svg(timeline: Timeline, width: int = 1200, row: int = 24) -> str:
    """A self-contained ``<svg>`` element, ``width`` units wide, each rank ``row`` high."""
    left, top = 56, 28
    scale = (width - left) / timeline.step_time
    height = top + row * timeline.schedule.ranks + 4
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        f'font-size="11" role="img"><text x="4" y="17" font-size="13">{escape(title(timeline))}</text>'
    ]
    for rank, spans in enumerate(timeline.ranks):
        y = top + rank * row
        parts.append(f'<text x="4" y="{y + row * 0.68:.1f}">rank {rank}</text>')
        parts.append(
            f'<rect x="{left}" y="{y + 1}" width="{width - left}" height="{row - 2}" fill="#f0f0f0"/>'
        )
        for span in spans:
            op, stage, micro = span.action
            first = stage == timeline.schedule.stages_of(rank)[0]
            x, wide = left + span.start * scale, (span.end - span.start) * scale
            parts.append(
                f'<rect x="{x:.2f}" y="{y + 1}" width="{wide:.2f}" height="{row - 2}" '
                f'fill="{(_FILL if first else _DARK)[op]}" stroke="white" stroke-width="0.5">'
                f"<title>{escape(f'{op} stage {stage}, micro-batch {micro}: {span.start:g} to {span.end:g}')}"
                "</title></rect>"
            )
            if wide >= 14:
                parts.append(
                    f'<text x="{x + wide / 2:.2f}" y="{y + row * 0.68:.1f}" text-anchor="middle">{micro}</text>'
                )
    return "".join([*parts, "</svg>"])
