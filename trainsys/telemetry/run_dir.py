"""The folder of a run: what it was asked to do, where it ran, and what came out.

``OUT/NAME-20250131-142501-3f9a/`` with ``config.yaml`` (resolved), ``environment.json``, ``events/``,
``metrics.jsonl`` and, once it has ended, ``summary.json``; ``OUT/latest`` points to the newest.
"""

from __future__ import annotations

import os
import platform
import re
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec
import yaml

from trainsys import __version__
from trainsys.config.run import RunConfig
from trainsys.config.secrets import is_secret, without_password, without_secrets
from trainsys.errors import UserError

PACKAGES = (
    "torch",
    "numpy",
    "msgspec",
    "pydantic",
    "wandb",
    "deepspeed",
    "megatron-core",
    "transformers",
    "triton",
)
ENVIRONMENT = re.compile(
    r"^(CUDA_|NVIDIA_VISIBLE|HIP_|ROCR_|NCCL_|GLOO_|TORCH|PYTORCH_|OMP_|MKL_|KMP_|TRITON_|CUBLAS_|UCX_|FI_|SLURM_"
    r"|MASTER_|RANK$|LOCAL_RANK$|WORLD_SIZE$|LOCAL_WORLD_SIZE$|GROUP_RANK$|JOB_COMPLETION_INDEX$|PYTHONHASHSEED$)"
)
"""Variables that change how a run behaves. Only these are written down, and of these none that may hold a
secret."""


def create_run_dir(out: str | Path, name: str) -> Path:
    """Makes ``OUT/name-YYYYmmdd-HHMMSS-xxxx`` and points ``OUT/latest`` at it; for rank 0, which tells the
    others.

    Raises ``UserError`` where the folder cannot be made.
    """
    out = Path(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        while True:
            run_dir = out / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
            try:
                (run_dir / "events").mkdir(parents=True, exist_ok=False)
                break
            except FileExistsError:
                continue
    except OSError as error:
        raise UserError(
            f"telemetry.out={out}: no run folder can be made there ({error.strerror}); name a writable folder"
        ) from None
    _point_latest(out, run_dir.name)
    return run_dir


def write_config(run_dir: Path, config: RunConfig) -> Path:
    """``config.yaml``: every value the run resolved to, readable as a run file again."""
    path = run_dir / "config.yaml"
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    _write_atomic(path, text.encode())
    return path


def write_environment(run_dir: Path, extra: Mapping[str, Any] | None = None) -> Path:
    """``environment.json``: versions, host, processor, commit and the variables that matter; never a secret.

    ``extra``: what only the caller can tell, such as device names.
    """
    return _write_json(run_dir / "environment.json", {**environment(), **(extra or {})})


def write_summary(run_dir: Path, summary: Mapping[str, Any]) -> Path:
    """``summary.json``, whole or not at all."""
    return _write_json(run_dir / "summary.json", summary)


def environment() -> dict[str, Any]:
    """What ``environment.json`` holds. Takes up to about two seconds (it asks git)."""
    return {
        "trainsys": __version__,
        "python": platform.python_version(),
        "packages": versions(),
        "hostname": socket.gethostname(),
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": _memory_bytes(),
        "git": _git(),
        "cwd": os.getcwd(),
        "command": without_secrets(sys.orig_argv),
        "variables": safe_variables(os.environ),
    }


def versions() -> dict[str, str]:
    """Installed versions of the packages that matter, without importing any."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def safe_variables(variables: Mapping[str, str]) -> dict[str, str]:
    """Those of ``variables`` that may be written down: on the list, not secret by name, no password in a
    URL."""
    return {
        name: without_password(value)
        for name, value in sorted(variables.items())
        if ENVIRONMENT.match(name) and not is_secret(name)
    }


def _point_latest(out: Path, name: str) -> None:
    """``latest`` is moved in one step; where it cannot be (no links there, or a real folder), the run goes
    on."""
    link = out / "latest"
    if link.exists() and not link.is_symlink():
        return
    temporary = out / f".latest-{name}"
    try:
        temporary.symlink_to(name)
        os.replace(temporary, link)
    except OSError:
        temporary.unlink(missing_ok=True)


def _write_json(path: Path, value: Mapping[str, Any]) -> Path:
    _write_atomic(path, msgspec.json.format(msgspec.json.encode(dict(value)), indent=2) + b"\n")
    return path


def _write_atomic(path: Path, data: bytes) -> None:
    """The old content or the new, never a part: written beside, made durable, then moved over."""
    fd, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(fd, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _git() -> dict[str, Any] | None:
    """Commit of the working folder and whether it has changes; None outside a repository or without git."""

    def ask(*args: str) -> str:
        done = subprocess.run(["git", *args], capture_output=True, text=True, timeout=2, check=True)
        return done.stdout.strip()

    try:
        return {
            "commit": ask("rev-parse", "HEAD"),
            "changed": bool(ask("status", "--porcelain", "--untracked-files=no")),
        }
    except (OSError, subprocess.SubprocessError):
        return None


def _cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor()
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found.group(1) if found else platform.machine()


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
