"""A real offline run read back, and servers that are not there: refused, silent, and half dead."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("wandb")

RUN = """
import http.server, os, socket, sys, threading, time
from pathlib import Path
from trainsys.config.run import WandbConfig
from trainsys.telemetry.sinks.base import RunInfo, Sinks
from trainsys.telemetry.sinks.wandb import WandbSink

class HalfDead(http.server.BaseHTTPRequestHandler):
    "Answers a knock, and never a question."
    def do_GET(self): self.send_response(200); self.end_headers()
    def do_POST(self): time.sleep(300)
    def log_message(self, *args): pass

server, folder = sys.argv[1:]
mode = "offline" if server == "offline" else "online"
port = 9
if server == "silent":
    listener = socket.socket(); listener.bind(("127.0.0.1", 0)); listener.listen(64)
    port = listener.getsockname()[1]
if server == "halfdead":
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), HalfDead)
    httpd.daemon_threads = True
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    port = httpd.server_port
os.environ["WANDB_BASE_URL"] = f"http://127.0.0.1:{port}"
config = WandbConfig(mode=mode, project="proj", group="layouts", timeout_s=2.0)
sinks = Sinks([WandbSink(config, lambda text: print("SAY", text, flush=True))], lambda t: print("WARN", t, flush=True))
first = int(os.environ.get("FIRST", 0))
about = {"config": {"parallel": {"tp": 2}}, "tags": ["tiny"], "lineage": "abc123", "first_step": first}
sinks.start(RunInfo("demo", f"run{first}", Path(folder), 4, **about))
began = time.monotonic()
for i in range(first, first + 4):
    times = {"time/forward_s": 0.5, "comm/tp_s": 0.1}
    sinks.step(i, {"train/loss": 4.0 - i, "perf/mfu": 0.1 * i, "memory/peak_gib": i, **times})
print("STEPS", time.monotonic() - began, flush=True)
sinks.finish({"loss_last": 1.0, "mfu": 0.0625, "hfu": 0.125})
print("DONE", flush=True)
"""


def train(server: str, folder: Path, first: int = 0) -> tuple[str, float]:
    """Output and seconds, exit of the process included."""
    keep = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", RUN, server, str(folder)],
        env={**keep, "WANDB_API_KEY": "0" * 40, "HOME": str(folder), "FIRST": str(first)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, time.monotonic() - began


def read_back(folder: Path) -> list[dict[str, Any]]:
    """Every record of the one offline run in ``folder``."""
    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    exe = shutil.which("wandb", path=str(Path(sys.executable).parent)) or "wandb"
    done = subprocess.run(
        [exe, "leet", "inspect", "--json", str(path)], capture_output=True, text=True, timeout=60, check=True
    )
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def test_an_offline_run_holds_everything(tmp_path: Path) -> None:
    out, _ = train("offline", tmp_path)
    assert "WARN" not in out
    assert f"send it later with: wandb sync {tmp_path}/wandb/offline-run-" in out
    text = json.dumps(read_back(tmp_path))
    for name in ("train/loss", "perf/mfu", "time/forward_s", "comm/tp_s", "memory/peak_gib", "loss_last"):
        assert name in text
    for value in ("proj", "layouts", "tiny", "parallel", "demo"):
        assert value in text
    summary = {k: v for r in read_back(tmp_path) if r["type"] == "summary" for k, v in r["summary"]["update"].items()}
    # The run's own, not the mean of what was shown while it trained (0.15).
    assert (summary["mfu"], summary["perf/mfu"], summary["perf/hfu"]) == (0.0625, {"mean": 0.0625}, 0.125)


def test_attempts_are_one_run_of_their_lineage(tmp_path: Path) -> None:
    """Read back from two offline files: the same id, and rows that do not lie over each other."""
    rows: list[int] = []
    for first in (0, 3):
        folder = tmp_path / str(first)
        folder.mkdir()
        train("offline", folder, first)
        (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
        assert path.name == "run-abc123.wandb"
        records = read_back(folder)
        (begun,) = [r["run"] for r in records if r["type"] == "run"]
        assert (begun["run_id"], begun["resume"], begun["display_name"]) == ("abc123", True, "demo")
        rows += [r["history"]["item"]["_step"] for r in records if r["type"] == "history"]
    assert rows == sorted(set(rows))
    assert len(rows) == 8


@pytest.mark.timing
@pytest.mark.parametrize("server", [pytest.param("refused", marks=pytest.mark.slow), "silent", "halfdead"])
def test_without_a_server_the_run_goes_on_offline_and_ends_on_time(tmp_path: Path, server: str) -> None:
    out, seconds = train(server, tmp_path)
    lines = out.splitlines()
    assert any(
        line.startswith("SAY wandb: cannot log online:") and "going on offline" in line for line in lines
    )
    assert "WARN" not in out
    assert lines[-1] == "DONE"
    # Not a speed test: without the bounds it is 90 s and more.
    assert seconds < 30
    assert "train/loss" in json.dumps(read_back(tmp_path))
    if server != "halfdead":
        # A knock at the door tells: no online run was begun that would be left over, half made.
        assert not list(tmp_path.glob("wandb/run-*"))
