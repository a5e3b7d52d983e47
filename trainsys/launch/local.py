"""`trainsys launch --on local`: the ranks of a run as processes of this machine, by torchrun.

The config and the layout are checked here, before any process starts: most mistakes cost a fraction of
a second and never reach a rank. One rank replaces this process; more are started by torchrun's own
agent, which runs inside this process so that signals, the terminal and exit codes need no relay.
After a failure all ranks are started again as on a scheduler (see `after`), but by this process: torchrun's own
restarts count every failure, and come back from a mistake in the config too.
"""

from __future__ import annotations

import math
import os
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from trainsys.config.launch import LaunchConfig
from trainsys.config.loader import load_run
from trainsys.config.run import RunConfig
from trainsys.config.secrets import MASK, is_env
from trainsys.errors import UserError
from trainsys.failure import COMMAND, EXIT_INTERRUPTED, RESTARTS
from trainsys.hardware.machine import cuda_devices, usable_cores
from trainsys.launch import options
from trainsys.launch.after import Attempt, newest_saved, verdict
from trainsys.launch.agent import TORCHRUN, pass_on, run_agent
from trainsys.launch.check import check_memory, check_paths
from trainsys.launch.job import interpreter
from trainsys.launch.proof import MARKER
from trainsys.launch.replan import replan
from trainsys.layout import PLACED, Layout

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
    torchrun = ["--standalone", "--nproc-per-node", str(world), *train]
    alone = world == 1 and not config.resilience.max_restarts
    command = [sys.executable, *(train if alone else ["-m", TORCHRUN, *torchrun])]
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
    return _attempts(config, ["--signals-to-handle", "SIGHUP,SIGQUIT", *torchrun])


def _attempts(config: RunConfig, torchrun: list[str]) -> int:
    """Run all ranks, again and again until they are done, stopped, or have failed too often without a newer saved
    step; the exit code."""
    folder, asked, number = Path(config.checkpoint_folder), 0, 0

    # Asked to stop, the agent would give the ranks 30 seconds: they are told directly, and it waits for them.
    def tell(sent: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = sent
        if not pass_on(sent, frame):  # no rank runs yet, or none again
            raise SystemExit(EXIT_INTERRUPTED if sent == signal.SIGINT else 128 + sent)

    before = {n: signal.signal(n, tell) for n in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    try:
        with tempfile.TemporaryDirectory(prefix="trainsys-restarts-") as scratch:
            while True:
                os.environ[RESTARTS] = str(number)
                end = run_agent(torchrun, config.train.steps, folder / MARKER)
                if end.code == 0 or asked:
                    return EXIT_INTERRUPTED if asked == signal.SIGINT and end.code == 0 else end.code
                attempt = Attempt(
                    end.code, end.doubt, "", end.failure, saved=newest_saved(folder), number=number
                )
                told = verdict(
                    attempt, Path(scratch, "history.json"), config.resilience.max_restarts,
                    config.launch.retry_wait_s, "resilience.max_restarts",
                )  # fmt: skip
                if not told.again:
                    if told.counted and number:  # else the ranks have said it all
                        print(f"trainsys: {told.line}", file=sys.stderr)
                    return end.code
                pause = f", in {told.wait_s} s" if told.wait_s else ""
                print(f"trainsys: {told.line}{pause}", file=sys.stderr, flush=True)
                time.sleep(told.wait_s)
                number += 1
    finally:
        os.environ.pop(RESTARTS, None)
        for n, handler in before.items():
            signal.signal(n, handler)


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
