"""Every shipped recipe fits the cluster that its first lines name, by dry run of its step, with room to spare.

Layers are alike, so a rank's peak grows by the same bytes with each of them: two short models tell that of the whole
one. As `slow` the whole one is run, too.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import pytest

from support.apart import apart
from trainsys.config.loader import load_run
from trainsys.config.root import config_root
from trainsys.config.run import RunConfig
from trainsys.dryrun.step import dry_step
from trainsys.layout import Layout
from trainsys.planner.cluster import load_cluster

GIB = 2.0**30
MARGIN = 0.10
"""Share of the device's memory. On 79.1 GiB that is 7.9: CUDA's context, libraries and NCCL's buffers, 1.9 as the
planner fits them to published runs (memory.overhead_bytes), 1.2 below which the allocator fails (memory.usable), and the
rest for its rounding and fragmentation, 4% of activations by the same fit (memory.activation), and for what leaves a
stream late."""
FITS = re.compile(r"^# Fits (\d+) GPUs of clusters/([\w-]+)", re.M)
RECIPES = sorted((config_root() / "train").glob("*.yaml"))
ON_GPUS = [file for file in RECIPES if load_run(file).train.device == "cuda"]


def _said(file: Path) -> tuple[int, float]:
    """(GPUs, bytes of each) of the recipe's smallest cluster."""
    match = FITS.search(file.read_text(encoding="utf-8"))
    assert match, f"{file.name} does not say what it fits: # Fits N GPUs of clusters/NAME"
    return int(match[1]), load_cluster(match[2]).machine().mem_bytes


def _short(cfg: RunConfig, layout: Layout, layers: int) -> RunConfig:
    """As many micro-batches as are ever held at once; the same bytes are held with more."""
    rows = layout.data_world * cfg.train.micro_batch * max(2, layout.pp)
    train = {"compile": False, "global_batch": min(rows, cfg.train.global_batch)}
    return cfg.model_copy(
        update={
            "model": cfg.model.model_copy(update={"n_layers": layers}),
            "train": cfg.train.model_copy(update=train),
        }
    )


def _peaks(file: Path, world: int, layers: int) -> list[int]:
    """Peak bytes of the first and the last stage, which hold an embedding, most micro-batches, or the loss."""
    cfg = load_run(file)
    layout = Layout.resolve(cfg.parallel, world)
    ranks = sorted({layout.rank(pp=0), layout.rank(pp=layout.pp - 1)})
    return [dry_step(_short(cfg, layout, layers), layout, rank, as_cuda=True).peak_bytes for rank in ranks]


def _extrapolated(file: Path, world: int) -> list[float]:
    """Bytes, by rank, of the whole model from such of two and of four layers a stage."""
    cfg = load_run(file)
    pp = Layout.resolve(cfg.parallel, world).pp
    fullest = -(-cfg.model.n_layers // pp)
    two, four = apart(partial(_peaks, file, world, 2 * pp)), apart(partial(_peaks, file, world, 4 * pp))
    return [a + (fullest - 2) * (b - a) / 2 for a, b in zip(two, four, strict=True)]


def test_there_are_recipes() -> None:
    assert len(ON_GPUS) >= 4
    assert [f.stem for f in RECIPES if f not in ON_GPUS] == ["demo"]


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("file", ON_GPUS, ids=lambda f: f.stem)
def test_it_fits_the_cluster_that_it_names(file: Path) -> None:
    world, memory = _said(file)
    peak = max(_extrapolated(file, world))
    assert peak <= (1.0 - MARGIN) * memory, f"{peak / GIB:.1f} GiB of {memory / GIB:.1f}"


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_whole_models_peak_is_what_two_short_ones_say() -> None:
    file = config_root() / "train/llama3-8b.yaml"
    world, _ = _said(file)
    (whole,) = apart(partial(_peaks, file, world, load_run(file).model.n_layers))
    assert _extrapolated(file, world) == [pytest.approx(whole, rel=0.005)]
