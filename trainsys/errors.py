"""The one exception for what a user did, and the exit code it becomes."""

from __future__ import annotations

EXIT_USER_ERROR = 2


class UserError(ValueError):
    """A mistake in the input: one line that says what is wrong, where, and what would work.

    The command line prints it without a traceback and exits with 2. Library callers catch it as a
    ``ValueError``. What can only be a defect of trainsys itself is an ``assert``, never this.
    """
