"""Where the configs that come with trainsys lie, in a checkout and in an installed wheel."""

from __future__ import annotations

from pathlib import Path


def config_root() -> Path:
    """The folder that holds models/, train/, clusters/ and sweeps/."""
    package = Path(__file__).resolve().parents[1]
    packaged = package / "_data" / "configs"
    return packaged if packaged.is_dir() else package.parent / "configs"
