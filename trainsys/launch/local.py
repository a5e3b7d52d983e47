"""`trainsys launch --on local`: the ranks of a run as processes of this machine, by torchrun.

The config and the layout are checked here, before any process starts: most mistakes cost a fraction of
a second and never reach a rank. One rank replaces this process; more are started by torchrun's own
agent, which runs inside this process so that signals, the terminal and exit codes need no relay.
"""

from __future__ import annotations

import logging
import math
import os
import runpy
import shlex
import signal
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

from trainsys.config.launch import LaunchConfig
from trainsys.config.loader import load_run
from trainsys.config.run import RunConfig
from trainsys.config.secrets import MASK, is_env
from trainsys.errors import UserError
from trainsys.failure import COMMAND, EXIT_FAILED, EXIT_INTERRUPTED, FAILURE_FILE, read_failure
from trainsys.hardware.machine import cuda_devices, usable_cores
from trainsys.launch import options
from trainsys.launch.check import check_memory, check_paths
from trainsys.launch.job import interpreter
from trainsys.launch.proof import DONE_FILE, MARKER, doubt
from trainsys.launch.replan import replan
from trainsys.layout import PLACED, Layout

_TORCHRUN = "torch.distributed.run"
_READY = "TRAINSYS_SETUP_DONE"
"""Environment variable: launch.setup and launch.venv are in force already."""


def launch(path: str, overrides: Sequence[str] = (), nproc: int | None = None, dry_run: bool = False) -> int:
    """Start the run on this machine and wait for it; the exit code of its first failing rank, or 0.

    Raises UserError where the config, the layout or this machine does not fit.
    """
    config = load_run(path, overrides)
    options.check(config, "local")
    asked = config.launch
    world = _world(config, nproc)
    if config.resilience.elastic:
        config = replan(config, world)
    Layout.of(config, world)
    check_paths(config)
    if config.train.device == "cuda" or cuda_devices():
        check_memory(config, world)
    ready = os.environ.pop(_READY, None) is not None
    variables = {} if ready else asked.variables
    # Ranks inherit them: on their command lines everybody would see the values.
    overrides = [text for text in overrides if not is_env(text)]
    if (asked.setup or asked.venv) and not ready:
        again = ["-m", "trainsys", "launch", path, *overrides, "--on", "local", "--nproc", str(world)]
        return _after_setup(asked, again, dry_run)
    train = ["-m", "trainsys", "train", path, *overrides]
    restarts = config.resilience.max_restarts
    again = ["--max-restarts", str(restarts)] if restarts else []
    torchrun = ["--standalone", "--nproc-per-node", str(world), *again, *train]
    alone = world == 1 and not restarts
    command = [sys.executable, *(train if alone else ["-m", _TORCHRUN, *torchrun])]
    threads = str(config.train.threads or max(1, usable_cores() // world))
    if config.train.threads == 0:
        threads = {**os.environ, **variables}.get("OMP_NUM_THREADS", threads)
    if dry_run:
        print(f"{_shown(asked)}OMP_NUM_THREADS={threads} {shlex.join(command)}")
        return 0
    os.environ |= {**variables, "OMP_NUM_THREADS": threads}
    again = ["--nproc", str(nproc)] if nproc else []
    os.environ[COMMAND] = shlex.join(["trainsys", "launch", path, *overrides, "--on", "local", *again])
    if alone:
        sys.stdout.flush()
        os.execv(command[0], command)
    # Asked to stop, the agent would give the ranks 30 seconds: they are told directly, and it waits for them.
    interrupted = False

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal interrupted
        interrupted = True
        if not pass_on(number, frame):
            raise KeyboardInterrupt  # no rank has started yet

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGUSR1)}
    before[signal.SIGINT] = signal.signal(signal.SIGINT, interrupt)
    try:
        drained = Path(config.checkpoint_folder) / MARKER
        code = run_agent(["--signals-to-handle", "SIGHUP,SIGQUIT", *torchrun], config.train.steps, drained)
        return EXIT_INTERRUPTED if interrupted and code == 0 else code
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _after_setup(asked: LaunchConfig, arguments: list[str], dry_run: bool) -> int:
    """Replace this process by a shell that runs ``launch.setup``, then this command anew by the Python of
    ``launch.venv``."""
    python = interpreter(asked)
    if not os.access(python, os.X_OK):
        raise UserError(f"launch.venv={asked.venv}: no virtual environment, there is no {python}")
    lines = ["set -e", *asked.setup, 'exec "$@"']
    if dry_run:
        print("\n".join([*lines[:-1], f"{_shown(asked)}{shlex.join([python, *arguments])}"]))
        return 0
    sys.stdout.flush()
    environment = {**os.environ, **asked.variables, _READY: "1"}
    os.execvpe("bash", ["bash", "-c", "\n".join(lines), "setup", python, *arguments], environment)


def _shown(asked: LaunchConfig) -> str:
    return "".join(f"{name}={MASK} " for name in asked.env)


def _world(config: RunConfig, nproc: int | None) -> int:
    """How many ranks: what the layout fixes, else what was asked for, else what the machine has."""
    if nproc is not None and nproc < 1:
        raise UserError(f"--nproc {nproc}: at least one process is needed")
    source = f"--nproc {nproc}"
    if nproc is None and config.launch.devices_per_node is not None:
        nproc = config.launch.devices_per_node
        source = f"launch.devices_per_node={nproc}"
    required = Layout.required_world(config.parallel)
    on_cuda = config.train.device != "cpu"
    devices = cuda_devices() if on_cuda else 0
    if config.train.device == "cuda" and devices == 0:
        raise UserError("train.device=cuda, but this machine shows no CUDA device; set train.device=cpu")
    if config.resilience.elastic and nproc is not None:
        required = nproc
    if required is not None and nproc is not None and required != nproc:
        raise UserError(
            f"{source}, but the layout is fixed at {required} ranks; leave it out or set "
            "parallel.dp_shard=-1, or resilience.elastic=true for the nearest layout that fits"
        )
    world = required or nproc
    if world is None:
        # Fill the machine with whole multiples of the axes that have a size.
        fixed = math.prod(max(1, getattr(config.parallel, axis)) for axis in PLACED)
        world = max(fixed, (devices or usable_cores()) // fixed * fixed)
    if config.train.device == "cuda" and world > devices:
        raise UserError(
            f"{world} ranks with train.device=cuda, but this machine shows {devices} CUDA devices; "
            f"use at most {devices} ranks or set train.device=cpu"
        )
    return world


def run_agent(arguments: list[str], steps: int | None = None, drained: Path | None = None) -> int:
    """Run torchrun's agent with ``arguments``; the exit code that the run deserves.

    With ``steps`` 0 means that rank 0, which is on this machine, has proved so many, or that the run was asked to
    stop: then there is ``drained``.
    """
    # The agent logs each end of a rank and raises with a summary. The ranks have said what there is to
    # say (see `failure`), so only what the agent alone knows is printed, in one line.
    logging.disable(logging.ERROR)
    with tempfile.TemporaryDirectory(prefix="trainsys-") as folder:
        report, proof = Path(folder) / "failure.json", Path(folder) / "done.json"
        os.environ[FAILURE_FILE], os.environ[DONE_FILE] = str(report), str(proof)
        sys.argv = [_TORCHRUN, *arguments]
        try:
            runpy.run_module(_TORCHRUN, run_name="__main__", alter_sys=True)
        except Exception as error:
            failure = read_failure(report)
            if failure is not None:
                return failure.code
            return _explain(error)
        finally:
            del os.environ[FAILURE_FILE], os.environ[DONE_FILE]
        if steps is not None and not (drained and drained.exists()) and (why := doubt(proof, steps)):
            print(f"trainsys: error: the run {why}", file=sys.stderr)
            return EXIT_FAILED
    return 0


def pass_on(number: int, frame: FrameType | None) -> bool:
    """Send the signal to every child process; whether there was one."""
    sent = False
    for listed in Path("/proc/self/task").glob("*/children"):
        with suppress(OSError):
            for child in listed.read_text(encoding="ascii").split():
                os.kill(int(child), number)
                sent = True
    return sent


def _explain(error: Any) -> int:
    """Say in one line how the agent ended when no rank said why; the exit code."""
    if (caught := getattr(error, "sigval", None)) is not None:
        return 128 + int(caught)
    if not hasattr(error, "get_first_failure"):
        print(f"trainsys: error: torchrun could not run the ranks: {error}", file=sys.stderr)
        return EXIT_FAILED
    # A rank that ends by a signal takes others with it; those that the agent itself ended carry SIGTERM.
    failures = sorted(error.failures.items(), key=lambda item: (item[1].exitcode == -signal.SIGTERM, item[0]))
    rank, first = failures[0]
    if first.exitcode < 0:
        name = signal.Signals(-first.exitcode).name
        hint = " (out of memory?)" if name == "SIGKILL" else ""
        print(f"trainsys: error: rank {rank} was killed by {name}{hint}", file=sys.stderr)
        return 128 - int(first.exitcode)
    print(f"trainsys: error: rank {rank} ended with exit code {first.exitcode}", file=sys.stderr)
    return int(first.exitcode)
