"""What was said while a run trained is on record, and is confirmed or withdrawn at its end."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
from rich.console import Console

from trainsys.layout import Layout
from trainsys.profiler.explain import explain
from trainsys.profiler.live import LiveWatch
from trainsys.profiler.said_live import finding_of, said_live
from trainsys.profiler.terminal import print_explanation
from trainsys.profiler.verdict import Verdict
from trainsys.telemetry.events import Finding, Message, RunEnd, RunStart, Step
from trainsys.telemetry.reader import event_file, read_events
from trainsys.telemetry.vectors import to_vector
from trainsys.telemetry.writer import EventWriter

STEPS = 160


def verdict(**fields: object) -> Verdict:
    found = Verdict("rank", "rank 1 computes slowly", "z = 9", "look", 0.010, 0.1, (1,), "compute", 40, None, "device")
    return replace(found, **fields)  # type: ignore[arg-type]


def test_a_finding_says_who_where_why_and_when() -> None:
    found = finding_of(verdict(), 55, ["a", "b"])
    assert (found.step, found.ranks, found.hosts, found.cause, found.news) == (55, [1], ["b"], "device", "new")
    assert (found.since, found.until, found.cost_s) == (40, None, 0.010)
    assert finding_of(verdict(ranks=(1, 7)), 55, []).hosts == []


def test_news_of_one_finding_is_one_line_and_a_relapse_is_another() -> None:
    news = [
        (55, verdict()),
        (70, verdict(cost_s=0.030, news="worse")),
        (90, verdict(until=85, news="over")),
        (150, verdict(since=140)),
    ]
    said = said_live([finding_of(v, step, []) for step, v in news], [verdict(since=42, until=85)])
    assert [(s.at_step, s.since, s.until, s.cost_s, s.confirmed) for s in said] == [
        (55, 40, 85, 0.010, True),
        (150, 140, None, 0.010, False),
    ]
    assert str(said[0]).endswith("(10.0 ms per step, since step 40 to 85); the whole record shows it too")
    assert "withdrawn" in str(said[1])


def test_it_is_confirmed_by_the_same_ranks_or_their_node_only() -> None:
    said = [finding_of(verdict(), 55, [])]
    assert said_live(said, [verdict(kind="node", ranks=(0, 1))])[0].confirmed
    assert not said_live(said, [verdict(ranks=(0,))])[0].confirmed
    for kind in ("link", "sequence", "stage", "gc"):  # which are something else
        assert not said_live(said, [verdict(kind=kind, ranks=(0, 1))])[0].confirmed
    assert not said_live(said, [])[0].confirmed
    assert not said_live([finding_of(verdict(kind="run", ranks=()), 55, [])], [verdict()])[0].confirmed


def test_explain_shows_what_was_said_of_a_rank_that_is_slow_and_withdraws_what_was_not_so(tmp_path: Path) -> None:
    """Rank 1 of 4 is slow from step 60 on; the watch looks as it does live, and also said something of rank 3."""
    rng = np.random.default_rng(0)
    work = 0.05 * np.exp(0.01 * rng.normal(size=(STEPS, 4)))
    work[60:, 1] *= 1.4
    layout = Layout(dp_shard=4)
    found: list[Finding] = [finding_of(verdict(ranks=(3,), title="rank 3 computes slowly", since=20), 30, [])]
    watch = LiveWatch(layout, None, lambda v: found.append(finding_of(v, watch.last_step, [])), lambda *_: None)
    steps = [
        [
            Step(step=t, start_s=float(t), step_time_s=float(row.max()) + 0.001,
                 phases={"forward": 0.4 * w, "backward": 0.6 * w, "comm/fsdp": float(row.max()) - w + 0.001})
            for w in row.tolist()
        ]
        for t, row in enumerate(work)
    ]  # fmt: skip
    for row in steps:
        watch.take(np.array([to_vector(s) for s in row]), None)
    watch.close()
    assert [f.ranks for f in found if f.news == "new"] == [[3], [1]]
    for rank in range(4):
        writer = EventWriter(event_file(tmp_path, rank))
        writer.put(RunStart(run_id="r", rank=rank, world=4, t0_wall=0.0, t0_mono=0.0, layout={"dp_shard": 4}))
        for row in steps:
            writer.put(row[rank])
        for event in found if rank == 0 else ():
            writer.put(event)
        writer.put(RunEnd(status="done", time_s=float(STEPS), step=STEPS - 1))
        writer.close()
    assert [e for e in read_events(event_file(tmp_path, 0))[0] if isinstance(e, Finding | Message)] == found
    explanation = explain(tmp_path)
    assert [(s.title.partition(":")[0], s.confirmed) for s in explanation.said_live] == [
        ("rank 3 computes slowly", False),
        ("rank 1 computes slowly", True),
    ]
    console = Console(file=io.StringIO(), width=100)
    print_explanation(explanation, console)
    shown = " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]
    assert "step 30, while it trained: rank 3 computes slowly" in shown
    assert "withdrawn: the whole record does not show it" in shown
