"""YAML files that lie beside the code: plain values, read with PyYAML's C parser where there is one."""

from __future__ import annotations

from importlib import resources
from typing import Any

import yaml


def shipped_yaml(package: str, name: str) -> Any:
    """The values of ``name`` in the folder of ``package``."""
    text = resources.files(package).joinpath(name).read_text(encoding="utf-8")
    return yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
