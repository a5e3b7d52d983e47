"""Configs."""

from __future__ import annotations

import argparse

from trainsys.cli.registry import OVERRIDES, RUN, command


@command("config show", "print everything a run resolves to", RUN, OVERRIDES)
def _config_show(args: argparse.Namespace) -> None:
    from trainsys.config.loader import load_run, resolved_yaml

    print(resolved_yaml(load_run(args.run, args.overrides)), end="")


@command("config schema", "print the JSON schema of run configs, for editors")
def _config_schema(args: argparse.Namespace) -> None:
    import json

    from trainsys.config.schema import json_schema

    print(json.dumps(json_schema(), indent=2))
