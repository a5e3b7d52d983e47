"""No sink can slow or stop a step; the file, TensorBoard and Prometheus sinks say what they were told."""

import json
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from trainsys.config.run import TelemetryConfig, WandbConfig
from trainsys.errors import UserError
from trainsys.telemetry.events import Finding
from trainsys.telemetry.sinks import prometheus
from trainsys.telemetry.sinks.base import RunInfo, Sinks
from trainsys.telemetry.sinks.build import build_sinks, refuse_missing
from trainsys.telemetry.sinks.jsonl import JsonlSink
from trainsys.telemetry.sinks.prometheus import PrometheusSink
from trainsys.telemetry.sinks.tensorboard import TensorBoardSink


class Notebook:
    """Remembers its calls; ``fail`` names a method that raises, ``gate`` holds every step."""

    def __init__(self, name: str = "notebook", fail: str = "", gate: threading.Event | None = None) -> None:
        self.name = name
        self.calls: list[tuple[str, Any]] = []
        self._fail = fail
        self._gate = gate

    def _note(self, method: str, what: Any) -> None:
        self.calls.append((method, what))
        if method == self._fail:
            raise ConnectionError("the line\nis cut")

    def start(self, info: RunInfo) -> None:
        self._note("start", info.name)

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._gate is not None:
            self._gate.wait()
        self._note("step", step)

    def finding(self, finding: Finding) -> None:
        self._note("finding", finding.title)

    def message(self, level: str, text: str) -> None:
        self._note("message", text)

    def finish(self, summary: Mapping[str, Any]) -> None:
        self._note("finish", summary)


def found(news: Any, until: int | None = None, rank: int = 3, cause: str = "device") -> Finding:
    return Finding(step=2, kind="rank", news=news, title=f"rank {rank} computes slowly", evidence="z = 9", advice="look",
                   cause=cause, phase="compute", ranks=[rank], hosts=["n1"], since=1, until=until, cost_s=0.004,
                   share=0.1)  # fmt: skip


def info(run_dir: Path) -> RunInfo:
    return RunInfo(name="demo", run_id='r"1', run_dir=run_dir, steps=10)


def run(sinks: Sinks, run_dir: Path, steps: int = 3) -> None:
    sinks.start(info(run_dir))
    for i in range(steps):
        sinks.step(i, {"train/loss": 3.0 - i, "perf/mfu": 0.5})
    sinks.finding(found("new"))
    sinks.message("info", "hello")
    sinks.finish({"loss": 1.0})


def test_calls_come_in_order(tmp_path: Path) -> None:
    one, two = Notebook(), Notebook()
    warnings: list[str] = []
    run(Sinks([one, two], warnings.append), tmp_path)
    expected = [
        ("start", "demo"),
        ("step", 0),
        ("step", 1),
        ("step", 2),
        ("finding", "rank 3 computes slowly"),
        ("message", "hello"),
        ("finish", {"loss": 1.0}),
    ]
    assert one.calls == two.calls == expected
    assert warnings == []


@pytest.mark.parametrize("method", ["start", "step", "finding", "message", "finish"])
def test_a_sink_that_raises_is_off_with_one_warning(tmp_path: Path, method: str) -> None:
    bad, good = Notebook("bad", fail=method), Notebook()
    warnings: list[str] = []
    run(Sinks([bad, good], warnings.append), tmp_path)
    assert len(good.calls) == 7
    assert bad.calls[-1][0] == method
    assert [m for m, _ in bad.calls].count(method) == 1
    assert warnings == [
        f"bad is off for the rest of the run: {method} failed: ConnectionError: the line is cut"
    ]


@pytest.mark.timing
def test_a_slow_sink_loses_steps_instead_of_holding_the_run(tmp_path: Path) -> None:
    gate = threading.Event()
    slow, good = Notebook("slow", gate=gate), Notebook()
    warnings: list[str] = []
    sinks = Sinks([slow, good], warnings.append, depth=4)
    sinks.start(info(tmp_path))
    for i in range(50):  # would never end, were a step to wait for the sink
        sinks.step(i, {})
        while len(good.calls) < i + 2:
            time.sleep(0.001)
    gate.set()
    sinks.finish({})
    assert len(good.calls) == 52
    kept = [what for method, what in slow.calls if method == "step"]
    assert 4 <= len(kept) <= 6
    assert slow.calls[-1][0] == "finish"
    assert warnings == [f"slow could not keep up: {50 - len(kept)} steps are missing there"]


@pytest.mark.timing
def test_a_sink_that_hangs_is_left_behind_and_the_console_hears_of_it(tmp_path: Path) -> None:
    console = Notebook("console")
    gate = threading.Event()
    stuck = Notebook("stuck", gate=gate)
    sinks = Sinks([console, stuck], lambda text: sinks.message("warning", text))
    sinks.start(info(tmp_path))
    sinks.step(0, {})
    sinks.finish({}, timeout_s=0.2)
    gate.set()
    assert ("message", "stuck did not finish within 0 s: left behind") in console.calls
    assert console.calls[-1][0] == "finish"


def test_jsonl(tmp_path: Path) -> None:
    sink = JsonlSink()
    sink.start(info(tmp_path))
    sink.step(0, {"train/loss": 2.5})
    sink.step(1, {"train/loss": float("nan"), "perf/mfu": float("inf")})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()  # there before the end
    sink.finish({})
    assert [json.loads(line) for line in lines] == [
        {"step": 0, "train/loss": 2.5},
        {"step": 1, "train/loss": "nan", "perf/mfu": "inf"},
    ]


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(Sinks([TensorBoardSink()], pytest.fail), tmp_path / "run")
    board = EventAccumulator(str(next(tmp_path.glob("tensorboard/*"))))
    board.Reload()
    assert sorted(board.Tags()["scalars"]) == ["blame/rank_3_compute_ms", "perf/mfu", "train/loss"]
    assert [(e.step, e.value) for e in board.Scalars("blame/rank_3_compute_ms")] == [(2, 4.0)]
    (said,) = board.Tensors("blame")
    assert said.tensor_proto.string_val == [b"new: rank 3 computes slowly; 4.0 ms per step. z = 9. look"]
    assert [(e.step, e.value) for e in board.Scalars("train/loss")] == [(0, 3.0), (1, 2.0), (2, 1.0)]


def test_tensorboard_goes_on_with_the_curve_of_an_earlier_attempt(tmp_path: Path) -> None:
    """Steps that were trained again are there once."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for attempt, steps in enumerate((range(4), range(2, 6))):
        sink = TensorBoardSink()
        sink.start(RunInfo("n", f"n-{attempt}", tmp_path / f"n-{attempt}", 6, lineage="n1", first_step=steps[0]))
        for step in steps:
            sink.step(step, {"loss": 10.0 * attempt + step})
        sink.finish({})
    board = EventAccumulator(str(tmp_path / "tensorboard" / "n1"))
    board.Reload()
    assert [(e.step, e.value) for e in board.Scalars("loss")] == [(0, 0), (1, 1), (2, 12), (3, 13), (4, 14), (5, 15)]


def test_tensorboard_needs_no_torch(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    code = f"""
import sys
from pathlib import Path
from trainsys.telemetry.events import Finding
from trainsys.telemetry.sinks.base import RunInfo
from trainsys.telemetry.sinks.tensorboard import TensorBoardSink
s = TensorBoardSink()
s.start(RunInfo("n", "i", Path({str(tmp_path)!r}), 1)); s.step(0, {{"a": 1.0}})
s.finding(Finding(step=0, kind="run", news="new", title="t")); s.finish({{}})
print([m for m in ("torch", "tensorflow") if m in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_prometheus(tmp_path: Path) -> None:
    sink = PrometheusSink(0, host="127.0.0.1")
    sink.start(info(tmp_path))
    url = f"http://127.0.0.1:{sink.port}"
    sink.step(7, {"train/loss": 2.5, "perf/mfu": float("nan"), "comm/tp_s": float("inf")})
    with urllib.request.urlopen(f"{url}/metrics", timeout=5) as answer:
        assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        text = answer.read().decode()
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(f"{url}/else", timeout=5)
    sink.finish({})
    labels = '{run="r\\"1",name="demo"}'
    assert text.splitlines() == [
        "# TYPE trainsys_step gauge",
        f"trainsys_step{labels} 7.0",
        "# TYPE trainsys_train_loss gauge",
        f"trainsys_train_loss{labels} 2.5",
        "# TYPE trainsys_perf_mfu gauge",
        f"trainsys_perf_mfu{labels} NaN",
        "# TYPE trainsys_comm_tp_s gauge",
        f"trainsys_comm_tp_s{labels} +Inf",
    ]
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(url, timeout=5)


def test_prometheus_shows_open_findings_and_no_more_of_them_than_it_may(tmp_path: Path) -> None:
    sink = PrometheusSink(0, host="127.0.0.1")
    sink.start(info(tmp_path))
    sink.step(1, {"train/loss": 2.5})

    def shown() -> list[str]:
        with urllib.request.urlopen(f"http://127.0.0.1:{sink.port}/metrics", timeout=5) as answer:
            return [line for line in answer.read().decode().splitlines() if "finding_cost" in line]

    assert shown() == []
    sink.finding(found("new"))
    sink.finding(found("worse", cause="cpu_quota"))
    who = 'run="r\\"1",name="demo",kind="rank",ranks="3",phase="compute"'
    assert shown() == [
        "# TYPE trainsys_finding_cost_seconds gauge",
        f'trainsys_finding_cost_seconds{{{who},cause="cpu_quota"}} 0.004',
    ]
    sink.finding(found("over", until=9, cause=""))
    assert shown() == []
    for rank in range(2 * prometheus.MOST_OPEN):
        sink.finding(found("new", rank=rank))
    assert len(shown()) == 1 + prometheus.MOST_OPEN
    sink.finish({})


@pytest.mark.parametrize(("asked", "listens"), [({}, "127.0.0.1"), ({"prometheus_address": "0.0.0.0"}, "0.0.0.0")])
def test_prometheus_listens_where_it_is_told_and_else_on_this_host_alone(
    tmp_path: Path, asked: dict[str, Any], listens: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard = []
    monkeypatch.setattr(prometheus, "ThreadingHTTPServer", lambda address, handler: heard.append(address[0]))
    config = TelemetryConfig(console="off", prometheus_port=9400, **asked)
    run(build_sinks(config, [].append), tmp_path)
    assert heard == [listens]


def test_a_taken_port_costs_the_endpoint_only(tmp_path: Path) -> None:
    first = PrometheusSink(0, host="127.0.0.1")
    first.start(info(tmp_path))
    warnings: list[str] = []
    run(Sinks([PrometheusSink(first.port, host="127.0.0.1")], warnings.append), tmp_path)
    first.finish({})
    assert len(warnings) == 1
    assert "prometheus is off for the rest of the run: start failed: OSError" in warnings[0]


@pytest.mark.parametrize(
    ("extra", "config"),
    [("wandb", {"wandb": {"mode": "offline"}}), ("tensorboard", {"tensorboard": True})],
)
def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, extra: str, config: dict[str, Any]) -> None:
    wanted = TelemetryConfig.model_validate(config)
    refuse_missing(wanted)
    monkeypatch.setitem(sys.modules, extra, None)
    with pytest.raises(UserError, match=rf"needs {extra}: pip install 'trainsys\[{extra}\]'"):
        refuse_missing(wanted)
    refuse_missing(TelemetryConfig())


def test_build_makes_what_the_config_asks_for() -> None:
    def names(**config: object) -> list[str]:
        sinks = build_sinks(TelemetryConfig.model_validate(config), pytest.fail)
        made = [lane.sink.name for lane in sinks._lanes]
        for lane in sinks._lanes:
            lane.failed = True
            lane.close({})
        return made

    assert names() == ["metrics.jsonl", "console"]
    assert names(console="off", tensorboard=True, prometheus_port=9999) == [
        "metrics.jsonl",
        "tensorboard",
        "prometheus",
    ]
    assert names(console="off", wandb=WandbConfig(mode="offline")) == ["metrics.jsonl", "wandb"]
