"""The exceptions for what a user did and for what a machine did, and the exit codes they become."""

from __future__ import annotations

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
    can; it never ends a run as a mistake in the input would.
    """
