"""What this machine was measured to do, kept between runs: written by ``trainsys.bench``, no torch here."""

from __future__ import annotations

import json
import os
import platform
import tempfile
from importlib import metadata
from pathlib import Path

from pydantic import PositiveFloat, PositiveInt, ValidationError

from trainsys.config.base import Strict
from trainsys.hardware.catalogue import DType
from trainsys.hardware.machine import usable_cores


class MeasurementKey(Strict):
    """Everything that moves a matmul ceiling: another value of any field is another ceiling."""

    device: str
    """CPU model, or torch's device name."""
    cores: PositiveInt
    """Cores this process may use; a container's share, not the machine's."""
    torch: str
    dtype: DType
    processes: PositiveInt
    threads: PositiveInt

    @classmethod
    def here(cls, dtype: DType, processes: int, threads: int, device: str | None = None) -> MeasurementKey:
        """The key of this machine; ``device`` None is its CPU."""
        return cls(
            device=device or cpu_model(),
            cores=usable_cores(),
            torch=metadata.version("torch"),
            dtype=dtype,
            processes=processes,
            threads=threads,
        )

    @property
    def text(self) -> str:
        fields = (self.device, f"{self.cores} cores", f"torch {self.torch}", self.dtype)
        return " | ".join((*fields, f"{self.processes} processes", f"{self.threads} threads"))


class Measurement(Strict):
    """A measured ceiling, over all its processes together."""

    key: MeasurementKey
    flops_per_s: PositiveFloat
    shape: tuple[int, int, int]
    """(m, n, k) of the product that was fastest."""
    seconds: PositiveFloat
    """How long each shape ran."""

    @property
    def label(self) -> str:
        procs, threads = self.key.processes, self.key.threads
        workers = f"{procs} proc{'s' if procs > 1 else ''} x {threads} thread{'s' if threads > 1 else ''}"
        return f"measured here (matmul {self.key.dtype} {workers})"


def cpu_model() -> str:
    """The CPU's name, as the kernel gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def cache_path() -> Path:
    """``ceilings.json`` in ``$TRAINSYS_CACHE``, else in the user's cache folder."""
    own = os.environ.get("TRAINSYS_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return (Path(own) if own else Path(base) / "trainsys") / "ceilings.json"


def _read(path: Path) -> dict[str, object]:
    # A cache that cannot be read is a cache that is empty: the worst that follows is measuring again.
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def load_measurement(key: MeasurementKey, path: Path | None = None) -> Measurement | None:
    """The stored ceiling for exactly this key, or None."""
    row = _read(path or cache_path()).get(key.text)
    try:
        found = Measurement.model_validate_json(json.dumps(row))
    except ValidationError:
        return None
    return found if found.key == key else None


def store_measurement(measurement: Measurement, path: Path | None = None) -> None:
    """Add to the store, unless a faster one of the same key is there: other load only ever slows a measurement.

    Of concurrent writers the last one wins.

    Raises:
        OSError: the folder cannot be written.
    """
    path = path or cache_path()
    known = load_measurement(measurement.key, path)
    if known is not None and known.flops_per_s >= measurement.flops_per_s:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    content = _read(path) | {measurement.key.text: measurement.model_dump(mode="json")}
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
        json.dump(content, file, indent=1)
    os.replace(file.name, path)
