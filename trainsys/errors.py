"""The exceptions for what a user did and for what a machine did, and the exit codes they become."""

from __future__ import annotations

import errno

EXIT_USER_ERROR = 2
EXIT_MACHINE_FAULT = 75
"""EX_TEMPFAIL of sysexits.h: nothing in the input is wrong, and the same command may work elsewhere or later."""


class UserError(ValueError):
    """A mistake in the input: one line that says what is wrong, where, and what would work.

    The command line prints it without a traceback and exits with 2. Library callers catch it as a
    ``ValueError``. What can only be a defect of trainsys itself is an ``assert``, never this.
    """


class MachineFault(RuntimeError):
    """A fault of the machine, the network or a disk: one line that says what failed and where.

    The command line prints it without a traceback and exits with 75. A launcher retries it, on other nodes where it
    can; it never ends a run as a mistake in the input would. ``host``: the node at fault; None: the one that raises
    it; empty: none in particular, as for a shared disk that is full.
    """

    def __init__(self, text: str, host: str | None = None) -> None:
        super().__init__(text)
        self.host = host


FULL = {errno.ENOSPC, errno.EDQUOT}
_BROKEN = {
    errno.EIO, errno.EREMOTEIO, errno.ESTALE, errno.EROFS, errno.ENODEV, errno.ENXIO, errno.ETIMEDOUT,
    errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH, errno.ENOLINK,
}  # fmt: skip


def is_machines(error: BaseException) -> bool:
    """Whether ``error`` is what a disk, a file system or a network did, not a path that was named wrongly."""
    return isinstance(error, OSError) and (error.errno in FULL or error.errno in _BROKEN)


def fault_of(error: Exception) -> Exception:
    """``error``, or the MachineFault that it comes down to.

    Wherever an OSError was turned into a UserError that says what was being read or written, the cause is still in
    the chain: so this is the one place that tells a disk that is full from a path that is wrong.
    """
    cause: BaseException | None = error if isinstance(error, UserError | OSError) else None
    while cause is not None:
        if is_machines(cause):
            assert isinstance(cause, OSError)
            text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            where = f"{error.filename}: " if isinstance(error, OSError) and error.filename else ""
            return MachineFault(where + text, "" if cause.errno in FULL else None)
        cause = cause.__cause__ or cause.__context__
    return error
