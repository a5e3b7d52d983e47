"""Critical path and what-if: the unchanged replay is the trace, and changes save what they must."""

from __future__ import annotations

import glob

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainsys.profiler.trace.analyse import Options, load
from trainsys.profiler.trace.critical import critical_path
from trainsys.profiler.trace.graph import KIND_NAMES, build
from trainsys.profiler.trace.main import analyse
from trainsys.profiler.trace.replay import Changed, replay
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


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(0, 3), st.integers(0, 400_000), st.integers(0, 99))
def test_unchanged_replay_is_the_trace(tmp_path_factory, steps, layers, fill, data, seed):
    job = Job(ranks=2, steps=steps, layers=layers, fill=fill, data_ns=data, noise=0.2, seed=seed)
    folder = tmp_path_factory.mktemp("job")
    write_job(job, folder)
    loaded = load(folder / "rank00001.json", Options())
    graph = build(loaded.trace, loaded.kinds, loaded.launches)
    assert replay(graph) == graph.end
    shorter = replay(graph, Changed(dict.fromkeys(range(len(KIND_NAMES)), 0.5)))
    assert all(a <= b for a, b in zip(shorter, graph.end, strict=True))


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
