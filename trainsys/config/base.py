"""The base of every config model: unknown keys refused, no silent coercion, immutable."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Strict(BaseModel):
    """Frozen; an unknown key is an error; ``true`` is not a 1 and ``"8"`` is not an 8."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
