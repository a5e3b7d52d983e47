"""The base of every config model: unknown keys refused, no silent coercion, immutable."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

Name = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
"""A variable of a process."""
Plain = Annotated[str, Field(pattern=r"^[^\n\r]+$")]
"""One line: these values become lines of a job file."""


class Strict(BaseModel):
    """Frozen; an unknown key is an error; ``true`` is not a 1 and ``"8"`` is not an 8."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _in_64_bits(cls, value: Any) -> Any:
        """What torch and numpy could not hold would fail somewhere deep in a run."""
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise ValueError(f"expected an integer of 64 bits, got one of {value.bit_length() + 1}")
        return value
