from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainsys.config.loader import load, load_run, read_tree, resolved_yaml
from trainsys.config.model import RopeConfig
from trainsys.config.root import config_root
from trainsys.config.run import RunConfig
from trainsys.errors import UserError

MODEL = "model: {n_layers: 2, d_model: 64, n_heads: 4, d_ff: 128, vocab: 320}\n"


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """Write a config into the working directory of this test; its name."""
    monkeypatch.chdir(tmp_path)

    def put(text: str, name: str = "run.yaml") -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return name

    return put


def lines_of(path: str, overrides: list[str] | None = None) -> list[str]:
    with pytest.raises(UserError) as caught:
        load_run(path, overrides or [])
    return str(caught.value).splitlines()


# ---- what is read ------------------------------------------------------------------------------------


def test_file_includes_and_overrides_in_order(write) -> None:  # type: ignore[no-untyped-def]
    write("optim: {lr: 1, eps: 1e-7, weight_decay: 0}\ntrain: {seed: 1}\n", "sub/one.yaml")
    write("include: one\noptim: {lr: 2, warmup_steps: 3}\n", "sub/two.yaml")
    path = write(f"include: [sub/one.yaml, sub/two]\n{MODEL}optim: {{lr: 1e-4}}\n")
    run = load_run(path, ["optim.eps=1e-9", "train.dtype=fp32", "train.dtype=bf16", "name=x1"])
    assert run.optim.lr == 1e-4
    assert run.optim.eps == 1e-9
    assert run.optim.warmup_steps == 3
    assert run.optim.weight_decay == 0.0
    assert isinstance(run.optim.weight_decay, float)
    assert run.train.seed == 1
    assert run.train.dtype == "bf16"
    assert run.name == "x1"


def test_lists_become_tuples_and_null_unsets(write) -> None:  # type: ignore[no-untyped-def]
    path = write(MODEL + "optim:\n  betas: [0.8, 0]\n")
    run = load_run(path, ["model.moe.n_experts=4", "model.moe.top_k=2", "model.moe.d_ff=32"])
    assert run.optim.betas == (0.8, 0.0)
    assert run.model.moe is not None
    assert run.model.moe.n_experts == 4
    again = ["model.moe={n_experts: 4, top_k: 2, d_ff: 8}", "model.moe=null", "optim.betas=[0.1, 0.2]"]
    assert load_run(path, again).model.moe is None
    assert load_run(path, again).optim.betas == (0.1, 0.2)


def test_words_that_yaml_1_1_took_for_booleans_stay_words(write) -> None:  # type: ignore[no-untyped-def]
    path = write(MODEL + "telemetry: {console: off, wandb: {mode: off}}\n")
    assert load_run(path).telemetry.console == "off"
    assert load_run(path, ["telemetry.wandb.mode=off"]).telemetry.wandb.mode == "off"


def test_shipped_configs_are_found_by_name(write) -> None:  # type: ignore[no-untyped-def]
    path = write("include: models/tiny-gqa\n")
    assert load_run(path).model.name == "tiny-gqa"
    assert load_run("train/demo").name == load_run("train/demo.yaml").name == "demo"


def test_a_file_beside_wins_over_a_shipped_one(write) -> None:  # type: ignore[no-untyped-def]
    write(MODEL, "models/tiny.yaml")
    assert load_run(write("include: models/tiny\n")).model.name == "custom"


def test_load_serves_any_config_model(write) -> None:  # type: ignore[no-untyped-def]
    path = write("theta: 5\nfactor: 1e1\n")
    assert load(path, RopeConfig, ["theta=7"]) == RopeConfig(theta=7.0, factor=10.0)


@settings(deadline=None)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "data": st.fixed_dictionaries({"text_key": st.text(max_size=8), "cache_dir": st.text() | st.none()}),
            "optim": st.fixed_dictionaries({"lr": st.floats(1e-12, 1e3), "warmup_steps": st.integers(0, 10**6)}),
            "name": st.sampled_from(["1e5", "0x1", "true", "null", "off", "a-b.c"]),
        },
    )
)  # fmt: skip
def test_the_resolved_config_loads_back(tmp_path_factory: pytest.TempPathFactory, values: dict) -> None:  # type: ignore[type-arg]
    model = {"n_layers": 2, "d_model": 64, "n_heads": 4, "d_ff": 128, "vocab": 320}
    run = RunConfig.model_validate_json(json.dumps({"model": model, **values}))
    path = tmp_path_factory.getbasetemp() / "resolved.yaml"
    path.write_text(resolved_yaml(run), encoding="utf-8")
    assert load_run(path) == run


# ---- what is refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("parallel: {tpp: 2}", "run.yaml:2: unknown key parallel.tpp; did you mean parallel.tp?"),
        ("tp: 2", "run.yaml:2: unknown key tp; did you mean parallel.tp?"),
        ("prefetch: 2", "unknown key prefetch; did you mean parallel.fsdp.prefetch or data.prefetch?"),
        ("stepz: 2", "run.yaml:2: unknown key stepz; did you mean train.steps?"),
        ("\nparallel:\n  cp: '2'", "run.yaml:4: parallel.cp: expected an integer, got the text '2'"),
        ("train: {steps: true}", "run.yaml:2: train.steps: expected an integer > 0, got true"),
        ("train: {steps: 1.5}", "run.yaml:2: train.steps: expected an integer > 0, got 1.5"),
        ("train: {steps: 0}", "run.yaml:2: train.steps: expected an integer > 0, got 0"),
        ("optim: {lr: yes}", "run.yaml:2: optim.lr: expected a number > 0, got the text 'yes'"),
        ("optim: {lr: .inf}", "run.yaml:2: optim.lr: expected a number > 0, got inf"),
        ("optim: {lr: .nan}", "run.yaml:2: optim.lr: expected a number > 0, got nan"),
        ("train: {compile: on}", "run.yaml:2: train.compile: expected true or false, got the text 'on'"),
        ("train: {compile: 1}", "run.yaml:2: train.compile: expected true or false, got 1"),
        ("train: {dtype: fp23}", "expected one of fp32, bf16, got the text 'fp23'; did you mean fp32?"),
        ("train: 3", "run.yaml:2: train: expected a section with keys such as steps, seq_len"),
        ("optim: {betas: [0.9]}", "run.yaml:2: optim.betas"),
        ("optim: {betas: [0.9, 1]}", "optim.betas.1: expected a number >= 0 and < 1, got 1"),
        ("name: a/b", "run.yaml:2: name: expected text matching"),
        ("data: {path: x}", "run.yaml:2: data: source=stdlib reads no path"),
        ("data: {document_length: 9}", "run.yaml:2: data: document_length changes nothing without document_mask"),
        ("data: {source: text}", "run.yaml:2: data: source=text needs data.path"),
        ("train: {seq_len: 9000}", "run.yaml:2: train.seq_len=9000 is longer than model.max_seq_len=8192"),
        ("model2: {include: x}", "run.yaml:2: unknown key model2; did you mean model?"),
        ("train: {include: x}", "run.yaml:2: unknown key train.include; include stands at the top of a file"),
    ],
)
def test_a_mistake_in_a_file(write, text: str, says: str) -> None:  # type: ignore[no-untyped-def]
    (line,) = lines_of(write(MODEL + text))
    assert says in line


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("parallel.tpp=2", "override parallel.tpp=2: unknown key parallel.tpp; did you mean parallel.tp?"),
        ("parallel.tp=two", "override parallel.tp=two: parallel.tp: expected an integer, got the text 'two'"),
        ("parallel.tp=", "parallel.tp: expected an integer, got null"),
        ("model.n_heads=3", "override model.n_heads=3: model: d_model=64 is not divisible by n_heads=3"),
        ("train.seq_len=9000", "override train.seq_len=9000: train.seq_len=9000 is longer"),
        (
            "train.dtype.x=1",
            "override train.dtype.x=1: train.dtype: expected one of fp32, bf16, got a section",
        ),
        ("parallel.tp", "override parallel.tp: an override is written section.key=value"),
        ("=2", "an override is written section.key=value"),
        ("a..b=2", "an override is written section.key=value"),
        ("optim.betas=[1", "not valid YAML"),
        ("include=models/tiny", "unknown key include; include stands at the top of a file"),
    ],
)
def test_a_mistake_in_an_override(write, override: str, says: str) -> None:  # type: ignore[no-untyped-def]
    (line,) = lines_of(write(MODEL), [override])
    assert says in line


def test_every_mistake_is_its_own_line(write) -> None:  # type: ignore[no-untyped-def]
    path = write(f"{MODEL}train: {{stepz: 3, seed: -1}}\n")
    lines = lines_of(path, ["optim.lr=x", "model.vocab=0"])
    assert len(lines) == 4
    assert {line.split(": ")[0] for line in lines} == {
        "run.yaml:2", "override optim.lr=x", "override model.vocab=0",
    }  # fmt: skip


def test_a_mistake_names_the_included_file(write) -> None:  # type: ignore[no-untyped-def]
    write("\ntrain: {steps: x}\n", "base.yaml")
    (line,) = lines_of(write(f"include: base\n{MODEL}"))
    assert line.startswith("base.yaml:2: train.steps: expected")


def test_a_missing_field_says_what_it_needs(write) -> None:  # type: ignore[no-untyped-def]
    lines = lines_of(write("model: {n_layers: 2, d_model: 8, n_heads: 2, d_ff: 8}\n"))
    assert lines == ["run.yaml:1: model.vocab is missing: an integer > 0"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "run.yaml: empty"),
        ("# only a comment\n", "run.yaml: empty"),
        ("- 1\n", "a config is a mapping of sections, but this file is a list"),
        ("hello\n", "a config is a mapping of sections, but this file is the str 'hello'"),
        ("a: [\n", "not valid YAML"),
        ("include: 3\n", "run.yaml:1: include: expected a file name or a list of file names"),
        ("include: [models/tiny, 3]\n", "run.yaml:1: include: expected a file name"),
        ("include: modles/llama3-8\n", "no such file here or among the configs of trainsys; did you mean models/llama3"),
        ("\ninclude: nowhere\n", "run.yaml:2: include: nowhere: no such file"),
        ("include: run.yaml\n", "run.yaml: includes itself: run.yaml -> run.yaml"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_config(write, text: str, says: str) -> None:  # type: ignore[no-untyped-def]
    (line,) = lines_of(write(text))
    assert says in line


def test_include_cycles_are_told(write) -> None:  # type: ignore[no-untyped-def]
    write("include: run\n", "other.yaml")
    (line,) = lines_of(write("include: other\n"))
    assert "includes itself: run.yaml -> other.yaml -> run.yaml" in line


def test_a_file_included_twice_is_no_cycle(write) -> None:  # type: ignore[no-untyped-def]
    write(MODEL, "base.yaml")
    write("include: base\n", "one.yaml")
    assert load_run(write("include: [base, one]\n")).model.n_layers == 2


def test_files_that_cannot_be_read(write, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "folder").mkdir()
    assert lines_of("binary") == ["binary: not a UTF-8 text file"]
    assert lines_of("folder") == ["folder: is a folder; name a file in it"]
    assert lines_of("nope.yaml")[0].startswith("nope.yaml: no such file")
    assert lines_of("demo2")[0].endswith("did you mean train/demo?")


# ---- cost and place ----------------------------------------------------------------------------------


def test_loading_imports_neither_torch_nor_numpy() -> None:
    code = (
        "import sys; from trainsys.config.loader import load_run; load_run('train/demo');"
        "print([m for m in ('torch', 'numpy', 'rich') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_shipped_configs_are_where_the_package_looks() -> None:
    assert (config_root() / "models" / "tiny.yaml").is_file()
    assert read_tree("models/tiny").values["model"]["name"] == "tiny"
