"""Saving and resuming on one and several ranks: errors, staging, fall-back, refusals, copies in memory."""

from __future__ import annotations

import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from checkpoint.matrix import BEFORE, assemble, build, config, pieces, saver_of, train

from support.ranks import run_ranks
from trainsys.checkpoint import saver as saver_module
from trainsys.checkpoint.convert import convert, diff
from trainsys.checkpoint.folder import Folder
from trainsys.checkpoint.peers import PeerMemory
from trainsys.checkpoint.ranks import Ranks
from trainsys.checkpoint.resume import find, load, refuse_other_run
from trainsys.checkpoint.saver import Progress
from trainsys.config.run import RunConfig
from trainsys.errors import MachineFault, UserError


def save_steps(cfg: RunConfig, root: str, steps: tuple[int, ...], **options: Any) -> Any:
    engine = build(cfg)
    saver = saver_of(engine, root, **options)
    at = 0
    for step in steps:
        train(engine, at, step - at)
        saver.save(Progress(step, step, engine.updates, loss=float(step)))
        at = step
    saver.close()
    return pieces(engine)


def harm(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_resume_passes_over_what_is_damaged_and_says_so(tmp_path: Path) -> None:
    save_steps(config("single"), str(tmp_path), (1, 2, 3))
    newest, middle = tmp_path / "step_0000000003", tmp_path / "step_0000000002"
    harm(next(newest.glob("*.safetensors")))
    found = find(Folder(tmp_path), "auto", Ranks())
    assert found is not None
    assert found.path == middle
    assert len(found.notes) == 1
    assert str(newest) in found.notes[0]
    harm(middle / "manifest.json")
    found = find(Folder(tmp_path), "auto", Ranks())
    assert found is not None
    assert found.manifest.step == 1
    harm(next((tmp_path / "step_0000000001").glob("*.safetensors")))
    with pytest.raises(UserError, match="no checkpoint is good"):
        find(Folder(tmp_path), "auto", Ranks())


def test_what_resume_may_be(tmp_path: Path) -> None:
    assert find(Folder(tmp_path), "auto", Ranks()) is None
    assert find(Folder(tmp_path), "never", Ranks()) is None
    save_steps(config("single"), str(tmp_path), (1, 2))
    one = find(Folder(tmp_path / "other"), str(tmp_path / "step_0000000001"), Ranks())
    assert one is not None
    assert one.manifest.step == 1
    with pytest.raises(UserError, match="earlier run"):
        find(Folder(tmp_path), "never", Ranks())
    again = find(Folder(tmp_path), "never", Ranks(), restarted=True)
    assert again is not None
    assert again.manifest.step == 2
    with pytest.raises(UserError, match="not a good checkpoint"):
        find(Folder(tmp_path), str(tmp_path / "nothing"), Ranks())


def test_another_model_or_other_data_is_refused(tmp_path: Path) -> None:
    cfg = config("single")
    save_steps(cfg, str(tmp_path), (1,))
    found = find(Folder(tmp_path), "auto", Ranks())
    assert found is not None
    refuse_other_run(found, cfg, {})
    wider = cfg.model_copy(update={"model": cfg.model.model_copy(update={"d_ff": 128})})
    with pytest.raises(UserError, match=r"model\.d_ff: checkpoint 64, run 128"):
        refuse_other_run(found, wider, {})
    seeded = cfg.model_copy(update={"train": cfg.train.model_copy(update={"seed": 9})})
    with pytest.raises(UserError, match=r"train\.seed 0 -> 9"):
        refuse_other_run(found, seeded, {})
    with pytest.raises(UserError, match="data None -> abc"):
        refuse_other_run(found, cfg, {"fingerprint": "abc"})
    allowed = seeded.model_copy(
        update={"checkpoint": cfg.checkpoint.model_copy(update={"changed_data": True})}
    )
    refuse_other_run(found, allowed, {})


def fail_on_rank_1(cfg: RunConfig, root: str) -> tuple[str, str, list[str]]:
    """The second save fails on one rank; both hear of it, and only the first checkpoint is there."""
    engine = build(cfg)
    saver = saver_of(engine, root)
    train(engine, 0, 1)
    saver.save(Progress(1, 1, 1), wait=True)
    if dist.get_rank() == 1:
        saver._write_file = full_disk  # type: ignore[method-assign]
    saver.save(Progress(2, 2, 1))
    said = []
    for call in (lambda: saver.save(Progress(3, 3, 1)), saver.close):
        try:
            call()
            said.append("")
        except MachineFault as error:
            said.append(f"{error.host}{error}")  # a shared disk that is full is no node's fault
    return said[0], said[1], sorted(os.listdir(root))


def full_disk(target: Path, planned: Any) -> None:
    raise OSError(28, "No space left on device", str(target / planned.name))


def test_a_save_that_failed_on_one_rank_is_told_on_every_rank(tmp_path: Path) -> None:
    for first, _, left in run_ranks(2, fail_on_rank_1, config("fsdp2"), str(tmp_path)):
        assert first.startswith("checkpoint of step 2 was not written (rank 1:")
        assert "No space left on device" in first
        assert "the newest complete one is step_0000000001" in first
        assert left == ["latest", "step_0000000001"]


def test_an_error_of_the_storage_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, failed = saver_module.write_pieces, []

    def flaky(path: Path, *rest: Any) -> None:
        if len(failed) < 2:
            failed.append(path)
            raise OSError(5, "Input/output error", str(path))
        real(path, *rest)

    monkeypatch.setattr(saver_module, "write_pieces", flaky)
    save_steps(config("single"), str(tmp_path), (1,))
    assert len(failed) == 2
    assert Folder(tmp_path).names() == ["step_0000000001"]


def test_a_step_goes_on_while_the_save_is_written_and_the_next_save_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The state changes while the disk is stuck; what is written is the state of the save."""
    real, stuck = saver_module.write_pieces, threading.Event()

    def slow(*args: Any) -> None:
        assert stuck.wait(30)
        real(*args)

    monkeypatch.setattr(saver_module, "write_pieces", slow)
    engine = build(config("single"))
    saver = saver_of(engine, tmp_path)
    train(engine, 0, 1)
    want = {t.name: t.data.clone() for t in engine.state()}
    saver.save(Progress(1, 1, 1))
    train(engine, 1, 1)  # not blocked by the save
    assert Folder(tmp_path).names() == []
    second = threading.Thread(target=saver.save, args=(Progress(2, 2, 2),))
    second.start()
    second.join(0.3)
    assert second.is_alive(), "the second save must wait for the memory that the first is written from"
    stuck.set()
    second.join(30)
    saver.close()
    found = find(Folder(tmp_path / "other"), str(tmp_path / "step_0000000001"), Ranks())
    assert found is not None
    load(found, engine, Ranks())
    for t in engine.state():
        assert torch.equal(t.data, want[t.name]), t.name


def test_large_state_is_cut_into_files_and_staged_on_a_local_disk(tmp_path: Path) -> None:
    local, shared = tmp_path / "local", tmp_path / "shared"
    cfg = config("single", local_dir=str(local))
    state = save_steps(cfg, str(shared), (1, 2), file_bytes=8192)
    assert len(list((shared / "step_0000000002").glob("*.safetensors"))) > 3
    assert [p for p in local.rglob("*") if p.is_file()] == [], "the local copies go once they are drained"
    found = find(Folder(shared), "auto", Ranks())
    assert found is not None
    engine = build(config("single"))
    load(found, engine, Ranks())
    got, want = assemble([pieces(engine)]), assemble([state])
    assert all(np.array_equal(got[name], want[name]) for name in want)


def test_convert_and_diff(tmp_path: Path) -> None:
    run_ranks(2, save_steps, config("fsdp2"), str(tmp_path / "run"), (1, 2))
    one = convert(tmp_path / "run", tmp_path / "whole")
    assert diff(one, tmp_path / "run") == []
    lines = diff(tmp_path / "run" / "step_0000000001", one)
    assert lines[0] == "step: 1 and 2"
    assert any(line.startswith("embed.weight: ") and "elements differ" in line for line in lines)
    weights = convert(tmp_path / "run", tmp_path / "weights", weights_only=True)
    assert diff(one, weights)[0].endswith(f"only in {one}")
    with pytest.raises(UserError, match="not an empty folder"):
        convert(tmp_path / "run", tmp_path / "whole")
    convert(tmp_path / "run", tmp_path / "dcp", to="dcp")
    state = {t.name: torch.zeros_like(t.data) for t in build(config("single")).state()}
    import torch.distributed.checkpoint as dcp

    dcp.load(state, checkpoint_id=tmp_path / "dcp", no_dist=True)
    want = assemble(run_ranks(2, save_steps, config("fsdp2"), str(tmp_path / "again"), (2,)))
    assert all(np.array_equal(state[name].numpy(), want[name]) for name in state)


class LatePeer(PeerMemory):
    """The second rank of a node comes to the exchange when the first has long been through it."""

    def exchange(self, step: int, listed: list[list[tuple[str, int]]], ranks: Ranks) -> None:
        if not self.leads:
            time.sleep(0.5)
        super().exchange(step, listed, ranks)


def node_memory(
    cfg: RunConfig, root: str, base: str, remember: bool, peer: type[PeerMemory] = PeerMemory
) -> Any:
    """Ranks 0 and 1 are one node, 2 and 3 the other, each with a memory of its own."""
    ranks = Ranks()
    memory = peer(f"{base}/node{ranks.rank // 2}", root, ranks)
    engine = build(cfg)
    if remember:
        train(engine, 0, BEFORE)
        saver = saver_of(engine, root)
        saver.memory = memory
        saver.save(Progress(BEFORE, BEFORE, engine.updates), disk=False, memory=True)
        saver.close()
        return pieces(engine)
    if ranks.rank == 0:  # alone: another's write would empty it under whoever reads it
        Path(root).mkdir(exist_ok=True)
        (Path(root) / "lineage").write_text("test")
    ranks.barrier()
    found = find(Folder(root), "auto", ranks, memory=memory)
    if found is None:
        return None
    load(found, engine, ranks)
    return pieces(engine), train(engine, found.manifest.data_step, 2), engine.updates


def test_a_copy_waits_for_the_slowest_rank_of_a_node(tmp_path: Path) -> None:
    root, base = str(tmp_path / "ckpt"), str(tmp_path / "memory")
    run_ranks(4, node_memory, config("fsdp4"), root, base, True, LatePeer)
    for node in range(2):
        (kept,) = Path(base, f"node{node}").glob("*/step_*")
        assert {path.name[:10] for path in kept.glob("rank_*")} == {f"rank_{r:05d}" for r in range(4)}


@pytest.mark.parametrize("resumed", ["fsdp4", "fsdp2_tp2_sp"])
def test_a_lost_node_restores_from_its_peers_memory(tmp_path: Path, resumed: str) -> None:
    root, base = str(tmp_path / "ckpt"), str(tmp_path / "memory")
    for node in range(2):
        Path(base, f"node{node}").mkdir(parents=True)
    saved = assemble(run_ranks(4, node_memory, config("fsdp4"), root, base, True))
    shutil.rmtree(f"{base}/node0")
    Path(base, "node0").mkdir()
    assert not list(Path(base, "node0").rglob("*.safetensors"))
    by_rank = run_ranks(4, node_memory, config(resumed), root, base, False)
    got = assemble(state for state, *_ in by_rank)
    assert all(np.array_equal(got[name], want) for name, want in saved.items())
    assert by_rank[0][2] == BEFORE + 2
    assert not Path(root, "step_0000000003").exists(), "nothing of it was on the disk"
    for path in Path(base).rglob("rank_00001_*.safetensors"):
        harm(path)
    assert run_ranks(4, node_memory, config(resumed), root, base, False) == [None] * 4
