"""Which checkpoints stay and which are resumed when an update with a finite loss has destroyed the weights."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from support.jobs import Job
from support.toy import ToyEngine, ToyRun, toy_config
from trainsys.checkpoint.folder import Folder
from trainsys.checkpoint.inspect import ls, resolve
from trainsys.checkpoint.ranks import Ranks
from trainsys.checkpoint.resume import find
from trainsys.config.run import RunConfig
from trainsys.engines.native import NativeEngine
from trainsys.errors import UserError


def config(out: Path, steps: int = 17, resilience: dict[str, Any] | None = None, **checkpoint: Any) -> RunConfig:
    return toy_config(out, steps, checkpoint={"keep_last": 3, **checkpoint}, resilience=resilience or {})


def states(cfg: RunConfig) -> dict[int, str]:
    folder = Folder(cfg.checkpoint_folder)
    return {m.step: folder.health(name, m).value for name, m in folder.read_all()[0]}


def after(step: int) -> Any:
    return lambda session: session.step == step


@pytest.mark.parametrize("poison", [6, 7])
def test_poisoned_weights_drive_no_good_checkpoint_out_and_are_not_resumed(tmp_path: Path, poison: int) -> None:
    """Batch 7 is the last before the save of step 8: that one is saved with a finite loss, and is dead."""
    cfg = config(tmp_path, memory_every=1)
    run = ToyRun(cfg, ToyEngine(poison={poison})).go(until=after(16))
    assert run.engine.weights.isnan().all()
    healthy = [step for step, state in states(cfg).items() if state == "healthy"]
    assert sorted(healthy) == [2, 4, 6], "the good steps stay, however many dead ones follow"
    assert states(cfg)[16] == "suspect"
    assert len(states(cfg)) == 4, "of the dead, only the newest stays"
    again = ToyRun(cfg, ToyEngine()).go()
    # The memory holds the step before the update that destroyed everything: newer than the disk's, and proven.
    assert again.began == (poison, float(poison))
    assert not again.engine.weights.isnan().any()
    assert any("step_0000000016 (step 16)" in line for line in again.said), again.said
    assert max(states(cfg)) == 17


def test_a_dead_copy_in_memory_never_beats_a_healthy_checkpoint_on_disk(tmp_path: Path) -> None:
    cfg = config(tmp_path, memory_every=1)
    ToyRun(cfg, ToyEngine(poison={7})).go(until=after(12))
    (memory,) = (tmp_path / "memory").iterdir()
    kept = sorted(path.name for path in memory.iterdir())
    assert kept == ["step_0000000007", "step_0000000008"], "the proven copy stays beside the dead one"
    shutil.rmtree(memory / "step_0000000007")
    again = ToyRun(cfg, ToyEngine()).go(until=after(7))
    assert again.began == (6, 6.0)


def test_a_run_killed_right_after_a_save_goes_on_from_it(tmp_path: Path) -> None:
    """Nothing speaks against a checkpoint that nobody trained on from; the first step after the resume proves it."""
    cfg = config(tmp_path)
    ToyRun(cfg, ToyEngine()).go(until=after(6))
    assert states(cfg) == {2: "healthy", 4: "healthy", 6: "unproven"}
    again = ToyRun(cfg, ToyEngine()).go(until=after(7))
    assert again.began == (6, 6.0)
    assert states(cfg)[6] == "healthy"


def test_the_last_step_of_a_finished_run_is_used(tmp_path: Path) -> None:
    cfg = config(tmp_path, steps=7)
    ToyRun(cfg, ToyEngine()).go()
    assert states(cfg) == {2: "healthy", 4: "healthy", 6: "healthy", 7: "unproven"}
    assert resolve(cfg.checkpoint_folder).name == "step_0000000007"
    found = find(Folder(cfg.checkpoint_folder), "auto", Ranks())
    assert found is not None
    assert found.manifest.step == 7


def test_one_bad_batch_leaves_its_neighbours_healthy(tmp_path: Path) -> None:
    """The step after the save, and the step of the save, are skipped; the weights are fine, as the next one shows."""
    cfg = config(tmp_path, steps=12, keep_last=9)
    run = ToyRun(cfg, ToyEngine(bad={4, 7})).go()
    assert states(cfg) == {2: "healthy", 4: "healthy", 6: "healthy", 8: "healthy", 10: "healthy", 12: "unproven"}
    assert run.engine.updates == 10


def test_a_suspect_checkpoint_is_not_what_the_folder_stands_for(tmp_path: Path) -> None:
    cfg = config(tmp_path, steps=12)
    ToyRun(cfg, ToyEngine(poison={7})).go()
    folder = Folder(cfg.checkpoint_folder)
    assert folder.latest() == "step_0000000006"
    assert resolve(folder.root).name == "step_0000000006", "what `ckpt export` takes"
    assert "suspect" in ls(folder.root)
    for name, m in folder.read_all()[0]:
        if m.step < 12:
            shutil.rmtree(folder.root / name)
    found = find(folder, "auto", Ranks())
    assert found is not None
    assert found.manifest.step == 12, "better than nothing"
    assert "there is no better one" in found.notes[0]


@pytest.mark.parametrize("action", ["rollback", "stop"])
def test_a_roll_back_and_a_stop_leave_the_dead_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, action: str
) -> None:
    """Though what the bad step has shown is written down slowly, and behind it."""
    real = Folder.mark
    monkeypatch.setattr(Folder, "mark", lambda *args: (time.sleep(0.2), real(*args)))
    cfg = config(tmp_path, steps=12, resilience={"nonfinite": action})
    run = ToyRun(cfg, ToyEngine(poison={7}))
    if action == "stop":
        with pytest.raises(UserError, match="resilience says stop"):
            run.go()
        again = ToyRun(cfg, ToyEngine()).go(until=after(7))
        assert again.began == (6, 6.0), "not the dead step 8, though it was saved"
        return
    run.go()
    # Back to 6, not to 8, and on with batch 9: six updates more.
    assert float(run.engine.weights[0]) == 12.0
    by_name = dict(Folder(cfg.checkpoint_folder).read_all()[0])
    assert by_name["step_0000000008.1"].data_step == 11
    assert states(cfg)[12] == "unproven"
    assert "step_0000000008" not in by_name, "nor does it keep a place"


def test_what_nobody_kept_count_of_is_trusted(tmp_path: Path) -> None:
    """Checkpoints of an older version, and imports, have no count of skipped steps."""
    cfg = config(tmp_path, steps=6)
    ToyRun(cfg, ToyEngine()).go()
    folder = Folder(cfg.checkpoint_folder)
    for name, m in folder.read_all()[0]:
        (folder.root / name / "health.json").unlink(missing_ok=True)
        m.skipped = None
        saving = folder.saving(m.step, "old")
        shutil.copytree(folder.root / name, saving, dirs_exist_ok=True)
        shutil.rmtree(folder.root / name)
        folder.commit(saving, m)
    assert set(states(cfg).values()) == {"healthy"}


@pytest.mark.parametrize("harm", ["cut", "gone", "flipped"])
def test_a_damaged_checkpoint_takes_nobodys_place(tmp_path: Path, harm: str) -> None:
    cfg = config(tmp_path, steps=20, keep_last=2)
    ToyRun(cfg, ToyEngine()).go(until=after(7))
    folder = Folder(cfg.checkpoint_folder)
    assert sorted(states(cfg)) == [4, 6]
    (file,) = (folder.root / "step_0000000006").glob("*.safetensors")
    if harm == "gone":
        file.unlink()
    else:
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data[:-1] if harm == "cut" else data)
    again = ToyRun(cfg, ToyEngine()).go(until=after(7))
    assert again.began == (4, 4.0)
    assert sorted(states(cfg)) == [4, 6], "4 must stay: 6 does not count, and 6.1 is not proven"
    kept = ["step_0000000004", "step_0000000006", "step_0000000006.1"]
    assert folder.names() == kept, "nor does it go before two newer ones are there"
    ToyRun(cfg, ToyEngine()).go(until=after(9))
    names = folder.names()
    assert names == ["step_0000000006.1", "step_0000000008"], "two whole ones; the damaged one went with step 4"


@pytest.mark.parametrize("harm", ["cut", "gone"])
def test_damage_while_the_run_lives_is_seen_by_retention(tmp_path: Path, harm: str) -> None:
    cfg = config(tmp_path, steps=20, keep_last=2)
    folder = Folder(cfg.checkpoint_folder)

    def damage(session: Any) -> bool:
        if session.step == 7:
            session._saver.wait()
            (file,) = (folder.root / "step_0000000006").glob("*.safetensors")
            if harm == "cut":
                file.write_bytes(file.read_bytes()[:-1])
            else:
                file.unlink()
        return bool(session.step == 9)

    ToyRun(cfg, ToyEngine()).go(until=damage)
    assert sorted(states(cfg)) == [4, 6, 8], "4 and 8 are the two that count"


def test_weights_come_back_as_they_were_saved(tmp_path: Path) -> None:
    cfg = config(tmp_path, steps=5)
    ToyRun(cfg, ToyEngine()).go(until=after(4))
    engine = ToyEngine()
    ToyRun(cfg, engine).go()
    assert torch.equal(engine.weights, torch.full((4,), 5.0))


def test_copies_in_memory_of_another_run_are_left_alone(tmp_path: Path) -> None:
    """The memory folder is named after the checkpoint folder's path: a run that is deleted and started anew under the
    same name finds the copies of the one before there."""
    cfg = config(tmp_path, memory_every=1)
    ToyRun(cfg, ToyEngine()).go(until=after(5))
    assert ToyRun(cfg, ToyEngine()).go(until=after(6)).began == (5, 5.0), "the same run takes its copy"
    shutil.rmtree(cfg.checkpoint_folder)
    again = ToyRun(cfg, ToyEngine()).go(until=after(1))
    assert again.began == (0, 0.0)


RUN = """\
name: dead
hardware: H100-SXM-80
model: {{n_layers: 1, d_model: 32, n_heads: 2, d_ff: 64, vocab: 64, max_seq_len: 32}}
parallel: {{dp_shard: 2}}
data: {{source: synthetic}}
train: {{steps: 16, seq_len: 16, global_batch: 4, micro_batch: 2, dtype: fp32, device: cpu, threads: 1}}
telemetry: {{out: {out}, console: "off"}}
checkpoint: {{every: 2, keep_last: 3, memory_every: 1, memory_dir: {out}/memory}}
resilience: {{nonfinite: skip, max_anomalies: 100}}
"""


def test_two_ranks_whose_weights_one_update_destroys(tmp_path: Path) -> None:
    """The same on the real engine; the memory is that of a node which is lost before the restart."""
    (tmp_path / "run.yaml").write_text(RUN.format(out=tmp_path))
    (tmp_path / "memory").mkdir()

    def poison(rank: int) -> None:
        real = NativeEngine.train_step

        def train_step(self: NativeEngine, step: int, data: Any, *rest: Any) -> Any:
            result = real(self, step, data, *rest)
            assert torch.isfinite(result.scalars).all() == (data.step <= 7), "the loss of the deadly step is finite"
            if data.step == 7:
                for weight in self.parameters():
                    weight.data.fill_(float("nan"))
            return result

        NativeEngine.train_step = train_step  # type: ignore[method-assign]

    codes = Job(2, tmp_path / "run.yaml", [], tmp_path / "log", poison).wait(200)
    assert codes == [0, 0], (tmp_path / "log").read_text()
    folder = Folder(tmp_path / "checkpoints/dead")
    by_step = {m.step: folder.health(name, m).value for name, m in folder.read_all()[0]}
    assert by_step == {2: "healthy", 4: "healthy", 6: "healthy", 16: "suspect"}
    codes = Job(2, tmp_path / "run.yaml", ["train.steps=18"], tmp_path / "log").wait(200)
    assert codes == [0, 0], (tmp_path / "log").read_text()
    newest = folder.read_all()[0][0][1]
    assert (newest.step, newest.updates, newest.resumed_from) == (18, 18, str(folder.root / "step_0000000006"))
