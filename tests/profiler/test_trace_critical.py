"""Critical path and what-if: the unchanged replay is the trace, and changes save what they must."""

from __future__ import annotations

import glob

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.whatif.machine import run as play
from support.whatif.programs import SCENARIOS, program
from support.whatif.recording import write
from trainsys.profiler.trace import analyse as analyse_module
from trainsys.profiler.trace.analyse import Options, load
from trainsys.profiler.trace.critical import critical_path
from trainsys.profiler.trace.graph import HOST, KIND_NAMES, build
from trainsys.profiler.trace.main import analyse
from trainsys.profiler.trace.replay import Changed, Replay
from trainsys.profiler.trace.synthetic import Job, write_job


def test_synthetic_what_ifs_save_exactly_what_was_simulated(slow_job):
    job, timeline, folder = slow_job
    report = analyse([folder])
    c = report.critical
    assert report.critical_rank == 2
    assert c.faithful
    assert sum(c.by_kind.values()) == c.span_ns == timeline.terms(2)["span"]
    saved = {w.what: w.saved_ns for w in c.what_if}
    assert saved["communication took no time"] == timeline.terms(2)["comm_exposed"]
    assert saved["the data loader never made anyone wait"] == job.data_ns * (job.steps - 1)
    assert "no waiting for other ranks in collectives" not in saved


def test_a_fast_rank_would_gain_by_not_waiting(tmp_path):
    job = Job(ranks=2, steps=4, slow={1: 1.5})
    timeline = write_job(job, tmp_path)
    loaded = load(tmp_path / "rank00000.json", Options())
    waits = loaded.kinds * 0
    comm = loaded.kinds == 2
    waits[comm] = timeline.waits([0, 1])[:, 0]
    c = critical_path(loaded.trace, loaded.kinds, loaded.launches, waits)
    saved = {w.what: w.saved_ns for w in c.what_if}
    assert saved["no waiting for other ranks in collectives"] == timeline.waits([0, 1])[:, 0].sum()


def node_by_node(g, changed):
    """The definition of a replay, one node after the other: ends."""
    causes, blocked = ([[] for _ in g.start] for _ in range(2))
    for edges, by_node in ((g.causes, causes), (g.blocked, blocked)):
        for node, cause, lag in zip(*(c.tolist() for c in (edges.node, edges.cause, edges.lag)), strict=True):
            by_node[node].append((cause, lag))
    host = changed.factor.get(HOST, 1.0)
    columns = ("program", "before", "gap", "rest", "data", "held_by", "back", "sure", "fetch", "since", "launch")
    columns += ("launch_lag", "kind", "length")
    rows = zip(*(getattr(g, c).tolist() for c in columns), strict=True)
    start, end = [], []
    for i, row in enumerate(rows):
        program, before, gap, rest, data, held, back, sure, fetch, since, launch, launch_lag, kind, length = (
            row
        )
        if kind < HOST:
            ready = [end[c] + lag for c, lag in causes[i]]
            ready += [start[launch] + launch_lag] if launch >= 0 else []
            begin = max(ready, default=g.start[i])
            length = length if changed.shorter is None else max(0, length - changed.shorter[i])
            length = round(int(length) * changed.factor.get(kind, 1.0))
        else:
            length = round(length * host)
            begin = g.start[i]
            if program >= 0:
                begin = end[program] + round(before * host)
                if held >= 0 and (sure or not changed.trust):
                    begin = max(begin, end[held] + back) if changed.waits else begin
                else:
                    begin += round(gap * host)
                begin += round((rest - data) * host) if rest > data else rest - data
                if changed.loader:
                    begin = begin + data if fetch < 0 else max(begin, end[fetch] + since)
        start.append(begin)
        end.append(max([begin + length, *(end[c] + lag for c, lag in blocked[i] if changed.waits)]))
    return [int(e) for e in end]


def changes(graph, seed=0):
    rng = np.random.default_rng(seed)
    yield Changed()
    yield Changed(shorter=rng.integers(0, 50_000, graph.start.size))
    for loader, waits, trust in ((False, True, True), (True, False, True), (True, True, False)):
        factor = dict(enumerate(rng.uniform(0, 2, len(KIND_NAMES)).tolist()))
        yield Changed(factor, None, loader, waits, trust)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(0, 3), st.integers(0, 400_000), st.integers(0, 99))
def test_unchanged_replay_is_the_trace(tmp_path_factory, steps, layers, fill, data, seed):
    job = Job(ranks=2, steps=steps, layers=layers, fill=fill, data_ns=data, noise=0.2, seed=seed)
    folder = tmp_path_factory.mktemp("job")
    write_job(job, folder)
    loaded = load(folder / "rank00001.json", Options())
    graph = build(loaded.trace, loaded.kinds, loaded.launches)
    again = Replay(graph)
    assert again.ends().tolist() == graph.end.tolist()
    shorter = again.ends(Changed(dict.fromkeys(range(len(KIND_NAMES)), 0.5)))
    assert (shorter <= graph.end).all()
    for changed in changes(graph, seed):
        assert again.ends(changed).tolist() == node_by_node(graph, changed)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_replay_in_runs_is_the_replay_node_by_node(tmp_path, scenario):
    """Programs with threads, calls and gaps that wait, lost launches and late batches."""
    write(play(program(scenario, 3)), tmp_path / "rank0.json", lost=0.02, operators=False, seed=3)
    loaded = load(tmp_path / "rank0.json", Options())
    graph = build(loaded.trace, loaded.kinds, loaded.launches)
    assert graph.blocked.node.size or (graph.held_by >= 0).any() or (graph.fetch >= 0).any()
    again = Replay(graph)
    for changed in changes(graph):
        assert again.ends(changed).tolist() == node_by_node(graph, changed)


def test_a_file_that_is_alone_is_read_once(tmp_path, monkeypatch):
    write_job(Job(ranks=2, steps=2), tmp_path)
    read = []
    plain = analyse_module.read_trace
    monkeypatch.setattr(analyse_module, "read_trace", lambda *a, **k: read.append(a) or plain(*a, **k))
    alone = analyse([tmp_path / "rank00001.json"])
    assert len(read) == 1
    loaded = load(tmp_path / "rank00001.json", Options())
    assert alone.critical == critical_path(loaded.trace, loaded.kinds, loaded.launches)


@pytest.mark.parametrize(
    "pattern",
    ["hta/nccl_parser_config/*", "tracelens/*", "dlrm8_v100_8ranks/worker0*", "kineto_dataloader/383*"],
)
def test_recorded_traces_replay_faithfully(shared, pattern):
    for path in glob.glob(str(shared / pattern)):
        loaded = load(path, Options())
        c = critical_path(loaded.trace, loaded.kinds, loaded.launches)
        assert c.faithful
        assert sum(c.by_kind.values()) == c.span_ns
        if "383" in pattern:
            saved = {w.what: w.saved_share for w in c.what_if}
            assert saved["the data loader never made anyone wait"] > 0.15
