"""Which part of a full parameter a rank holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class ShardSpec:
    """A box of a full parameter: ``[start, stop) = bounds[d]`` along each dim d of ``full_shape``."""

    full_shape: tuple[int, ...]
    bounds: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        assert len(self.full_shape) == len(self.bounds), f"{self}: one pair of bounds a dim"
        for size, (start, stop) in zip(self.full_shape, self.bounds, strict=True):
            assert 0 <= start <= stop <= size, f"{self}: bounds outside of the parameter"

    @classmethod
    def whole(cls, shape: Sequence[int]) -> ShardSpec:
        """The parameter, all of it."""
        return cls(tuple(shape), tuple((0, n) for n in shape))

    @classmethod
    def along(cls, full_shape: Sequence[int], dim: int, start: int, stop: int) -> ShardSpec:
        """A slice of one dim."""
        return cls.whole(full_shape).narrow(dim, start, stop)

    @property
    def local_shape(self) -> tuple[int, ...]:
        return tuple(stop - start for start, stop in self.bounds)

    def narrow(self, dim: int, start: int, stop: int) -> ShardSpec:
        """The part ``[start, stop)`` of this shard along ``dim``, counted from the shard's own start."""
        origin, end = self.bounds[dim]
        assert 0 <= start <= stop <= end - origin, f"{self}: [{start}, {stop}) is outside of dim {dim}"
        bounds = (*self.bounds[:dim], (origin + start, origin + stop), *self.bounds[dim + 1 :])
        return ShardSpec(self.full_shape, bounds)
