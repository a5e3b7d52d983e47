"""Warnings that other engines' code brings on and a user can do nothing about."""

from __future__ import annotations

import warnings

_NOISE: tuple[tuple[str, type[Warning]], ...] = (
    # Both use them, a hundred times per step.
    (r"`torch\.distributed\.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated", FutureWarning),
    # Megatron-Core of a default of its own, and of its optimizer's look at every parameter.
    (r"full scope is deprecated", UserWarning),
    (r"The \.grad attribute of a Tensor that is not a leaf Tensor", UserWarning),
)


def hush() -> None:
    """From here on they are not printed. To be called on every start: filters are the process's."""
    for message, category in _NOISE:
        warnings.filterwarnings("ignore", message=message, category=category)
