"""The matmul ceiling: what is counted, stored, and agreed on by the ranks of a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from trainsys.bench import matmul, memory
from trainsys.errors import UserError
from trainsys.hardware import Measurement, MeasurementKey, load_measurement, store_measurement

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _own_store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRAINSYS_CACHE", str(tmp_path))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_work_is_what_is_counted(dtype: str) -> None:
    work = matmul._make(dtype, 0, CPU)
    with FlopCounterMode(display=False) as counter:
        out = work.run()
    assert isinstance(out, torch.Tensor)
    assert out.dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    assert counter.get_total_flops() == work.amount
    assert out.abs().sum() > 0


def test_measured_stored_and_printed(capsys: pytest.CaptureFixture[str]) -> None:
    matmul.run_cli(["fp32"], [2], seconds=0.02, as_json=True)
    (row,) = json.loads(capsys.readouterr().out)
    found = load_measurement(MeasurementKey.here("fp32", 2, row["key"]["threads"]))
    assert found is not None
    assert found == Measurement.model_validate_json(json.dumps(row))
    assert found.flops_per_s > 1e6


def test_the_table_shows_the_rate_together_and_each(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    key = MeasurementKey.here("bf16", 4, 1)
    row = Measurement(key=key, flops_per_s=8.2e10, shape=(256, 512, 1024), seconds=1.0)
    monkeypatch.setattr(matmul, "measure_matmul", lambda *_: row)
    matmul.run_cli(["bf16"], [4])
    out = capsys.readouterr().out
    for shown in ("bf16", "82.0", "20.5", "256x512x1024", key.device.split()[0]):
        assert shown in out


def test_memory_copy(capsys: pytest.CaptureFixture[str]) -> None:
    memory.run_cli([2], seconds=0.02, as_json=True)
    (row,) = json.loads(capsys.readouterr().out)
    assert row["processes"] == 2
    assert row["bytes_per_s"] > 1e6
    work = memory._make(0, CPU)
    assert work.amount == 2 * (1 << 26)
    assert work.run().sum(dtype=torch.int64) == 1 << 26  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"dtype": "fp8"}, "fp32, bf16, fp16"),
        ({"processes": 0}, "positive"),
        ({"seconds": 0.0}, "positive"),
        ({"device": "tpu"}, "cpu, cuda"),
        ({"device": "cuda", "processes": 4096}, "torch sees"),
    ],
)
def test_bad_arguments_are_one_line(arguments: dict[str, object], says: str) -> None:
    with pytest.raises(UserError, match=says) as error:
        matmul.measure_matmul(**({"dtype": "fp32"} | arguments))  # type: ignore[arg-type]
    assert "\n" not in str(error.value)
    if "dtype" not in arguments:
        with pytest.raises(UserError, match=says):
            memory.measure_copy(**arguments)  # type: ignore[arg-type]


class Ranks:
    """What rank 0 sees of ``world`` ranks that do as it does, of which ``know`` find a stored ceiling."""

    def __init__(self, world: int, know: int) -> None:
        self.world, self.know, self.barriers, self.sums = world, know, 0, 0

    def barrier(self) -> None:
        self.barriers += 1

    def total(self, value: float) -> float:
        self.sums += 1
        return value * (self.know if self.sums == 2 and value == 1.0 else self.world)


def stored(processes: int, flops_per_s: float) -> None:
    key = MeasurementKey.here("fp32", processes, torch.get_num_threads())
    store_measurement(Measurement(key=key, flops_per_s=flops_per_s, shape=(1, 1, 1), seconds=1.0))


def ceiling(ranks: Ranks, processes: int, store: bool = False, cores: int | None = None) -> Measurement:
    return matmul.ceiling_in_run(
        "fp32", processes, barrier=ranks.barrier, total=ranks.total, device=CPU, store=store, seconds=0.03, cores=cores
    )


def test_a_run_measures_all_ranks_together_and_keeps_it() -> None:
    ranks = Ranks(world=4, know=0)
    first = ceiling(ranks, processes=4, store=True)
    assert ranks.barriers == 3  # one before each shape
    assert first.key.processes == 4
    assert first.label.startswith("measured here (matmul fp32 4 procs")
    again = ceiling(later := Ranks(world=4, know=4), processes=4)
    assert later.barriers == 0
    assert again.flops_per_s == pytest.approx(first.flops_per_s)


@pytest.mark.parametrize(("cores", "together"), [(8, 12e9), (4, 12e9), (2, 6e9)])
def test_the_ceiling_is_the_best_shape_summed_over_ranks(
    monkeypatch: pytest.MonkeyPatch, cores: int, together: float
) -> None:
    """Four ranks of a thread each; on two cores they take turns."""
    rates = iter((1e9, 3e9, 2e9))
    monkeypatch.setattr(matmul, "fastest_rate", lambda _: next(rates))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    found = ceiling(Ranks(world=4, know=0), processes=4, cores=cores)
    assert found.flops_per_s == together
    assert found.shape == (512, 512, 512)


def test_a_stored_ceiling_of_a_host_is_summed_over_hosts() -> None:
    stored(processes=4, flops_per_s=1e11)
    both = ceiling(Ranks(world=8, know=8), processes=4)
    assert both.flops_per_s == pytest.approx(2e11)
    assert both.key.processes == 8


def test_all_measure_if_one_must_and_several_hosts_store_nothing() -> None:
    stored(processes=4, flops_per_s=1e11)
    ranks = Ranks(world=8, know=7)
    found = ceiling(ranks, processes=4, store=True)
    assert ranks.barriers == 3
    assert found.flops_per_s != 2e11
    key = MeasurementKey.here("fp32", 8, torch.get_num_threads())
    assert load_measurement(key) is None
