"""A checkpoint that DeepSpeed made goes on in the native engine and in any other layout of DeepSpeed, and back."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from deepspeed_cases import AFTER, LAYOUTS, SAVED_AT, config, pieces, resume, save, start, steps, stop
from hypothesis import given
from hypothesis import strategies as st

from support.parity import Trace, assemble, reference
from support.ranks import run_ranks
from trainsys.checkpoint.atoms import AtomReader
from trainsys.checkpoint.deepspeed_universal import export, import_, is_one
from trainsys.checkpoint.folder import Folder
from trainsys.checkpoint.inspect import open_checkpoint, resolve
from trainsys.config.run import RunConfig
from trainsys.errors import UserError
from trainsys.models.boxes import intersect, volume
from trainsys.models.flat import boxes_of_range

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="the deepspeed extra is not installed"
)
SAVING = ("zero2 of 3", "zero3", "tp and sp, zero2", "pp zero1")
RESUMING = ("zero1", "tp and sp, zero3", "pp")


@given(st.lists(st.integers(1, 5), min_size=0, max_size=4), st.data())
def test_boxes_of_a_flat_range_are_that_range(shape: list[int], data: st.DataObject) -> None:
    size = math.prod(shape)
    start = data.draw(st.integers(0, size))
    stop = data.draw(st.integers(start, size))
    boxes = list(boxes_of_range(shape, start, stop))
    assert len(boxes) <= max(1, 2 * len(shape) - 1)
    assert sum(map(volume, boxes)) == stop - start
    numbers = np.arange(size).reshape(shape)
    flat = [numbers[tuple(slice(a, b) for a, b in box)].reshape(-1) for box in boxes]
    assert np.array_equal(np.concatenate(flat) if flat else [], np.arange(start, stop))
    assert all(intersect(a, b) is None for i, a in enumerate(boxes) for b in boxes[:i])


def layered(layout: str) -> RunConfig:
    """Two layers, so that all have one model, and a pipeline has stages."""
    cfg = config(layout)
    return cfg.model_copy(update={"model": cfg.model.model_copy(update={"n_layers": 2})})


def of_engine(engine: str, micro_batch: int = 12, **axes: int) -> RunConfig:
    """The same model on the same batches, by another engine."""
    cfg = layered("zero0")
    return cfg.model_copy(
        update={
            "engine": engine,
            "parallel": type(cfg.parallel)(**{"dp_shard": 1, **axes}),
            "train": cfg.train.model_copy(update={"micro_batch": micro_batch}),
        }
    )


NATIVE = of_engine("native")


@needs_deepspeed
def test_any_engine_and_layout_goes_on_from_any_other(tmp_path: Path) -> None:
    deepspeed = {name: (LAYOUTS[name][0], layered(name)) for name in (*SAVING, *RESUMING)}
    native = {"native": (1, NATIVE)}
    megatron = {}
    if importlib.util.find_spec("megatron"):
        megatron = {
            "megatron, tp and sp": (2, of_engine("megatron", tp=2)),
            "megatron, pp and dp": (4, of_engine("megatron", micro_batch=3, pp=2, dp_shard=2)),
        }
    want = reference(NATIVE, SAVED_AT + AFTER)
    roots, held = {}, {}
    for name, (world, cfg) in {**{n: deepspeed[n] for n in SAVING}, **native, **megatron}.items():
        roots[name] = str(tmp_path / name.replace(" ", "_"))
        ranks = run_ranks(world, save, cfg, roots[name], timeout_s=180)
        held[name] = assemble([r[0] for r in ranks])
        assert held[name].keys() == held[SAVING[0]].keys()
        want.check_losses(ranks[0][1], first=SAVED_AT)
    for world, cfg in [*(deepspeed[n] for n in RESUMING), *native.values(), *megatron.values()]:
        by_rank = run_ranks(world, resume, cfg, list(roots.values()), timeout_s=180)
        for i, name in enumerate(roots):
            got = assemble([rank[i][0] for rank in by_rank])
            for atom, data in held[name].items():
                assert np.array_equal(got[atom], data), f"{atom} of {name} is not what was saved"
            want.check_losses(by_rank[0][i][1], first=SAVED_AT)


def write_theirs(layout: str, root: str) -> list[Any]:
    """A checkpoint as DeepSpeed saves it, and what it held."""
    cfg = layered(layout)
    engine, mesh = start(cfg)
    steps(engine, mesh, 0, 3, Trace())
    engine.built.ds.save_checkpoint(root, tag="mine")  # type: ignore[attr-defined]
    held = pieces(engine.state())
    stop(engine)
    return held


def make_universal(root: str) -> None:
    """DeepSpeed's own conversion."""
    import contextlib
    import io
    from types import SimpleNamespace

    from deepspeed.checkpoint.ds_to_universal import main

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        main(SimpleNamespace(
            input_folder=f"{root}/mine", output_folder=f"{root}/universal", num_extract_workers=1,
            num_merge_workers=1, keep_temp_folder=False, strict=True, inject_missing_state=True,
        ))  # fmt: skip


def read_theirs(layout: str, root: str) -> tuple[list[Any], float]:
    """What DeepSpeed makes of a universal checkpoint, and its next loss."""
    from trainsys.engines.deepspeed import build

    real = build.settings
    build.settings = lambda *args: {**real(*args), "checkpoint": {"load_universal": True}}
    try:
        engine, mesh = start(layered(layout))
    finally:
        build.settings = real
    engine.built.ds.load_checkpoint(root)  # type: ignore[attr-defined]
    held = pieces(engine.state())
    after = Trace()
    steps(engine, mesh, 3, 1, after)
    stop(engine)
    return held, after.losses[0]


@needs_deepspeed
@pytest.mark.parametrize("layout", ["zero1", "zero3"])
def test_its_own_universal_checkpoint_is_read(layout: str, tmp_path: Path) -> None:
    ranks = run_ranks(2, write_theirs, layout, str(tmp_path))
    run_ranks(1, make_universal, str(tmp_path))
    assert is_one(tmp_path)
    want = assemble(ranks)
    checkpoint = import_(tmp_path, tmp_path / "ours")
    manifest = open_checkpoint(checkpoint)
    assert (manifest.step, manifest.updates) == (3, 3)
    reader = AtomReader(checkpoint, manifest)
    assert manifest.atoms.keys() == want.keys()
    for name, data in want.items():
        assert np.array_equal(reader.read(name).numpy(), data), name


@needs_deepspeed
def test_it_reads_the_universal_checkpoint_that_we_write(tmp_path: Path) -> None:
    run_ranks(2, save, layered("zero3"), str(tmp_path / "ours"))
    folder = export(resolve(tmp_path / "ours"), tmp_path / "theirs")
    assert folder.name == "global_step3"
    saved, _ = run_ranks(1, resume, NATIVE, [str(tmp_path / "ours")])[0][0]
    want = reference(NATIVE, SAVED_AT + AFTER)
    for layout in ("zero2 of 3", "zero3"):
        by_rank = run_ranks(LAYOUTS[layout][0], read_theirs, layout, str(tmp_path / "theirs"))
        got = assemble([held for held, _ in by_rank])
        for name, data in assemble([saved]).items():
            assert np.array_equal(got[name], data), f"{layout}: {name}"
        want.check_losses([by_rank[0][1]], first=SAVED_AT)


def test_there_and_back_is_the_same_to_the_bit(tmp_path: Path) -> None:
    run_ranks(1, save, NATIVE, str(tmp_path / "ours"))
    saved = resolve(tmp_path / "ours")
    export(saved, tmp_path / "theirs")
    back = import_(tmp_path / "theirs", tmp_path / "back")
    a, b = open_checkpoint(saved), open_checkpoint(back)
    assert (a.step, a.data_step, a.updates, a.config) == (b.step, b.data_step, b.updates, b.config)
    ours, theirs = AtomReader(saved, a), AtomReader(back, b)
    atoms = [name for name in a.atoms if not name.startswith("@")]
    assert sorted(atoms) == sorted(b.atoms)
    for name in atoms:
        assert np.array_equal(ours.read(name).numpy(), theirs.read(name).numpy()), name
    assert Folder(tmp_path / "back").names() == ["step_0000000003"]


def test_what_is_no_universal_checkpoint_is_told_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "zero").mkdir()
    with pytest.raises(UserError, match="ds_to_universal"):
        import_(tmp_path, tmp_path / "ours")
    bad = tmp_path / "zero" / "embed.weight"
    bad.mkdir()
    (bad / "fp32.pt").write_bytes(b"no pickle")
    with pytest.raises(UserError, match=r"fp32\.pt: not a file that torch\.save wrote"):
        import_(tmp_path, tmp_path / "ours")


def test_a_universal_checkpoint_runs_no_code(tmp_path: Path) -> None:
    import torch

    class Bomb:
        def __reduce__(self) -> Any:
            return (open, (str(tmp_path / "went off"), "w"))

    folder = tmp_path / "zero" / "norm.weight"
    folder.mkdir(parents=True)
    torch.save({"param": torch.ones(3), "extra": Bomb()}, folder / "fp32.pt")
    checkpoint = import_(tmp_path, tmp_path / "ours")
    assert not (tmp_path / "went off").exists()
    assert AtomReader(checkpoint, open_checkpoint(checkpoint)).read("norm.weight").tolist() == [1, 1, 1]


def test_flat_tensors_of_stage_3_get_their_shapes_back(tmp_path: Path) -> None:
    import torch

    folder = tmp_path / "zero" / "module.embed.weight"
    folder.mkdir(parents=True)
    torch.save({"param": torch.arange(7.0)}, folder / "fp32.pt")  # six and what ZeRO padded
    header = {"param_shapes": [{"module.embed.weight": torch.Size([2, 3])}]}
    torch.save(header, tmp_path / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    checkpoint = import_(tmp_path, tmp_path / "ours")
    got = AtomReader(checkpoint, open_checkpoint(checkpoint)).read("embed.weight")
    assert got.tolist() == [[0, 1, 2], [3, 4, 5]]
