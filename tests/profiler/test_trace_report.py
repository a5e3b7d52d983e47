"""The outputs: text, JSON and its schema, page, annotated timeline, diff, and the entry point's refusals."""

from __future__ import annotations

import gzip
import json
import re
import shutil
import subprocess
import sys

import pytest

from trainsys.config.model import ModelConfig
from trainsys.errors import UserError
from trainsys.profiler.trace.diff import compare_runs
from trainsys.profiler.trace.main import analyse, run
from trainsys.profiler.trace.page import MAX_BYTES, page
from trainsys.profiler.trace.report import json_schema, to_json
from trainsys.profiler.trace.synthetic import Job, write_job


def test_text_and_json(slow_job, tmp_path):
    _, timeline, folder = slow_job
    text = run([folder], json=tmp_path / "r.json")
    assert "rank 2 is" in text
    assert "Critical path of rank 2" in text
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["schema"] == "trainsys.trace/1"
    assert report["ranks"][1]["breakdown"]["whole"]["matmul"] == timeline.terms(1)["matmul"]
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.validate(report, json_schema())
    report["ranks"][0]["events"] = "many"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(report, json_schema())


def test_page_is_self_contained_and_small(tmp_path):
    write_job(Job(ranks=40, steps=10, layers=3, slow={7: 1.2}), tmp_path)
    text = page(analyse([tmp_path]))
    assert len(text.encode()) < MAX_BYTES
    assert not re.search(r"""(?:src|href)\s*=|@import|url\(|https?://(?!www\.w3\.org/2000/svg)""", text)
    data = re.search(r'<script id="report" type="application/json">(.*?)</script>', text, re.S)[1]
    assert len(json.loads(data)["ranks"]) == 40


def test_page_of_very_many_ranks_stays_under_a_megabyte(slow_job):
    report = analyse([slow_job[2]])
    report.ranks *= 2000
    text = page(report)
    assert len(text.encode()) < MAX_BYTES
    assert "left out of this page" in text


def test_hostile_names_cannot_leave_the_script_element(tmp_path):
    event = {
        "ph": "X",
        "cat": "kernel",
        "name": "</script><img src=x onerror=alert(1)><!--",
        "pid": 0,
        "tid": 7,
        "ts": 1,
        "dur": 2,
        "args": {},
    }
    (tmp_path / "a.json").write_text(json.dumps({"traceEvents": [event]}))
    text = page(analyse([tmp_path / "a.json"]))
    assert "<img" not in text
    assert text.count("</script>") == 2


def test_page_draws_in_a_browser(slow_job, tmp_path, shared):
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium here")
    run([slow_job[2], shared / "flight_recorder/lock_gil_1st"], html=tmp_path / "p.html")
    out = subprocess.run(
        [
            browser,
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--dump-dom",
            f"file://{tmp_path}/p.html",
        ],
        capture_output=True,
        text=True,
        timeout=60,
    ).stdout
    sections = re.findall(r"<h2>([^<]*)</h2>", out)
    for wanted in (
        "What is wrong, and what to do",
        "Hang",
        "Where the time went, by rank",
        "Waiting, rank by collective",
        "Critical path and what-if",
        "Kernels of rank 0",
    ):
        assert wanted in sections


def test_annotated_timeline_is_exact(slow_job, tmp_path):
    _, timeline, folder = slow_job
    run([folder], perfetto=tmp_path / "p.json.gz")
    events = json.loads(gzip.decompress((tmp_path / "p.json.gz").read_bytes()))["traceEvents"]
    own = [e for e in events if e["pid"] == 1 and e["ph"] == "X"]
    for cat, key in (
        ("matmul", "matmul"),
        ("communication", "comm_exposed"),
        ("other_compute", "other_compute"),
    ):
        assert round(sum(e["dur"] for e in own if e["cat"] == cat) * 1000) == timeline.terms(1)[key]
    idle = [e for e in own if e["name"].startswith("idle: ")]
    assert round(sum(e["dur"] for e in idle) * 1000) == timeline.terms(1)["idle"]
    assert {e["name"] for e in idle} >= {"idle: data", "idle: queued"}
    assert {e["args"]["axis"] for e in own if e["cat"] == "communication"} == {"dp"}
    assert sum(e["cat"] == "step" for e in own) == 6
    # The slowest rank's critical path, without a gap, beside no other rank's.
    names = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    path = [e for e in events if e["ph"] == "X" and names[e["pid"], e["tid"]] == "critical path"]
    assert {e["pid"] for e in path} == {2}
    begins, ends = (
        [round((e["ts"] + n * e["dur"]) * 1000) for e in sorted(path, key=lambda e: e["ts"])] for n in (0, 1)
    )
    assert begins[1:] == ends[:-1]
    assert ends[-1] - begins[0] == timeline.terms(2)["span"]
    assert {e["name"].split(":")[0] for e in path} >= {"matmul", "data"}


def test_diff_names_what_got_slower(tmp_path):
    write_job(Job(ranks=2, steps=3), tmp_path / "a")
    write_job(Job(ranks=2, steps=3, product_ns=500_123), tmp_path / "b")
    d = compare_runs(analyse([tmp_path / "a"]), analyse([tmp_path / "b"]))
    assert d.span.delta_ns == pytest.approx(4 * 100_000)
    assert {t.name: round(t.delta_ns) for t in d.terms if abs(t.delta_ns) > 1} == {"matmul": 400_000}
    assert "slower" in d.verdict
    assert "matmul" in d.verdict
    assert d.kernels[0].delta_ns == pytest.approx(400_000)
    assert "no change" in compare_runs(analyse([tmp_path / "a"]), analyse([tmp_path / "a"])).verdict
    assert "slower" in run([tmp_path / "b"], against=[tmp_path / "a"])


def test_model_mfu_and_its_refusals(tmp_path):
    write_job(Job(ranks=2, steps=3), tmp_path)
    model = ModelConfig(name="tiny", n_layers=2, d_model=64, n_heads=4, d_ff=128, vocab=256)
    report = analyse([tmp_path], model=model, seq_len=128, tokens_per_step=4096)
    from trainsys.flops import train_flops_per_token

    steps = report.ranks[0].breakdown.steps
    mean_s = sum(t.span for t in steps) / 3e9
    want = train_flops_per_token(model, 128) * 4096 / 2 / (mean_s * 989.4e12)
    assert report.ranks[0].mfu.value == pytest.approx(want, rel=1e-2, abs=1e-6)
    assert "exact" in report.ranks[0].mfu.flops
    with pytest.raises(UserError, match="--seq-len"):
        run([tmp_path], model=model)


def test_unknown_device_has_no_mfu(tmp_path):
    write_job(Job(ranks=1), tmp_path)
    path = tmp_path / "rank00000.json"
    path.write_text(path.read_text().replace("NVIDIA H100 80GB HBM3", "Mystery 9000"))
    assert analyse([path]).ranks[0].mfu is None
    model = ModelConfig(name="tiny", n_layers=2, d_model=64, n_heads=4, d_ff=128, vocab=256)
    with pytest.raises(UserError, match=r"Mystery 9000.*--device"):
        analyse([path], model=model, seq_len=8, tokens_per_step=8)


def test_one_bad_file_does_not_lose_the_others(tmp_path):
    write_job(Job(ranks=3), tmp_path)
    path = tmp_path / "rank00001.json"
    path.write_bytes(path.read_bytes()[:5000])
    report = analyse([tmp_path])
    assert [r.rank for r in report.ranks] == [0, 2]
    assert [re.search(r"rank00001\.json.*byte \d+", u.why) is not None for u in report.unread] == [True]
    with pytest.raises(UserError, match=r"rank00001\.json.*byte \d+"):
        analyse([path])


def test_results_do_not_depend_on_the_number_of_workers(slow_job):
    one, two = (analyse([slow_job[2]], workers=n) for n in (1, 2))
    assert to_json(one) == to_json(two)


def test_a_capture_given_twice_counts_once(tmp_path):
    write_job(Job(ranks=1), tmp_path)
    text = (tmp_path / "rank00000.json").read_bytes()
    (tmp_path / "other.json").write_bytes(text)
    report = analyse([tmp_path])
    assert [r.rank for r in report.ranks] == [0]
    assert ["counted once" in u.why for u in report.unread] == [True]


def test_nothing_imports_torch():
    code = (
        "import sys, trainsys.profiler.trace.main, trainsys.profiler.trace.page, trainsys.profiler.trace.diff, "
        "trainsys.profiler.trace.annotate, trainsys.profiler.straggler; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
