"""What may be a secret, by its name, and how it is kept out of what is written down.

Values of ``launch.env`` are never written, whatever their names: the config holds them as `SecretStr`, so a dump shows
`MASK`. This module is for the other ways by which one may get into a file: command lines, shell lines, manifests.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

MASK = "*" * 10
"""What pydantic's ``SecretStr`` shows of any value."""

SECRET = re.compile(r"KEY|TOKEN(?!IZ)|SECRET|PASS|CRED|AUTH|JWT|COOKIE|SIGNATURE", re.IGNORECASE)
_USER_IN_URL = re.compile(r"(\w+://)[^/\s@]+@")
_ASSIGNED = re.compile(r"\b([A-Za-z_]\w*)=([^\s,;]*)")
_ENV = ("launch.env=", "launch.env.")


def is_secret(name: str, value: str = "") -> bool:
    """Whether a variable of this name, or with a password in the URL that is its value, is to be kept secret."""
    return bool(SECRET.search(name) or _USER_IN_URL.search(value))


def without_password(text: str) -> str:
    """``text`` with the user and password of every URL struck out."""
    return _USER_IN_URL.sub(r"\1***@", text)


def assigned_secrets(lines: Iterable[str]) -> list[str]:
    """Names of the secrets whose values shell lines or options spell out; ``KEY=$(cat file)`` does not."""
    return [
        name
        for line in lines
        for name, value in _ASSIGNED.findall(line)
        if SECRET.search(name) and value.strip("'\"") and not value.strip("'\"").startswith(("$", "`"))
    ]


def is_env(override: str) -> bool:
    """Whether an override sets variables of the ranks: its value is not to be shown."""
    return override.strip().startswith(_ENV)


def without_secrets(argv: Sequence[str]) -> list[str]:
    """A command line with the values of ``launch.env`` and of secret-looking options struck out."""
    shown: list[str] = []
    hide = False
    for word in argv:
        name, equals, _ = word.partition("=")
        secret = is_env(word) or (bool(SECRET.search(name)) and (bool(equals) or word.startswith("-")))
        # A list or mapping written as one word, such as launch.setup=[export TOKEN=...], holds names of its own.
        secret = secret or bool(equals and assigned_secrets([word.partition("=")[2]]))
        shown.append("***" if hide else f"{name}=***" if secret and equals else without_password(word))
        hide = secret and not equals and word.startswith("-")
    return shown
