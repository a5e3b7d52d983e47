"""Whole jobs with something wrong in them: a disk that fills up, batches whose loss is no number or jumps."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from support.apart import apart
from support.jobs import Job
from trainsys.checkpoint.folder import Folder
from trainsys.checkpoint.inspect import verify
from trainsys.config.loader import load_run
from trainsys.data import Loader, Source, build_source
from trainsys.engines.native import NativeEngine
from trainsys.errors import EXIT_MACHINE_FAULT
from trainsys.layout import Layout
from trainsys.parallel.mesh import Mesh
from trainsys.telemetry.events import Message, Step
from trainsys.telemetry.reader import Damage, iter_events
from trainsys.telemetry.recorder import Recorder, here

RUN = """\
name: faults
hardware: H100-SXM-80
model: {{n_layers: 1, d_model: 32, n_heads: 2, d_ff: 64, vocab: 64, max_seq_len: 32}}
parallel: {{dp_shard: 2}}
data: {{source: synthetic, prefetch: 1}}
optim: {{lr: 5e-3, warmup_steps: 2}}
train: {{steps: {steps}, seq_len: 16, global_batch: 4, micro_batch: 2, dtype: fp32, device: cpu, threads: 1}}
telemetry: {{out: {out}, console: "off", log_every: 50}}
checkpoint: {{every: 4}}
resilience: {{{resilience}}}
"""


def write_run(out: Path, steps: int, resilience: str = "") -> Path:
    path = out / "run.yaml"
    path.write_text(RUN.format(steps=steps, out=out, resilience=resilience))
    return path


def events(out: Path, kind: type[Any], rank: int = 0) -> list[Any]:
    """Records of one kind that a rank of the newest attempt left."""
    newest = max(out.glob("faults-*"), key=lambda p: p.stat().st_mtime_ns)
    return [e for e in iter_events(newest / f"events/rank_{rank:05d}.jsonl", Damage()) if isinstance(e, kind)]


# ---- a full disk ----


@pytest.fixture(params=["tmpfs", "ext4"])
def small_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A file system of its own with 2 MiB of room or less."""
    where = tmp_path / "disk"
    where.mkdir()
    if request.param == "tmpfs":
        commands = [["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(where)]]
    else:
        image = tmp_path / "image"
        image.write_bytes(bytes(2 << 20))
        make = ["mkfs.ext4", "-q", "-O", "^has_journal", "-m", "0", "-N", "64", str(image)]
        commands = [make, ["mount", "-o", "loop", str(image), str(where)]]
    for command in commands:
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as error:
            pytest.skip(f"{command[0]}: {error}")
        if done.returncode:
            pytest.skip(f"{command[0]} is not permitted here: {done.stderr.strip()}")
    try:
        yield where
    finally:
        subprocess.run(["umount", "-l", str(where)], check=True)


def test_a_full_disk_is_told_in_a_line_and_costs_only_the_save_that_met_it(
    tmp_path: Path, small_disk: Path
) -> None:
    config, log = write_run(tmp_path, steps=8), tmp_path / "log"
    assert Job(2, config, ["checkpoint.folder=" + str(tmp_path / "roomy")], log).wait() == [0, 0]
    want = {e.step: e.loss for e in events(tmp_path, Step)}
    one = sum(p.stat().st_size for p in (tmp_path / "roomy/step_0000000008").iterdir())
    root = small_disk / "checkpoints"
    root.mkdir()
    # Room for one checkpoint and half of the next.
    ballast = small_disk / "ballast"
    with open(ballast, "wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)) == 4096:
                pass
        except OSError:
            file.truncate(file.tell() - file.tell() % 4096 - (one * 3 // 2 // 4096) * 4096)
    codes = Job(2, config, [f"checkpoint.folder={root}"], log).wait()
    told = [line for line in log.read_text().splitlines() if line.startswith("trainsys: ")]
    assert codes == [EXIT_MACHINE_FAULT] * 2, log.read_text()
    assert len(told) == 2, "each rank tells it in one line"
    assert told[0] == told[1]
    assert "checkpoint of step 8 was not written" in told[0]
    assert re.search(rf"rank \d: {root}/.*: No space left on device", told[0])
    assert "the newest complete one is step_0000000004" in told[0]
    assert Folder(root).names() == ["step_0000000004"]
    assert verify(root) == []
    assert not list(root.glob(".saving-*")), "what was half written is gone: its room is needed"
    ballast.unlink()
    assert Job(2, config, [f"checkpoint.folder={root}"], log).wait() == [0, 0], log.read_text()
    resumed = {e.step: e.loss for e in events(tmp_path, Step)}
    assert sorted(resumed) == [4, 5, 6, 7]
    assert all(resumed[step] == pytest.approx(want[step], rel=1e-6) for step in resumed)


# ---- roll back ----

NAN_BATCH, SPIKE_BATCH = 10, 17


def poison(rank: int) -> None:
    """On rank 1 alone, two batches give logits that are no numbers, and logits far too large."""
    real_step, real_loss, factor = NativeEngine.train_step, NativeEngine._loss, {}

    def train_step(self: NativeEngine, step: int, data: Any, *rest: Any) -> Any:
        factor[0] = {NAN_BATCH: float("nan"), SPIKE_BATCH: 200.0}.get(data.step, 1.0) if rank == 1 else 1.0
        return real_step(self, step, data, *rest)

    def loss(self: NativeEngine, out: torch.Tensor, labels: torch.Tensor) -> Any:
        return real_loss(self, out * factor[0], labels)

    NativeEngine.train_step, NativeEngine._loss = train_step, loss  # type: ignore[method-assign]


def losses_without(config: Path, pairs: list[tuple[int, int]]) -> list[float]:
    """One process that trains (step, batch) ``pairs`` as if there were no others, and saves nothing."""
    cfg = load_run(config, ["parallel.dp_shard=1"])
    mesh = Mesh(Layout.resolve(cfg.parallel, 1), torch.device("cpu"))
    engine = NativeEngine(cfg, mesh, Recorder(None, here(run_id="test", rank=0, world=1), watch_gc=False))
    out, source = [], build_source(cfg)
    for step, batch in pairs:
        loader = Loader(source, mesh.layout, 0, cfg.train.micro_batch, start_step=batch, prefetch=0)
        out.append(float(engine.train_step(step, next(loader)).scalars[0]))
    return out


def test_a_run_goes_back_before_a_bad_batch_and_on_without_it(tmp_path: Path) -> None:
    config = write_run(tmp_path, 20, "nonfinite: rollback, spike: 8.0, on_spike: rollback")
    codes = Job(2, config, [], tmp_path / "log", poison).wait()
    assert codes == [0, 0], (tmp_path / "log").read_text()
    # Saved after every 4th step: back from 10 to 8 and on with batch 11; back from 14 to 12 and on with batch 18.
    kept = (
        [(s, s) for s in range(8)] + [(s, s + 3) for s in range(8, 12)] + [(s, s + 6) for s in range(12, 20)]
    )
    done = [*range(11), *range(8, 15), *range(12, 20)]
    for rank in range(2):
        assert [e.step for e in events(tmp_path, Step, rank)] == done, "every rank goes back alike"
    said = [e.text for e in events(tmp_path, Message)]
    assert any("step 10" in s and "back to step 8, and on with batch 11" in s for s in said), said
    assert any(
        "step 14" in s and "spikes" in s and "back to step 12, and on with batch 18" in s for s in said
    )
    newest = max(tmp_path.glob("faults-*"))
    bad = [json.loads(line) for line in (newest / "anomalies.jsonl").read_text().splitlines()]
    assert [(b["step"], b["data_step"], b["action"]) for b in bad] == [
        (10, NAN_BATCH, "rollback"),
        (14, SPIKE_BATCH, "rollback"),
    ]
    source = build_source(load_run(config, []))
    assert [b["samples"] for b in bad] == [
        source.samples(batch, range(4)).tolist() for batch in (NAN_BATCH, SPIKE_BATCH)
    ]
    manifest = Folder(tmp_path / "checkpoints/faults").read_all()[0][0][1]
    assert (manifest.step, manifest.data_step) == (20, 26)
    # Each step's last loss is that of a run which never saw the bad batches.
    last = {e.step: e.loss for e in events(tmp_path, Step)}
    want = apart(losses_without, config, kept)
    assert [last[s] for s in range(20)] == pytest.approx(want, rel=1e-5)
    assert max(want) - min(want) > 1e-3


# ---- storage that fails ----


def unsteady(fails: int) -> Callable[[int], None]:
    """On rank 1, the storage fails ``fails`` times in a row at batch 3."""

    def prepare(rank: int) -> None:
        real, left = Source.rows, [fails if rank == 1 else 0]

        def rows(self: Source, step: int, rows: Any) -> Any:
            if step == 3 and left[0]:
                left[0] -= 1
                raise OSError(5, "Input/output error", "/data/shard_7")
            return real(self, step, rows)

        Source.rows = rows  # type: ignore[method-assign]

    return prepare


def test_data_that_fails_is_read_again_and_it_is_on_record(tmp_path: Path) -> None:
    config, log = write_run(tmp_path, 5), tmp_path / "log"
    assert Job(2, config, [], log, unsteady(2)).wait() == [0, 0], log.read_text()
    said = [e.text for e in events(tmp_path, Message, rank=1) if e.level == "warning"]
    assert [s.split(": [")[0] for s in said if s.startswith("data: ")] == [
        f"data: step 3: attempt {n} of 4" for n in (1, 2)
    ]
    assert all("/data/shard_7" in s for s in said if s.startswith("data: "))
    assert not any(e.text.startswith("data: ") for e in events(tmp_path, Message, rank=0))


def test_data_that_stays_away_ends_the_run_with_the_file_named(tmp_path: Path) -> None:
    config, log = write_run(tmp_path, 5), tmp_path / "log"
    codes = Job(2, config, [], log, unsteady(99)).wait()
    assert all(codes), "no rank is left behind"
    assert "rank 1: OSError: [Errno 5] Input/output error: '/data/shard_7'" in log.read_text()
