"""YAML files that lie beside the code: plain values, read with PyYAML's C parser where there is one."""

from __future__ import annotations

import pkgutil
from typing import Any

import yaml


def shipped_yaml(package: str, name: str) -> Any:
    """The values of ``name`` in the folder of ``package``."""
    text = pkgutil.get_data(package, name)
    assert text is not None, f"{package} is loaded by something that has no files"
    return yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
