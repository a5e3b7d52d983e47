"""What manifests share: names, the config as text, YAML that people can read."""

from __future__ import annotations

import re
from typing import Any

import yaml

from trainsys.config.run import RunConfig
from trainsys.errors import UserError


class _Dumper(yaml.SafeDumper):
    """Text of several lines as a block."""


def _text(dumper: _Dumper, value: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)


_Dumper.add_representer(str, _text)


def dump(document: dict[str, Any]) -> str:
    """YAML in the order of the keys."""
    return yaml.dump(document, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def config_text(run: RunConfig) -> str:
    """The config as YAML: what differs from the defaults, without ``launch:``, which a rank does not need."""
    return dump(run.model_dump(mode="json", exclude_defaults=True, exclude={"launch"}))


def dns_name(name: str, room: int) -> str:
    """``name`` as a Kubernetes object may be called (RFC 1123); UserError if nothing of it is left."""
    made = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:room].rstrip("-")
    if not made or not made[0].isalpha():
        raise UserError(
            f"name: {name}: a Kubernetes object's name begins with a letter; choose another run name"
        )
    return made
