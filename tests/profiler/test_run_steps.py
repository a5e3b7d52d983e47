"""A run read a window at a time is the run read at once, of whichever version its files are, in bounded memory."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from shutil import copytree

import numpy as np
import pytest

from support.made_run import Run, as_lines, copies
from trainsys.layout import Layout
from trainsys.profiler.blame import find_blame
from trainsys.profiler.explain import explain, to_json
from trainsys.profiler.flops_split import split_flops
from trainsys.profiler.memory import MemoryUse, memory_report
from trainsys.profiler.run_steps import load_steps, read_run
from trainsys.profiler.waits import late_excess
from trainsys.profiler.waterfall import waterfall
from trainsys.telemetry.reader import event_file
from trainsys.telemetry.tail import path_of


def killed(run: Run, folder: Path, rank: int, steps: range, attempt: int = 0) -> None:
    """Records without an end: the last block stays in the tail."""
    recording = run.record(folder, rank, steps, attempt)
    for _ in steps:
        next(recording)
    recorder = recording.gi_frame.f_locals["rec"]  # type: ignore[attr-defined]
    recorder._writer.flush()
    recorder._writer._stop.set()
    recording.close()


@pytest.fixture(scope="module", params=["device", "rolled back, killed"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "run"
    if request.param == "device":
        run = Run(Layout(dp_shard=2, tp=2), packed=True, device=True, slow=2)
        for rank in range(4):
            for _ in run.record(folder, rank, range(620)):
                pass
    else:
        run = Run(Layout(pp=2, dp_shard=2), slow=3)
        for rank in range(4):
            for _ in run.record(folder, rank, range(560)):
                pass
            # Back to 500, then far back, then on from where the first attempt was: not in the order of the file.
            for _ in run.record(folder, rank, range(500, 540), attempt=1):
                pass
            for _ in run.record(folder, rank, range(300, 330), attempt=2):
                pass
            killed(run, folder, rank, range(540, 700 - 3 * rank), attempt=3)
        assert path_of(event_file(folder, 0)).stat().st_size > 1000
    return folder


def test_files_of_both_versions_are_explained_alike(made: Path, tmp_path: Path) -> None:
    old = tmp_path / made.name
    copytree(made, old)
    for rank in range(4):
        as_lines(event_file(old, rank))
    assert to_json(explain(old)) == to_json(explain(made))


def test_windows_add_up_to_what_the_whole_table_says(made: Path) -> None:
    told = explain(made)
    table = load_steps(made)
    run, steps = read_run(made)
    assert len(list(steps.windows())) >= 3
    assert np.array_equal(table.steps, np.arange(table.steps[-1] + 1))
    table.of_run = None  # as if it were not known to be a run
    fall = waterfall(table, run.start.peak_flops, split_flops(table, None))
    assert fall is not None
    assert told.waterfall is not None
    assert [t.name for t in told.waterfall.terms] == [t.name for t in fall.terms]
    assert [t.seconds for t in told.waterfall.terms] == pytest.approx([t.seconds for t in fall.terms], rel=1e-9)
    assert told.waterfall.notes == fall.notes
    assert late_excess(table).any()
    assert told.verdicts == find_blame(table)
    assert told.memory == memory_report(MemoryUse.of(table), run.start, None, run.reason)
    rows = np.flatnonzero(table.work)
    for name, values in told.phases.items():
        assert values == pytest.approx(table.phases[name][rows].mean(axis=0).tolist(), rel=1e-9)
    assert sum(t.seconds for t in fall.terms) == pytest.approx(fall.wall_s, rel=1e-9)


def test_memory_grows_with_a_window_and_not_with_the_run(tmp_path: Path) -> None:
    run = Run(Layout(pp=2, dp_shard=4))
    peaks = {}
    for steps in (1000, 4000):
        copies(run, tmp_path / str(steps), 8, steps)
        tracemalloc.start()
        told = explain(tmp_path / str(steps))
        peaks[steps] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert told.waterfall is not None
        assert told.waterfall.steps == steps - 5
        assert len(json.loads(to_json(told))["step_time"]) == 400
    print(f"peak {peaks[1000] / 2**20:.1f} MiB for 8 x 1,000, {peaks[4000] / 2**20:.1f} MiB for 8 x 4,000")
    assert peaks[4000] - peaks[1000] < 100 * 8 * 3000  # 1,900 bytes a rank and step when all records were kept
