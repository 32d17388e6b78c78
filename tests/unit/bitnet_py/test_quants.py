from __future__ import annotations

import struct

import numpy as np
import pytest

from bitnet_py.errors import ModelError
from bitnet_py.quants import i2_s_tensor, pack_i2_s, quantize_absmean, unpack_i2_s

FROM_BITNET_CPP = "25559655585661598664199265499525559655585661598664199265499525550000003f"
"""What ``ggml_quantize_chunk`` of bitnet.cpp (x86) made of the weights below with scale 0.5: block, then scale."""


def test_worked_example_of_the_docstring() -> None:
    weights = np.zeros((1, 128), np.int8)
    weights[0, [5, 37, 69, 101]] = [1, -1, 0, 1]
    packed = pack_i2_s(weights)
    assert packed[5] == 0b10_00_01_10 == 0x86
    assert (np.delete(packed, 5) == 0x55).all()


def test_bytes_equal_those_of_bitnet_cpp() -> None:
    weights = np.array([[(i * i // 5 + i) % 3 - 1 for i in range(128)]], np.int8)
    assert i2_s_tensor(pack_i2_s(weights), 0.5)[:36].tobytes().hex() == FROM_BITNET_CPP


def test_every_element_has_its_own_two_bits() -> None:
    """Compared with the layout written out element by element."""
    rows, cols = 3, 384
    for row in range(rows):
        for col in range(cols):
            weights = np.zeros((rows, cols), np.int8)
            weights[row, col] = 1
            block, inside = divmod(row * cols + col, 128)
            expected = np.full(rows * cols // 4, 0x55, np.uint8)
            shift = 6 - 2 * (inside // 32)
            expected[block * 32 + inside % 32] += 1 << shift
            np.testing.assert_array_equal(pack_i2_s(weights), expected)


def test_tensor_ends_with_the_scale_and_padding() -> None:
    tensor = i2_s_tensor(pack_i2_s(np.ones((2, 128), np.int8)), 0.3)
    assert tensor.size == 2 * 128 // 4 + 32
    assert tensor[64:68].tobytes() == struct.pack("<f", 0.3)
    assert not tensor[68:].any()


@pytest.mark.parametrize("shape", [(1, 64), (1, 129), (128,), (0, 128), (2, 0)])
def test_shapes_that_cannot_be_packed(shape: tuple[int, ...]) -> None:
    with pytest.raises(ModelError, match="cols a multiple of 128"):
        pack_i2_s(np.zeros(shape, np.int8))


@pytest.mark.parametrize("weight", [-2, 2, -128, 127])
def test_weights_that_are_not_ternary(weight: int) -> None:
    weights = np.zeros((1, 128), np.int8)
    weights[0, 77] = weight
    with pytest.raises(ModelError, match=f"{weight}"):
        pack_i2_s(weights)


def test_code_3_is_refused() -> None:
    data = np.full(64, 0x55, np.uint8)
    data[3] = 0b11000000
    with pytest.raises(ModelError, match="code 3 in byte 3"):
        unpack_i2_s(data, 2, 128)


@pytest.mark.parametrize(("rows", "cols", "size"), [(2, 128, 63), (1, 64, 64), (0, 128, 64), (-2, -128, 64)])
def test_data_that_cannot_be_unpacked(rows: int, cols: int, size: int) -> None:
    with pytest.raises(ModelError, match="I2_S unpacking"):
        unpack_i2_s(np.zeros(size, np.uint8), rows, cols)


def test_absmean_follows_the_paper() -> None:
    weights = np.array([[1.25, -1.25, 0.5, -0.5, 0.75, 3.0, 0.0, -0.75]]) * 0.25  # mean of the absolutes: 0.25
    ternary, scale = quantize_absmean(weights)
    assert scale == 0.25
    assert ternary.dtype == np.int8
    # 0.5 rounds to even: 0
    assert ternary.tolist() == [[1, -1, 0, 0, 1, 1, 0, -1]]


def test_absmean_of_zeros_keeps_a_usable_scale() -> None:
    ternary, scale = quantize_absmean(np.zeros((2, 128), np.float32))
    assert not ternary.any()
    assert scale == float(np.float32(1e-5))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_absmean_refuses_weights_that_are_not_finite(bad: float) -> None:
    weights = np.ones((1, 128))
    weights[0, 3] = bad
    with pytest.raises(ModelError, match="NaN or infinity"):
        quantize_absmean(weights)
