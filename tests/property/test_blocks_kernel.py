"""Activations in blocks: every kernel family beside an emulation that shares no code with it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitnet_py import _kernels
from bitnet_py.errors import NativeError
from bitnet_py.quants import pack_i2_s
from tests.support import q8_k
from tests.support.families import each_family


def drawn(seed: int, rows: int, cols: int, n_blocks: int) -> tuple[np.ndarray, np.ndarray]:
    """Return activations, some blocks zero, some values on ties; and signs."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((cols, n_blocks, 256)) * 2.0 ** rng.integers(-8, 9, (cols, n_blocks, 1))
    x[rng.random((cols, n_blocks)) < 0.1] = 0.0
    x = x.astype(np.float32)
    ties = rng.random((cols, n_blocks)) < 0.3
    x[ties] = np.float32(0.5) * rng.integers(-253, 254, (int(ties.sum()), 256)).astype(np.float32)
    x[ties, 17] = rng.choice(np.array([127.0, -127.0], np.float32), int(ties.sum()))
    return x.reshape(cols, -1), rng.integers(-1, 2, (rows, 256 * n_blocks)).astype(np.int8)


@each_family
@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 9),
    st.integers(1, 6),
    st.integers(1, 4),
    st.booleans(),
    st.booleans(),
)
@settings(max_examples=15, deadline=None)
def test_equal_bits(
    kernel: str, seed: int, rows: int, cols: int, n_blocks: int, fused_quantizer: bool, fused_sums: bool
) -> None:
    x, signs = drawn(seed, rows, cols, n_blocks)
    scale = 0.0371
    packed = pack_i2_s(signs).reshape(rows, -1)
    found = _kernels.blocks(
        packed, scale, x, fused_quantizer=fused_quantizer, fused_sums=fused_sums, kernel=kernel
    )
    expected = q8_k.multiply(x, signs, scale, fused=fused_sums, fused_quantizer=fused_quantizer)
    np.testing.assert_array_equal(found.view(np.uint32), expected.view(np.uint32))


@each_family
def test_extreme_codes_do_not_wrap(kernel: str) -> None:
    """A 16-bit lane of weights +1 and activations of one magnitude reaches 8128."""
    x = np.full((2, 1024), 3.0, np.float32)
    x[1] = -3.0
    signs = np.ones((3, 1024), np.int8)
    found = _kernels.blocks(pack_i2_s(signs).reshape(3, -1), 1.0, x, kernel=kernel)
    np.testing.assert_allclose(found, [[3072.0] * 3, [-3072.0] * 3], rtol=1e-6)


def test_rows_that_are_not_whole_blocks() -> None:
    signs = np.ones((1, 128), np.int8)
    with pytest.raises(NativeError, match="multiple of 256"):
        _kernels.blocks(pack_i2_s(signs).reshape(1, -1), 1.0, np.ones((1, 128), np.float32))
