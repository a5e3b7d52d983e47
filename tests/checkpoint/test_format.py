"""Boxes, containers, manifests and the folder: format and commit protocol, in one process and without torch's part."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainsys.checkpoint import manifest as manifests
from trainsys.checkpoint.atoms import assign, check_tiling
from trainsys.checkpoint.container import Damaged, Entry, TensorFile, arrange, hash_file, write_file
from trainsys.checkpoint.folder import Folder, problems
from trainsys.checkpoint.inspect import ls, verify
from trainsys.checkpoint.manifest import Atom, File, Manifest, Part
from trainsys.checkpoint.peers import peer_of
from trainsys.errors import UserError
from trainsys.models.boxes import intersect, shape_of, tile, volume, within

spans = st.integers(0, 9).flatmap(lambda a: st.integers(a, 9).map(lambda b: (a, b)))
boxes = st.lists(spans, min_size=2, max_size=2).map(tuple)


@settings(deadline=None)
@given(boxes, boxes)
def test_an_intersection_is_what_sets_say(a, b) -> None:
    full = np.zeros((9, 9), int)
    for box in (a, b):
        full[tuple(slice(*s) for s in box)] += 1
    common = intersect(a, b)
    assert (full == 2).sum() == (0 if common is None else volume(common))
    if common is not None:
        inside = np.arange(volume(a)).reshape(shape_of(a))[within(common, a)]
        assert inside.shape == shape_of(common)


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.data())
def test_tiles_have_no_gap_and_no_overlap(n, m, data) -> None:
    row, col = data.draw(st.integers(0, n)), data.draw(st.integers(0, m))
    cut = [
        ((0, row), (0, col)), ((0, row), (col, m)), ((row, n), (0, m)),
    ]  # fmt: skip
    assert tile((n, m), cut)
    full = [box for box in cut if volume(box)]
    assert not tile((n, m), full[1:])
    assert not tile((n, m), [*full, full[0]])


def test_overlap_with_the_right_volume_is_no_tiling() -> None:
    assert not tile((4,), [((0, 2),), ((1, 3),)])


def test_every_box_is_written_once_and_the_load_is_spread() -> None:
    box, other = ((0, 4),), ((4, 8),)
    a, b, c = ("w", "F32", (8,), box), ("w", "F32", (8,), other), ("v", "F32", (4,), box)
    by_rank = [[a, c], [b, c], [a, c], [b, c]]
    chosen = assign(by_rank)
    written = [by_rank[rank][i] for rank, indices in enumerate(chosen) for i in indices]
    assert sorted(written) == sorted([a, b, c])
    assert max(map(len, chosen)) == 1, "three boxes, four ranks: no rank writes two"
    check_tiling(by_rank)
    with pytest.raises(AssertionError, match="do not tile"):
        check_tiling([[a, c]])


def test_a_file_is_what_safetensors_reads(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.numpy")
    x, y = np.arange(6, dtype=np.float32).reshape(2, 3), np.array([1, 2], np.int64)
    head, entries = arrange([Entry("y", "I64", (2,)), Entry("x", "F32", (2, 3))], {"by": "test"})
    sha256 = write_file(tmp_path / "f.safetensors", head, [memoryview(y), memoryview(x)])
    assert sha256 == hash_file(tmp_path / "f.safetensors")
    assert all(e.offset % 8 == 0 for e in entries)
    read = safetensors.load_file(tmp_path / "f.safetensors")
    assert np.array_equal(read["x"], x)
    assert np.array_equal(read["y"], y)
    mine = TensorFile(tmp_path / "f.safetensors")
    assert bytes(mine.data("x")) == x.tobytes()
    assert mine.metadata == {"by": "test"}


@pytest.mark.parametrize("size", [0, 5, 60, 200])
def test_a_cut_file_is_damaged(tmp_path: Path, size: int) -> None:
    path = tmp_path / "f"
    head, _ = arrange([Entry("x", "F32", (64,))])
    write_file(path, head, [memoryview(np.zeros(64, np.float32))])
    os.truncate(path, size)
    with pytest.raises(Damaged, match=str(path)):
        TensorFile(path)


def saved(folder: Folder, step: int, loss: float | None = None) -> str:
    saving = folder.saving(step, "t")
    head, placed = arrange([Entry("w", "F32", (4,))])
    data = np.full(4, step, np.float32)
    sha256 = write_file(saving / "rank_00000_000.safetensors", head, [memoryview(data)])
    size = (saving / "rank_00000_000.safetensors").stat().st_size
    manifest = Manifest(
        step=step, data_step=step, updates=step, world=1, loss=loss,
        files=[File("rank_00000_000.safetensors", size, sha256)],
        atoms={"w": Atom("F32", (4,), [Part(0, placed[0].offset, ((0, 4),))])},
    )  # fmt: skip
    return folder.commit(saving, manifest)


def test_manifests_come_back_and_a_flipped_byte_anywhere_is_found(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    name = saved(folder, 7, loss=2.5)
    path = tmp_path / name / manifests.NAME
    assert json.loads(path.read_text())["step"] == 7, "a manifest is plain JSON"
    good = path.read_bytes()
    assert manifests.encode(manifests.decode(good, path)) == good
    for i in range(len(good) - 1):  # the last byte is the end of the line
        with pytest.raises((Damaged, UserError)):
            manifests.decode(good[:i] + bytes([good[i] ^ 1]) + good[i + 1 :], path)


def test_a_newer_version_is_refused_by_name_and_a_newer_minor_is_read(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    name = saved(folder, 7)
    manifest = manifests.read(tmp_path / name)
    manifest.schema = "1.9"
    data = manifests.encode(manifest)
    body = data[: data.rindex(b',"sha256":"')] + b',"invented_later":[1,2]'
    newer = body + b',"sha256":"' + hashlib.sha256(body).hexdigest().encode() + b'"}\n'
    assert manifests.decode(newer, "m").schema == "1.9"
    manifest.schema = "2.0"
    manifests.write(manifest, tmp_path / name)
    with pytest.raises(UserError, match=r"schema 2\.0 is newer than 1\.1"):
        manifests.read(tmp_path / name)
    with pytest.raises(UserError, match=r"schema 2\.0"):
        folder.read_all()


def test_an_interrupted_save_changes_nothing(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    saved(folder, 1)
    folder.saving(2, "x").joinpath("rank_00000_000.safetensors").write_bytes(b"half")
    (tmp_path / "step_0000000009").mkdir()  # no manifest: no checkpoint
    assert folder.names() == ["step_0000000001"]
    assert folder.latest() == "step_0000000001"
    assert folder.clean() == [".saving-step_0000000002-x"]
    assert folder.names() == ["step_0000000001"]


def test_the_same_step_again_replaces_nothing_and_is_the_newest(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    names = [saved(folder, step) for step in (4, 8, 4)]
    assert names[2] == "step_0000000004.1"
    assert folder.read_all()[0][0][0] == names[2]
    assert folder.latest() == names[2]


def test_retention_keeps_last_every_and_best(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    for step, loss in ((1, 3.0), (2, 0.5), (3, 2.0), (4, 2.0), (5, 2.0), (6, 2.0)):
        saved(folder, step, loss)
    assert sorted(folder.retain(2, 4, 1)) == ["step_0000000001", "step_0000000003"]
    assert folder.names() == [f"step_{n:010d}" for n in (2, 4, 5, 6)]
    assert folder.retain(2, 4, 1) == []


@pytest.mark.parametrize("harm", ["truncate", "flip", "delete"])
def test_retention_never_drops_the_only_good_one(tmp_path: Path, harm: str) -> None:
    folder = Folder(tmp_path)
    for step in (1, 2):
        name = saved(folder, step)
    path = tmp_path / name / "rank_00000_000.safetensors"
    data = bytearray(path.read_bytes())
    if harm == "delete":
        path.unlink()
    elif harm == "truncate":
        path.write_bytes(data[:-1])
    else:
        data[-1] ^= 1
        path.write_bytes(data)
    assert folder.retain(1, 0, 0) == []
    assert len(folder.names()) == 2


def test_verify_names_each_damaged_file(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    a, b = saved(folder, 1), saved(folder, 2)
    assert verify(tmp_path) == []
    path = tmp_path / a / "rank_00000_000.safetensors"
    for i in (0, 20, path.stat().st_size - 1):
        data = bytearray(path.read_bytes())
        data[i] ^= 4
        path.write_bytes(data)
        assert [line.split(":")[0] for line in verify(tmp_path)] == [str(path)]
        data[i] ^= 4
        path.write_bytes(data)
    (tmp_path / b / manifests.NAME).write_bytes(b"{}")
    assert [line.split(":")[0] for line in verify(tmp_path)] == [str(tmp_path / b / manifests.NAME)]
    assert "damaged" in ls(tmp_path)
    assert list(problems(tmp_path / a, manifests.read(tmp_path / a))) == []


def test_a_copy_is_kept_on_another_node_half_the_world_away() -> None:
    nodes = ["a", "a", "b", "b"]
    assert [peer_of(r, nodes) for r in range(4)] == [2, 3, 0, 1]
    assert peer_of(0, ["a", "a"]) is None
    for world in range(2, 9):
        uneven = ["a"] * (world - 1) + ["b"]
        assert all(uneven[peer_of(r, uneven)] != uneven[r] for r in range(world))


def test_a_manifest_holds_no_number_that_json_lacks() -> None:
    manifest = Manifest(step=0, data_step=0, updates=0, world=1, files=[], atoms={}, loss=None)
    assert msgspec.json.decode(manifests.encode(manifest))["loss"] is None
