"""The checks of `profiling/gpu_day.py` on a CPU, so that minutes on a GPU are not spent on typos; and what runs them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

PROFILING = Path(__file__).resolve().parents[1] / "profiling"


@pytest.fixture
def day(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(PROFILING))
    import gpu_day

    yield gpu_day
    for name in [n for n in sys.modules if n.split(".")[0] in ("gpu_day", "gpu_checks")]:
        del sys.modules[name]


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "gpu_day.jsonl").read_text().splitlines()]


@pytest.mark.timeout(1500)
def test_all_of_it_runs_on_a_cpu_and_only_cuda_is_left_out(tmp_path: Path, day: ModuleType) -> None:
    command = [sys.executable, str(PROFILING / "gpu_day.py"), str(tmp_path)]
    command += ["--device", "cpu", "--tiny", "--budget", "1400"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = lines(tmp_path)
    assert [row["check"] for row in rows] == [check.name for check in day.CHECKS]
    skipped = {row["check"]: row["why"] for row in rows if row["outcome"] == "skipped"}
    assert skipped == {check.name: "needs CUDA" for check in day.CHECKS if check.needs_cuda}
    assert sorted(skipped) == ["catalogue", "gpu_tests", "marks"]
    assert all(row["found"] for row in rows if row["outcome"] == "passed")
    # A second call has nothing left to do.
    assert day.main([str(tmp_path), "--device", "cpu", "--tiny"]) == 0
    assert lines(tmp_path) == rows


def made(day: ModuleType, **runs: Any) -> list[Any]:
    return [day.Check(name, 30.0, run) for name, run in runs.items()]


def test_each_check_fails_alone(tmp_path: Path, day: ModuleType) -> None:
    def wrong(at: Any) -> dict[str, Any]:
        raise AssertionError("7 is not 8")

    def broken(at: Any) -> dict[str, Any]:
        raise KeyError("gone")

    def skips(at: Any) -> dict[str, Any]:
        raise day.Skipped("no such kernel")

    def dies(at: Any) -> dict[str, Any]:
        os.kill(os.getpid(), signal.SIGKILL)
        return {}

    checks = made(day, wrong=wrong, broken=broken, skips=skips, dies=dies, good=lambda at: {"x": 1.5})
    assert day.run_all(checks, day.Setting(False, True), tmp_path, 300.0) == 1
    rows = {row["check"]: (row["outcome"], row.get("why", row.get("found"))) for row in lines(tmp_path)}
    assert rows == {
        "wrong": ("failed", "7 is not 8"),
        "broken": ("failed", "KeyError: 'gone'"),
        "skips": ("skipped", "no such kernel"),
        "dies": ("failed", "died with exit code -9"),
        "good": ("passed", {"x": 1.5}),
    }
    assert "KeyError" in (tmp_path / "broken.log").read_text()


def test_a_check_that_hangs_is_killed_with_what_it_started(tmp_path: Path, day: ModuleType) -> None:
    def hangs(at: Any) -> dict[str, Any]:
        child = subprocess.Popen(["sleep", "600"])
        (tmp_path / "pid").write_text(str(child.pid))
        time.sleep(600)
        return {}

    result = day.run_check(day.Check("hangs", 2.0, hangs), day.Setting(False, True), tmp_path, 2.0)
    assert (result["outcome"], result["why"]) == ("failed", "no answer within 2 s")
    stat = Path(f"/proc/{(tmp_path / 'pid').read_text()}/stat")
    deadline = time.monotonic() + 30
    while stat.exists() and stat.read_text().split()[2] != "Z":
        assert time.monotonic() < deadline, "what it started lives on"
        time.sleep(0.05)


def test_a_later_call_goes_on_where_the_last_one_ended(tmp_path: Path, day: ModuleType) -> None:
    at = day.Setting(False, True)
    ran = tmp_path / "ran"

    def note(name: str) -> Any:
        def run(at: Any) -> dict[str, Any]:
            with ran.open("a") as file:
                file.write(name)
            return {"name": name}

        return run

    checks = made(day, a=note("a"), b=note("b"), c=note("c"))
    assert day.run_all(checks[:1], at, tmp_path, 300.0) == 0
    assert day.run_all(checks, at, tmp_path, 0.0) == 0
    assert [row.get("why") for row in lines(tmp_path)] == [None, "no time left", "no time left"]
    with (tmp_path / "gpu_day.jsonl").open("a") as file:
        file.write('{"check": "b", "outcome": "pas')  # killed while it wrote
    assert day.run_all(checks, at, tmp_path, 300.0) == 0
    assert ran.read_text() == "abc"
    answers = day.answered(tmp_path / "gpu_day.jsonl")
    assert [(n, r["outcome"]) for n, r in answers.items()] == [("a", "passed"), ("b", "passed"), ("c", "passed")]


def test_what_cannot_be_run_is_one_line_and_exit_code_2(
    tmp_path: Path, day: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(day, "cuda_devices", lambda: 0)
    (tmp_path / "gpu_day.jsonl").write_text('{"check": "marks", "device": "cuda"}\n')
    for options, says in (
        ([], "this machine shows no CUDA device; use --device cpu --tiny"),
        (["--device", "cpu"], "--device cpu goes with --tiny"),
        (["--device", "cpu", "--tiny"], "has answers of cuda; take another folder"),
        (["--only", "mfu_eger"], "no check mfu_eger; there are environment,"),
    ):
        with pytest.raises(SystemExit) as ended:
            day.main([str(tmp_path), *options])
        assert ended.value.code == 2
        assert says in capsys.readouterr().err.splitlines()[-1]


def test_a_wrong_curve_and_one_that_does_not_learn_are_told(day: ModuleType) -> None:
    from gpu_checks.right import compare

    assert compare("same", [5.0, 4.0], [5.0, 4.0], 1e-3) == 0.0
    with pytest.raises(AssertionError, match=r"far: 1.00e-01 from the CPU's losses"):
        compare("far", [5.0, 4.1], [5.0, 4.0], 1e-3)
    with pytest.raises(AssertionError, match="nothing is learnt"):
        compare("flat", [5.0, 5.0], [5.0, 5.0], 1e-3)
    with pytest.raises(AssertionError, match="nan"):
        compare("nan", [5.0, float("nan")], [5.0, 4.0], 1e-3)


def test_reads_of_the_device_are_counted_with_their_place(day: ModuleType) -> None:
    import torch
    from gpu_checks.right import HostReads

    from trainsys.optim.norm import clip_

    with HostReads("cpu") as reads:
        clip_([torch.ones(4)], torch.tensor(2.0), 1.0)  # on the CPU it looks at the factor
        torch.ones(4).nonzero()
    assert sum(reads.places.values()) == 3, reads.places
    assert sorted(p.split(":")[0] for p in reads.places) == [
        "_local_scalar_dense at norm.py", "_local_scalar_dense at norm.py", "nonzero at ?",
    ]  # fmt: skip
    with HostReads("cuda") as reads:
        float(torch.ones(()))
    assert not reads.places, "a number of the CPU is not waited for"


def test_kernels_belong_to_the_phase_that_launched_them(day: ModuleType) -> None:
    """On a GPU, which runs behind: by the launch, not by when they run."""
    from gpu_checks.device_time import MARK, busy_by_phase

    def span(cat: str, name: str, ts: float, dur: float, **args: int) -> dict[str, Any]:
        return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "tid": 1, "args": args}

    events = [
        span("user_annotation", MARK + "forward", 0, 10), span("user_annotation", MARK + "backward", 10, 10),
        span("user_annotation", MARK + "data", 2, 2),
        span("cuda_runtime", "cudaLaunchKernel", 5, 1, correlation=1), span("kernel", "gemm", 12, 30, correlation=1),
        span("cuda_runtime", "cudaLaunchKernel", 3, 1, correlation=2), span("kernel", "copy", 42, 4, correlation=2),
        span("cuda_runtime", "cudaLaunchKernel", 15, 1, correlation=3), span("kernel", "gemm", 50, 7, correlation=3),
    ]  # fmt: skip
    assert busy_by_phase(events, on_device=True) == {"forward": 30e-6, "data": 4e-6, "backward": 7e-6}
    ops = [span("cpu_op", "linear", 1, 8), span("cpu_op", "mm", 2, 5), span("cpu_op", "mm", 11, 3)]
    assert busy_by_phase([*events, *ops], on_device=False) == {"forward": 8e-6, "backward": 3e-6}
