"""When a run saves without being asked: by steps, by time, at the end; and what it says when it never does."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from support.jobs import Job
from support.toy import ToyEngine, ToyRun, toy_config
from trainsys.checkpoint.folder import Folder
from trainsys.checkpoint.saver import Progress, Saver
from trainsys.config.loader import load_run
from trainsys.config.run import CheckpointConfig
from trainsys.engines.base import SAVE, STOP
from trainsys.engines.native import NativeEngine
from trainsys.resilience.watchdog import EXIT_HUNG
from trainsys.telemetry.events import Step
from trainsys.telemetry.reader import read_events
from trainsys.telemetry.writer import EventWriter

STOPPED = """
name: stopped
model: {n_layers: 1, d_model: 16, n_heads: 2, d_ff: 32, vocab: 264, max_seq_len: 32}
parallel: {dp_shard: 2}
data: {source: synthetic}
train: {steps: 50, seq_len: 16, global_batch: 4, micro_batch: 2, dtype: fp32, device: cpu, threads: 1}
telemetry: {console: "off"}
checkpoint: {every: 2, mode: sync}
resilience: {hang_timeout_s: 3}
"""
SHIPPED = sorted((Path(__file__).resolve().parents[2] / "configs/train").glob("*.yaml"))


def saved(cfg: Any) -> list[int]:
    return sorted(m.step for _, m in Folder(cfg.checkpoint_folder).read_all()[0])


def steps_of(tmp_path: Path, minutes_a_step: float, steps: int = 12, **checkpoint: Any) -> list[int]:
    """The steps that a run saves whose every step takes ``minutes_a_step`` by the clock it is given."""
    cfg = toy_config(tmp_path, steps, checkpoint={"keep_last": 99, **checkpoint})
    now = [1000.0]
    run = ToyRun(cfg, ToyEngine(), clock=lambda: now[0])

    def tick(session: Any) -> bool:
        now[0] += 60.0 * minutes_a_step
        return False

    run.go(until=tick)
    return saved(cfg)


def test_whichever_comes_first_and_the_last_step_always(tmp_path: Path) -> None:
    # The clock is read before a step, so the save is that of the first step begun when the time was up.
    assert steps_of(tmp_path / "a", 1.0, every=0, every_minutes=5.0) == [6, 11, 12]
    assert steps_of(tmp_path / "b", 1.0, every=4, every_minutes=0) == [4, 8, 12]
    assert steps_of(tmp_path / "c", 1.0, every=8, every_minutes=5.0) == [6, 8, 12], "a save of either starts it anew"
    assert steps_of(tmp_path / "d", 90.0, every=1000, every_minutes=30.0) == list(range(2, 13))
    assert steps_of(tmp_path / "e", 0.0) == [2, 4, 6, 8, 10, 12]


def test_a_run_that_sets_nothing_saves(tmp_path: Path) -> None:
    """By default a save is at most half an hour old, and the last step is there."""
    plain = CheckpointConfig()
    assert steps_of(tmp_path, 20.0, steps=7, every=plain.every, every_minutes=plain.every_minutes) == [3, 5, 7]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_recipe_saves(path: Path) -> None:
    cfg = load_run(str(path))
    assert cfg.saves
    assert cfg.checkpoint.every_minutes or cfg.checkpoint.every < cfg.train.steps


def test_saving_that_is_off_is_said_out_loud(tmp_path: Path) -> None:
    cfg = toy_config(tmp_path, 3, checkpoint={"every": 0, "every_minutes": 0})
    run = ToyRun(cfg, ToyEngine()).go()
    assert [line for line in run.said if "SAVING IS OFF" in line]
    assert saved(cfg) == []
    assert not Path(cfg.checkpoint_folder).exists(), "and nothing is left behind"
    assert not ToyRun(toy_config(tmp_path / "on", 3), ToyEngine()).go().said


def test_asked_to_stop_it_saves_even_then(tmp_path: Path) -> None:
    cfg = toy_config(tmp_path, 9, checkpoint={"every": 0, "every_minutes": 0})
    run = ToyRun(cfg, ToyEngine())

    def ask(session: Any) -> bool:
        if session.step == 4:
            run.drain._asked = "SIGTERM"
        return False

    run.go(until=ask)
    assert saved(cfg) == [5]
    assert run.session.stopped.startswith("asked to stop at step 5")


def test_what_ranks_ask_for_adds_up_exactly() -> None:
    """16,384 ranks that all stop, and rank 0 that wants a save, in one fp32 sum in any order."""
    asks = torch.full((16384,), STOP)
    asks[0] += SAVE
    total = float(asks.sum())
    assert total >= STOP
    assert total % STOP == SAVE
    assert float(torch.full((16384,), STOP).sum()) % STOP == 0.0


RUN = """\
name: timed
hardware: H100-SXM-80
model: {{n_layers: 1, d_model: 32, n_heads: 2, d_ff: 64, vocab: 64, max_seq_len: 32}}
parallel: {{dp_shard: 2}}
data: {{source: synthetic}}
train: {{steps: 8, seq_len: 16, global_batch: 4, micro_batch: 2, dtype: fp32, device: cpu, threads: 1}}
telemetry: {{out: {out}, console: "off"}}
checkpoint: {{every: 0, every_minutes: 0.0001, keep_last: 9}}
"""


def test_all_ranks_save_at_the_moment_of_rank_0(tmp_path: Path) -> None:
    """The clock of rank 1 is a day ahead and then stands still; the ranks would hang if each followed its own."""
    (tmp_path / "run.yaml").write_text(RUN.format(out=tmp_path))

    def prepare(rank: int) -> None:
        real, step = NativeEngine.train_step, [0]

        def train_step(self: Any, number: int, data: Any, judge: Any = None, ask: float = 0.0) -> Any:
            step[0] += 1
            assert rank == 0 or ask < SAVE or ask == STOP, "only rank 0 asks for a save"
            return real(self, number, data, judge, SAVE if rank == 0 and step[0] in (3, 6) else 0.0)

        NativeEngine.train_step = train_step  # type: ignore[method-assign]

    codes = Job(2, tmp_path / "run.yaml", [], tmp_path / "log", prepare).wait(200)
    assert codes == [0, 0], (tmp_path / "log").read_text()
    found = Folder(tmp_path / "checkpoints/timed").read_all()[0]
    assert sorted(m.step for _, m in found) == [3, 6, 8]
    assert all(len({f.name[:10] for f in m.files}) == 2 for _, m in found), "files of both ranks"


def test_killed_right_after_a_save_it_leaves_a_record_of_every_step_before(tmp_path: Path) -> None:
    """The next attempt begins behind these steps: what is not on disk by then, nobody has."""

    def prepare(rank: int) -> None:
        assert EventWriter.__init__.__kwdefaults__
        EventWriter.__init__.__kwdefaults__["flush_s"] = 60.0
        real = Saver.save

        def save(self: Saver, progress: Progress, **options: Any) -> None:
            real(self, progress, **options)
            self.wait()
            os.kill(os.getpid(), signal.SIGKILL)

        Saver.save = save  # type: ignore[method-assign]

    (tmp_path / "run.yaml").write_text(RUN.format(out=tmp_path))
    overrides = ["checkpoint.every=3", "checkpoint.every_minutes=0", "parallel.dp_shard=1"]
    codes = Job(1, tmp_path / "run.yaml", overrides, tmp_path / "log", prepare).wait(120)
    assert codes == [-signal.SIGKILL], (tmp_path / "log").read_text()
    assert saved(load_run(str(tmp_path / "run.yaml"))) == [3]
    (events,) = tmp_path.glob("timed-2*/events/rank_00000.jsonl")
    assert [e.step for e in read_events(events)[0] if isinstance(e, Step)] == [0, 1, 2]


def test_a_rank_that_is_stopped_while_it_saves_is_missed_as_in_a_step(tmp_path: Path) -> None:
    """Not after all of the time that set-up may take: half an hour."""

    def stop_in_second_save(rank: int) -> None:
        part = Saver._write_part

        def write(self: Saver, step: int, token: str) -> Any:
            if rank == 1 and step > 2:
                os.kill(os.getpid(), signal.SIGSTOP)
            return part(self, step, token)

        Saver._write_part = write  # type: ignore[method-assign]

    file, log = tmp_path / "run.yaml", tmp_path / "log"
    file.write_text(STOPPED)
    job = Job(2, file, [f"telemetry.out={tmp_path / 'out'}"], log, stop_in_second_save)
    assert os.waitstatus_to_exitcode(os.waitpid(job.pids[0], 0)[1]) == EXIT_HUNG, log.read_text()
    os.kill(job.pids[1], signal.SIGKILL)
    os.waitpid(job.pids[1], 0)
    assert "trainsys: hang: " in log.read_text()
    assert saved(load_run(str(file), [f"telemetry.out={tmp_path / 'out'}"])) == [2]
