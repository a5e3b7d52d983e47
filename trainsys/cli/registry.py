"""The commands there are; the modules beside this one put theirs in."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

Run = Callable[[argparse.Namespace], "int | None"]
Argument = tuple[tuple[str, ...], dict[str, Any]]

COMMANDS: dict[str, tuple[Run, str, tuple[Argument, ...]]] = {}


def arg(*names: str, **options: Any) -> Argument:
    """One argument, as `argparse.ArgumentParser.add_argument` takes it."""
    return names, options


def command(name: str, summary: str, *arguments: Argument) -> Callable[[Run], Run]:
    """Register the decorated function as the command ``name``."""

    def register(run: Run) -> Run:
        COMMANDS[name] = (run, summary, arguments)
        return run

    return register


RUN = arg("run", metavar="RUN.yaml", help="a config file, or the name of one that comes with trainsys")
OVERRIDES = arg(
    "overrides", metavar="section.key=value", nargs="*", help="laid over the file, e.g. parallel.tp=2"
)
