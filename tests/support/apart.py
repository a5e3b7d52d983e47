"""Call a function in a forked process of its own: what it does to process groups and threads stays there."""

from __future__ import annotations

import multiprocessing as mp
import os
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import support.ranks  # imports what must be there before a fork


def apart(fn: Callable[..., Any], *args: Any) -> Any:
    """``fn(*args)``; an exception there fails the test here."""
    ours, theirs = mp.get_context("fork").Pipe()
    process = mp.get_context("fork").Process(target=_call, args=(fn, args, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        ok, value = ours.recv()
    except EOFError:
        raise support.ranks.RankFailed("the process died") from None
    process.join()
    if not ok:
        raise support.ranks.RankFailed(value)
    return value


def _call(fn: Callable[..., Any], args: tuple[Any, ...], pipe: Connection) -> None:
    try:
        pipe.send((True, fn(*args)))
    except BaseException:
        pipe.send((False, traceback.format_exc()))
    finally:
        os._exit(0)
