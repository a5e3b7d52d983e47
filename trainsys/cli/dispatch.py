"""Finds the command that was asked for, parses its arguments, runs it, and turns mistakes into one line."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from trainsys import __version__
from trainsys.cli.registry import COMMANDS
from trainsys.errors import MachineFault, UserError


class _Parser(argparse.ArgumentParser):
    """Mistakes on the command line become UserError, like all others."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0, 2 for a user's mistake, 75 for a machine's fault, 130 for Ctrl-C."""
    try:
        code = _dispatch(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
        return code
    except (UserError, MachineFault) as error:
        from trainsys.failure import error_lines, exit_code

        sys.stderr.write(error_lines(error))
        return exit_code(error)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader (head, less) went away: nothing is wrong. Python's own flush at exit must not fail too.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(_overview())
        return 0
    if argv[0] == "--version":
        print(f"trainsys {__version__}")
        return 0
    name, rest = _find(argv)
    if name is None:
        return 0
    run, summary, arguments = COMMANDS[name]
    parser = _Parser(prog=f"trainsys {name}", description=summary, allow_abbrev=False)
    for names, options in arguments:
        parser.add_argument(*names, **options)
    return run(parser.parse_intermixed_args(rest)) or 0


def _find(argv: list[str]) -> tuple[str | None, list[str]]:
    """The command that ``argv`` names and what follows; None where a group's help was printed."""
    first = argv[0]
    if len(argv) > 1 and f"{first} {argv[1]}" in COMMANDS:
        return f"{first} {argv[1]}", argv[2:]
    if first in COMMANDS:
        return first, argv[1:]
    members = [name for name in COMMANDS if name.startswith(f"{first} ")]
    if members:
        if len(argv) > 1 and argv[1] in ("-h", "--help"):
            print(_overview(members))
            return None, []
        known = [name.split()[1] for name in members]
        if len(argv) == 1:
            raise UserError(f"trainsys {first}: say what: {' or '.join(known)}")
        raise UserError(_unknown(f"{first} ", argv[1], known))
    raise UserError(_unknown("", first, sorted({name.split()[0] for name in COMMANDS})))


def _unknown(group: str, word: str, known: list[str]) -> str:
    from difflib import get_close_matches

    close = get_close_matches(word, known, n=1)
    hint = f"did you mean trainsys {group}{close[0]}?" if close else f"there are {', '.join(known)}"
    return f"unknown command {group}{word}; {hint}"


def _overview(names: Sequence[str] | None = None) -> str:
    shown = list(names or COMMANDS)
    width = max(map(len, shown))
    return "\n".join(
        [
            "usage: trainsys COMMAND …          trainsys COMMAND --help for its arguments",
            "",
            *(f"  {name:<{width}}  {COMMANDS[name][1]}" for name in shown),
            "",
            f"  {'--version':<{width}}  print the version",
        ]
    )
