"""The command line: parses arguments and calls one function a command, imported only then.

To add a command, write a function that takes the parsed arguments, import what it calls inside it, and
put `command` on it. A name of two words, like ``config show``, makes a group. ``--help`` lists them in the
order of the imports below.
"""

from trainsys.cli import plan, runs, jobs, look, bench, config, data, ckpt  # noqa: F401, I001
from trainsys.cli.dispatch import main
from trainsys.cli.registry import COMMANDS

__all__ = ["COMMANDS", "main"]
