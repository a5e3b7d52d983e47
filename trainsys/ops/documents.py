"""Where the documents of packed rows begin and end, known on the host.

A document is a run of consecutive tokens. Made once a micro-batch from the loader's arrays, so that nobody asks a
device for numbers: lengths decide which kernels run, and reading them back would make the host wait.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
from torch import Tensor

Run = tuple[int, int]
"""First place of a document in its row, and the place after its last."""


class Documents:
    """``rows``: for each of B rows its documents, in order and without gaps; one entry where all rows are alike.

    Deliberately no pytree, dataclass or tensor: FSDP2 moves every tensor in a model's arguments to the device.
    """

    def __init__(self, rows: tuple[tuple[Run, ...], ...], batch: int, seq: int) -> None:
        self.rows, self.batch, self.seq = rows, batch, seq

    @classmethod
    def of(cls, ids: Tensor | np.ndarray[Any, Any] | Documents) -> Documents:
        """From ``ids [B, S]``, an integer a token, compared for equality within a row.

        Raises AssertionError where tokens of one number are not next to each other.
        """
        if isinstance(ids, Documents):
            return ids
        values = ids.cpu().numpy() if isinstance(ids, Tensor) else ids
        rows = tuple(_runs(row) for row in values)
        batch, seq = values.shape
        return cls(rows[:1] if len(set(rows)) == 1 else rows, batch, seq)

    def starts(self) -> np.ndarray[Any, Any]:
        """The place where each token's document begins: int64 ``[B or 1, S]``."""
        return np.stack([np.repeat([a for a, _ in runs], [b - a for a, b in runs]) for runs in self.rows])

    def pairs(self) -> int:
        """(query, key) pairs that causal attention computes over all rows, without a window."""
        alike = self.batch // len(self.rows)
        return alike * sum((b - a) * (b - a + 1) // 2 for runs in self.rows for a, b in runs)


def _runs(row: np.ndarray[Any, Any]) -> tuple[Run, ...]:
    edges = np.flatnonzero(row[1:] != row[:-1]) + 1
    if len(edges) and (row[1:] < row[:-1]).any() and len(np.unique(row)) != len(edges) + 1:
        raise AssertionError("a document's tokens must be next to each other in their row, and here some are not")
    return tuple(pairwise((0, *edges.tolist(), len(row))))
