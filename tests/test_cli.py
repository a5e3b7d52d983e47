from __future__ import annotations

import ast
import importlib
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

from trainsys import __version__, cli
from trainsys.config.loader import load_run
from trainsys.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


def trainsys(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", "trainsys", *arguments],
        capture_output=True, text=True, cwd=cwd, env=env, timeout=60, check=False,
    )  # fmt: skip


def test_help_lists_every_command_and_only_commands_that_exist(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    for name, (_, summary, _) in cli.COMMANDS.items():
        assert f"  {name}" in shown
        assert summary in shown
    trees = [ast.parse(file.read_text()) for file in Path(cli.__file__).parent.glob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    lazy = [node for node in nodes if isinstance(node, ast.ImportFrom) and node.col_offset > 0]
    assert len(lazy) >= len(cli.COMMANDS)
    for node in lazy:
        module = importlib.import_module(node.module or "")
        assert all(hasattr(module, alias.name) for alias in node.names), node.module


@pytest.mark.parametrize(
    ("argv", "target", "args", "kwargs"),
    [
        ("train train/demo train.steps=2", "trainsys.train.main.train", ["train/demo", ["train.steps=2"]], {}),
        ("launch R a.b=1 --on local --nproc 3 c.d=2 --dry-run", "trainsys.launch.local.launch",
         ["R", ["a.b=1", "c.d=2"], 3, True], {}),
        ("launch --on local R", "trainsys.launch.local.launch", ["R", [], None, False], {}),
        ("explain D --html F", "trainsys.profiler.main.run_cli", ["D", "F", False], {}),
        ("bench matmul --dtype bf16 --processes 1 4", "trainsys.bench.matmul.run_cli",
         [["bf16"], [1, 4], 1.0, "cpu", None, False], {}),
        ("bench memory --json", "trainsys.bench.memory.run_cli", [[1], 1.0, "cpu", None, True], {}),
        ("data prepare OUT --input x.txt --shard-tokens 9", "trainsys.data.prepare.prepare", ["x.txt", "OUT"],
         {"tokenizer": "bytes", "text_key": "text", "shard_tokens": 9, "source": None,
          "split": "train"}),
        ("data verify P", "trainsys.data.prepare.verify", ["P"], {}),
    ],
)  # fmt: skip
def test_a_command_calls_one_function_with_what_it_was_given(
    argv: str, target: str, args: list[object], kwargs: dict[str, object]
) -> None:
    module, _, name = target.rpartition(".")
    real = getattr(importlib.import_module(module), name)
    # With the real signature: a call that the function would not take fails here.
    with mock.patch(target, mock.create_autospec(real, return_value=0)) as called:
        assert cli.main(argv.split()) == 0
    called.assert_called_once_with(*args, **kwargs)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ("lanch x", "unknown command lanch; did you mean trainsys launch?"),
        ("frobnicate", "unknown command frobnicate; there are bench, "),
        ("config", "trainsys config: say what: show or schema"),
        ("config shw", "unknown command config shw; did you mean trainsys config show?"),
        ("config show", "the following arguments are required: RUN.yaml"),
        ("config show train/demo --tp", "unrecognized arguments: --tp; see trainsys config show --help"),
        ("config show train/demo parallel.tpp=2", "unknown key parallel.tpp; did you mean parallel.tp?"),
        ("config show nowhere.yaml", "nowhere.yaml: no such file"),
        ("launch train/demo", "the following arguments are required: --on"),
        ("launch train/demo --on moon", "invalid choice: 'moon'"),
        ("launch train/demo --on local --nproc many", "invalid int value: 'many'"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    argv: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(argv.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("trainsys: error: ")
    assert says in line


def test_several_mistakes_are_a_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", "show", "train/demo", "train.steps=0", "optim.lr=x"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert all(line.startswith("trainsys: error: override ") for line in lines)


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (UserError("no"), 2)])
def test_exit_codes(error: BaseException, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    with mock.patch("trainsys.profiler.main.run_cli", side_effect=error):
        assert cli.main(["explain", "x"]) == code


def test_a_defect_keeps_its_traceback() -> None:
    with (
        mock.patch("trainsys.profiler.main.run_cli", side_effect=RuntimeError("defect")),
        pytest.raises(RuntimeError, match="defect"),
    ):
        cli.main(["explain", "x"])


def test_config_show_prints_what_loads_back(tmp_path: Path) -> None:
    shown = trainsys(
        "config", "show", "train/demo", "train.steps=7", "telemetry.wandb.mode=off", cwd=tmp_path
    )
    assert (shown.returncode, shown.stderr) == (0, "")
    path = tmp_path / "shown.yaml"
    path.write_text(shown.stdout)
    assert load_run(path) == load_run("train/demo", ["train.steps=7"])


def test_a_process_exits_with_2_and_no_traceback() -> None:
    done = trainsys("train", "nowhere.yaml")
    assert done.returncode == 2
    assert done.stderr.splitlines() == [done.stderr.strip()]
    assert done.stderr.startswith("trainsys: error: nowhere.yaml: no such file")


def test_version() -> None:
    assert trainsys("--version").stdout == f"trainsys {__version__}\n"


@pytest.mark.parametrize("command", [["config", "schema"], ["--version"]], ids=" ".join)
def test_a_reader_that_leaves_is_no_error(command: list[str]) -> None:
    read, write = os.pipe()
    os.close(read)
    # Buffered, so that what is short fails only when it is flushed.
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with os.fdopen(write, "w") as closed:
        done = subprocess.run(
            [sys.executable, "-m", "trainsys", *command],
            stdout=closed, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=env, check=False,
        )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")


def test_a_mistake_in_a_config_is_told_before_torch_is_imported() -> None:
    code = (
        "import sys; from trainsys.cli import main\n"
        "try: main(['train', 'train/demo', 'train.steps=0'])\n"
        "except SystemExit as left: print(left.code, 'torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "2 False\n"
    assert "train.steps: expected an integer > 0, got 0" in done.stderr
