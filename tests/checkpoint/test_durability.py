"""After a power cut at any moment of a save, a resume finds the checkpoint before it or the new one, whole."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from support.power import Cut, Power
from trainsys.checkpoint.folder import Folder, is_whole
from trainsys.checkpoint.health import Health
from trainsys.checkpoint.ranks import Ranks
from trainsys.checkpoint.resume import find
from trainsys.checkpoint.saver import Progress, Saver
from trainsys.config.run import CheckpointConfig
from trainsys.engines.base import LocalTensor
from trainsys.models.shards import ShardSpec


class Disk:
    """A run that saves two tensors in two files below ``top``, on a disk whose power may fail at any moment."""

    def __init__(self, top: Path, patch: pytest.MonkeyPatch, staged: bool) -> None:
        self.top, self.numbers = top, itertools.count()
        (top / "disk").mkdir()
        self.power = Power(top / "disk", patch)
        self.root = top / "disk/runs/checkpoints/demo"
        self.state = [LocalTensor(name, torch.zeros(40), ShardSpec.whole((40,))) for name in ("w", "w@exp_avg")]
        local = str(top / "disk/local") if staged else None
        cfg = CheckpointConfig(keep_last=1, local_dir=local, mode="sync")
        self.saver = Saver(cfg, Folder(self.root), Ranks(), lambda: self.state, {}, file_bytes=200, retry_wait_s=0.01)

    def save(self, step: int) -> None:
        for t in self.state:
            t.data.fill_(step)
        self.saver.save(Progress(step, step, step))

    def after_a_cut(self) -> Iterator[tuple[Cut, Folder]]:
        for cut in self.power.cuts():
            where = self.top / f"cut{next(self.numbers)}"
            cut.write(where)
            yield cut, Folder(where / self.root.relative_to(self.top / "disk"))

    def close(self) -> None:
        self.saver.close()


@pytest.fixture(params=[False, True], ids=["direct", "staged"])
def disk(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    made = Disk(tmp_path, monkeypatch, request.param)
    yield made
    made.close()


def resumed(folder: Folder, cut: Cut) -> int:
    """The step that a resume goes on from, 0: none; every name that is listed must be of something whole."""
    listed, bad = folder.read_all()
    assert not bad, f"{cut.moment}: {bad[0]}"
    for name, manifest in listed:
        assert is_whole(folder.root / name, manifest), f"{cut.moment}: {name} is listed and is not whole"
    if (pointer := folder.latest()) is not None:
        assert pointer in [name for name, _ in listed], f"{cut.moment}: latest names {pointer}, which is not there"
    found = find(folder, "auto", Ranks())
    return found.manifest.step if found else 0


def test_a_cut_at_any_moment_leaves_the_old_or_the_new_one(disk: Disk) -> None:
    disk.save(1)
    disk.power.forget()
    disk.save(2)
    disk.saver.judged(3, True)  # proves 2, so that 1 goes: a rename, and files that are deleted
    disk.saver.wait()
    assert Folder(disk.root).names() == ["step_0000000002"]
    steps = [resumed(folder, cut) for cut, folder in disk.after_a_cut()]
    assert set(steps) == {1, 2}
    assert len(steps) > 20, "the cuts were too few to show anything"


def test_what_was_reported_saved_is_there_whatever_happens(disk: Disk) -> None:
    """The very first save makes the folders too, whose names have to last."""
    for step in (1, 2):
        disk.save(step)
        disk.power.forget()
        for cut, folder in disk.after_a_cut():
            assert resumed(folder, cut) == step
            assert folder.latest() == f"step_{step:010d}"
            found, _ = folder.read_all()
            assert len(found[0][1].files) > 1
        disk.power.on = True


def test_a_mark_of_health_is_old_or_new_and_never_in_between(disk: Disk) -> None:
    disk.save(1)
    disk.power.forget()
    disk.saver.judged(2, False)
    disk.saver.wait()
    seen = set()
    for cut, folder in disk.after_a_cut():
        assert resumed(folder, cut) == 1
        ((name, manifest),) = folder.read_all()[0]
        seen.add(folder.health(name, manifest))
    assert seen == {Health.UNPROVEN, Health.SUSPECT}
    disk.power.forget()
    for _, folder in disk.after_a_cut():
        ((name, manifest),) = folder.read_all()[0]
        assert folder.health(name, manifest) is Health.SUSPECT, "once it is reported, it lasts"


def test_the_model_of_the_disk_forgets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the tests above would show nothing: each omission of a sync loses what it should."""
    (tmp_path / "disk").mkdir()
    power = Power(tmp_path / "disk", monkeypatch)
    path = tmp_path / "disk/file"
    path.write_bytes(b"data")
    folder = os.open(tmp_path / "disk", os.O_RDONLY)

    def states() -> set[Any]:
        power.forget()
        return set(power._states)

    power._scan()
    assert states() == {(), (("file", b""),), (("file", b"data"),)}
    os.fsync(folder)
    assert states() == {(("file", b""),), (("file", b"data"),)}, "a synced name of a file that was not synced"
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    assert states() == {(("file", b"data"),)}
    os.rename(path, tmp_path / "disk/other")
    assert states() == {(("file", b"data"),), (("other", b"data"),)}
    os.close(folder)
