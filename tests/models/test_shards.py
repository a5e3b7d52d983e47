"""ShardSpec: a slice of a slice is a slice, as numpy slices."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainsys.models.shards import ShardSpec


def held(spec: ShardSpec) -> np.ndarray:
    numbered = np.arange(np.prod(spec.full_shape)).reshape(spec.full_shape)
    return numbered[tuple(slice(a, b) for a, b in spec.bounds)]


@given(st.data())
def test_narrowing_is_slicing(data):
    shape = tuple(data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))
    spec, array = ShardSpec.whole(shape), held(ShardSpec.whole(shape))
    for _ in range(data.draw(st.integers(0, 4))):
        dim = data.draw(st.integers(0, len(shape) - 1))
        start = data.draw(st.integers(0, array.shape[dim]))
        stop = data.draw(st.integers(start, array.shape[dim]))
        spec, array = spec.narrow(dim, start, stop), array.take(range(start, stop), axis=dim)
    assert spec.local_shape == array.shape
    np.testing.assert_array_equal(held(spec), array)


def test_along_is_one_slice_of_the_whole():
    assert ShardSpec.along((8, 6), 1, 2, 4) == ShardSpec((8, 6), ((0, 8), (2, 4)))


@pytest.mark.parametrize("bounds", [((0, 9), (0, 6)), ((-1, 4), (0, 6)), ((5, 4), (0, 6)), ((0, 8),)])
def test_bounds_outside_of_the_parameter_are_a_defect(bounds):
    with pytest.raises(AssertionError):
        ShardSpec((8, 6), bounds)
    if len(bounds) == 2:
        with pytest.raises(AssertionError):
            ShardSpec.along((8, 6), 0, *bounds[0])
