"""The base of every config model: unknown keys refused, no silent coercion, immutable."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Name = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
"""A variable of a process."""
Plain = Annotated[str, Field(pattern=r"^[^\n\r]+$")]
"""One line: these values become lines of a job file."""


class Strict(BaseModel):
    """Frozen; an unknown key is an error; ``true`` is not a 1 and ``"8"`` is not an 8."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
