"""The few minutes in which a GPU is at hand: what trainsys must know of it, the most valuable first.

    python profiling/gpu_day.py OUT [--budget 780]               # every check that OUT has no answer to yet
    python profiling/gpu_day.py OUT --device cpu --tiny          # all that a CPU can run of it, at tiny sizes
    python profiling/gpu_day.py OUT --only mfu_eager --again     # once more

Each check is a process of its own with a limit of its own, so that a crash or a hang costs itself alone, and one line of
OUT/gpu_day.jsonl: passed with what was found, failed with why, or skipped. A later call goes on where the last one ended.
Exit code 0: nothing failed, 1: something did, 2: it cannot be run so.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from gpu_checks import Check, Setting, Skipped, ceilings, device_time, layers, machine, right, saving

from trainsys.hardware.machine import cuda_devices

CHECKS: tuple[Check, ...] = (
    Check("environment", 30, machine.environment),
    Check("catalogue", 20, machine.catalogue, needs_cuda=True),
    Check("host_syncs", 60, right.host_syncs),
    Check("loss_parity", 120, right.loss_parity),
    Check("marks", 20, right.marks, needs_cuda=True),
    Check("collectives", 30, right.collectives),
    Check("recorder", 60, device_time.against_profiler),
    Check("save_and_resume", 90, saving.save_and_resume),
    Check("mfu_eager", 60, partial(layers.speed, "eager")),
    Check("mfu_compiled", 120, partial(layers.speed, "compiled")),
    Check("matmuls", 45, ceilings.matmuls),
    Check("attentions", 60, ceilings.attentions),
    Check("gpu_tests", 120, machine.gpu_tests, needs_cuda=True),
    *(Check(f"dry_run_{v}", 60, partial(layers.dry_run, v)) for v in ("eager", "selective_pp", "loss_chunk")),
    *(
        Check(f"mfu_{v}", 120 if "compiled" in v else 60, partial(layers.speed, v))
        for v in layers.VARIANTS
        if v not in ("eager", "compiled")
    ),
    Check("experts", 30, ceilings.experts),
    Check("copies", 30, ceilings.copies),
    Check("fp8_matmuls", 30, ceilings.fp8_matmuls),
)
"""In order of value: right before fast, what every run does before what few do, seconds before minutes."""
FILE = "gpu_day.jsonl"
NO_TIME = "no time left"
_TINY_LIMITS = 10.0
"""A busy CPU takes this much longer than a GPU."""
_LEAST_S = 5.0
"""A check is not begun with less than this left."""


def _child(check: Check, at: Setting, log: Path, answer: Connection) -> None:
    os.setsid()  # what the check starts ends with it
    file = log.open("w", buffering=1)
    sys.stdout = sys.stderr = file
    for descriptor in (1, 2):  # of libraries, and of what the check starts
        os.dup2(file.fileno(), descriptor)
    try:
        if at.tiny:
            import torch

            torch.set_num_threads(1)
        result: dict[str, Any] = {"outcome": "passed", "found": check.run(at)}
    except Skipped as why:
        result = {"outcome": "skipped", "why": str(why)}
    except AssertionError as wrong:
        result = {"outcome": "failed", "why": str(wrong) or traceback.format_exc(limit=-1)}
    except BaseException as error:
        traceback.print_exc()
        result = {"outcome": "failed", "why": f"{type(error).__name__}: {error}", "log": log.name}
    answer.send(result)


def run_check(check: Check, at: Setting, out: Path, limit_s: float) -> dict[str, Any]:
    """Its answer, by a process that is killed with all it started after ``limit_s``.

    Forked from this one, which has imported torch and never touched a device: starting costs nothing.
    """
    if check.needs_cuda and not at.cuda:
        return {"outcome": "skipped", "why": "needs CUDA"}
    receive, send = multiprocessing.Pipe(duplex=False)
    context = multiprocessing.get_context("fork")
    child = context.Process(target=_child, args=(check, at, out / f"{check.name}.log", send))
    began = time.monotonic()
    child.start()
    send.close()
    result: dict[str, Any] = {"outcome": "failed", "why": f"no answer within {limit_s:.0f} s"}
    if receive.poll(limit_s):
        try:
            result = receive.recv()
        except EOFError:
            child.join()
            result = {"outcome": "failed", "why": f"died with exit code {child.exitcode}", "log": f"{check.name}.log"}
    assert child.pid is not None
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.join()
    return {**result, "seconds": round(time.monotonic() - began, 2)}


def answered(path: Path) -> dict[str, dict[str, Any]]:
    """The last whole line of each check; one that was cut short by a kill is no answer."""
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with suppress(ValueError):
            row = json.loads(line)
            found[row["check"]] = row
    return found


def run_all(
    checks: Sequence[Check], at: Setting, out: Path, budget_s: float, *, again: bool = False, commit: str = ""
) -> int:
    """Run and record what has no answer yet; 1 if anything failed, now or before."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / FILE
    known = {} if again else answered(path)
    if path.exists() and not path.read_bytes().endswith(b"\n"):
        with path.open("a", encoding="utf-8") as file:
            file.write("\n")  # after what a kill has cut short
    began, failed = time.monotonic(), False
    for check in checks:
        row = known.get(check.name)
        if row is None or row.get("why") == NO_TIME:
            left = budget_s - (time.monotonic() - began)
            if left < _LEAST_S:
                row = {"outcome": "skipped", "why": NO_TIME}
            else:
                row = run_check(check, at, out, min(check.limit_s * (_TINY_LIMITS if at.tiny else 1.0), left))
            when = datetime.now(UTC).isoformat(timespec="seconds")
            row = {"check": check.name, **row, "device": at.kind, "tiny": at.tiny, "at": when, "commit": commit}
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            shown = row.get("why") or json.dumps(row.get("found"))
            print(f"{check.name}: {row['outcome']} ({row.get('seconds', 0)} s) {shown}", flush=True)
        failed |= row["outcome"] == "failed"
    return int(failed)


def _commit() -> str:
    command = ["git", "-C", str(machine.ROOT), "rev-parse", "--short", "HEAD"]
    with suppress(OSError):
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return ""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of the answers")
    parser.add_argument("--budget", type=float, default=780.0, metavar="S", help="seconds in all")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="sizes that try the code and measure nothing")
    parser.add_argument("--only", nargs="+", metavar="CHECK", default=[])
    parser.add_argument("--again", action="store_true", help="also what has an answer")
    args = parser.parse_args(argv)
    if unknown := set(args.only) - {check.name for check in CHECKS}:
        parser.error(f"no check {', '.join(sorted(unknown))}; there are {', '.join(c.name for c in CHECKS)}")
    if args.device == "cuda" and not cuda_devices():
        parser.error("this machine shows no CUDA device; use --device cpu --tiny")
    if args.device == "cpu" and not args.tiny:
        parser.error("--device cpu goes with --tiny: at an 8B's sizes a CPU takes hours")
    at = Setting(args.device == "cuda", args.tiny)
    if others := {row["device"] for row in answered(args.out / FILE).values()} - {at.kind}:
        parser.error(f"{args.out} has answers of {', '.join(sorted(others))}; take another folder")
    chosen = [check for check in CHECKS if not args.only or check.name in args.only]
    return run_all(chosen, at, args.out, args.budget, again=args.again, commit=_commit())


if __name__ == "__main__":
    sys.exit(main())
