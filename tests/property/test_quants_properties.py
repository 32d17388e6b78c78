from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from bitnet_py.quants import find_invalid_code, i2_s_tensor, pack_i2_s, quantize_absmean, unpack_i2_s

shapes = st.tuples(st.integers(1, 9), st.integers(1, 4).map(lambda blocks: 128 * blocks))
ternary = shapes.flatmap(lambda shape: hnp.arrays(np.int8, shape, elements=st.integers(-1, 1)))


@given(ternary)
def test_unpacking_undoes_packing(weights: np.ndarray) -> None:
    packed = pack_i2_s(weights)
    assert packed.size == weights.size // 4
    assert find_invalid_code(packed) is None
    np.testing.assert_array_equal(unpack_i2_s(packed, *weights.shape), weights)


@given(ternary, st.floats(width=32, allow_nan=False))
def test_whole_tensor_keeps_weights_and_scale(weights: np.ndarray, scale: float) -> None:
    tensor = i2_s_tensor(pack_i2_s(weights), scale)
    assert tensor[weights.size // 4 :][:4].view("<f4")[0] == np.float32(scale)
    np.testing.assert_array_equal(unpack_i2_s(tensor, *weights.shape), weights)


@given(hnp.arrays(np.uint8, st.integers(1, 300)))
def test_invalid_code_is_the_first_byte_with_a_3(data: np.ndarray) -> None:
    bad = [i for i, byte in enumerate(data.tolist()) if any(byte >> shift & 3 == 3 for shift in (0, 2, 4, 6))]
    assert find_invalid_code(data) == (bad[0] if bad else None)


@given(ternary, st.floats(2.0**-14, 2.0**20))
def test_absmean_recovers_dense_ternary_weights(weights: np.ndarray, scale: float) -> None:
    """A matrix that is already scale * ternary, half of it non-zero, keeps its pattern above the 1e-5 floor."""
    weights[:, ::2] = np.where(weights[:, ::2] == 0, 1, weights[:, ::2])
    found, _ = quantize_absmean(weights * scale)
    np.testing.assert_array_equal(found, weights)
