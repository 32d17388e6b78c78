from __future__ import annotations

import struct

import gguf
import numpy as np
import pytest
from gguf import quants

from bitnet_py.errors import ModelError
from bitnet_py.ggml_types import BLOCK_LAYOUT, GGMLType
from bitnet_py.quants import pack_codes, unpack_codes
from bitnet_py.tq import TQ_TYPES, repack, tq_tensor

THEIRS = {GGMLType.TQ1_0: gguf.GGMLQuantizationType.TQ1_0, GGMLType.TQ2_0: gguf.GGMLQuantizationType.TQ2_0}
SCALE = 0.0299072265625  # a float16
ZEROS = np.ones((1, 256), np.uint8)

both = pytest.mark.parametrize("ggml_type", TQ_TYPES, ids=lambda t: t.name)


def random_codes(rows: int = 5, cols: int = 768, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 3, (rows, cols), dtype=np.uint8)


def blocks_of(codes: np.ndarray, scale: float, ggml_type: GGMLType) -> np.ndarray:
    data = tq_tensor(pack_codes(codes), scale, ggml_type)
    return data.reshape(-1, BLOCK_LAYOUT[ggml_type][1]).copy()


@both
def test_the_gguf_package_reads_what_is_written(ggml_type: GGMLType) -> None:
    codes = random_codes()
    values = quants.dequantize(tq_tensor(pack_codes(codes), SCALE, ggml_type).reshape(5, -1), THEIRS[ggml_type])
    np.testing.assert_array_equal(values, (codes.astype(np.float32) - 1) * np.float32(SCALE))


@both
def test_what_the_gguf_package_writes_is_read(ggml_type: GGMLType) -> None:
    codes = random_codes()
    values = (codes.astype(np.float32) - 1) * np.float32(SCALE)
    data = quants.quantize(values, THEIRS[ggml_type])
    packed, scale = repack(data.reshape(-1), ggml_type)
    np.testing.assert_array_equal(unpack_codes(packed).reshape(codes.shape), codes)
    assert scale == SCALE
    np.testing.assert_array_equal(data.reshape(-1), tq_tensor(packed, scale, ggml_type))


def test_any_tq1_0_byte_is_read_as_the_gguf_package_reads_it() -> None:
    """Also bytes that no quantiser writes."""
    data = np.random.default_rng(1).integers(0, 256, (40, 54), dtype=np.uint8)
    data[:, -2:] = np.frombuffer(struct.pack("<e", SCALE), np.uint8)
    packed, _ = repack(data.reshape(-1), GGMLType.TQ1_0)
    values = quants.dequantize(data, THEIRS[GGMLType.TQ1_0])
    np.testing.assert_array_equal((unpack_codes(packed).reshape(40, 256).astype(np.float32) - 1) * SCALE, values)


def test_worked_example_of_the_docstring() -> None:
    codes = np.ones((1, 256), np.uint8)
    codes[0, [7, 39, 71, 103, 135]] = [2, 0, 1, 1, 1]
    assert blocks_of(codes, 1.0, GGMLType.TQ1_0)[0, 7] == 185
    codes[0, [7, 39, 71, 103]] = [2, 0, 1, 2]
    assert blocks_of(codes, 1.0, GGMLType.TQ2_0)[0, 7] == 0b10_01_00_10


@both
@pytest.mark.parametrize("scale", [0.0, 5.0, -3.0])
def test_the_scale_of_a_block_of_zeros_does_not_matter(ggml_type: GGMLType, scale: float) -> None:
    codes = np.concatenate([ZEROS, random_codes(1, 512), ZEROS], axis=1)
    blocks = blocks_of(codes, SCALE, ggml_type)
    blocks[[0, 3], -2:] = np.frombuffer(struct.pack("<e", scale), np.uint8)
    packed, found = repack(blocks.reshape(-1), ggml_type)
    assert found == SCALE
    np.testing.assert_array_equal(unpack_codes(packed).reshape(codes.shape), codes)


@both
def test_a_block_of_scale_zero_is_zero(ggml_type: GGMLType) -> None:
    blocks = blocks_of(random_codes(1), SCALE, ggml_type)
    blocks[1, -2:] = 0
    packed, scale = repack(blocks.reshape(-1), ggml_type)
    assert scale == SCALE
    assert (unpack_codes(packed)[256:512] == 1).all()
    assert (unpack_codes(packed)[:256] != 1).any()


@both
def test_a_matrix_of_zeros_has_a_usable_scale(ggml_type: GGMLType) -> None:
    packed, scale = repack(np.tile(blocks_of(ZEROS, 1.0, ggml_type), (3, 1)).reshape(-1), ggml_type)
    assert scale == 1.0
    assert (packed == 0x55).all()


@both
def test_blocks_of_different_scales_are_refused(ggml_type: GGMLType) -> None:
    blocks = blocks_of(random_codes(), SCALE, ggml_type)
    blocks[7, -2:] = np.frombuffer(struct.pack("<e", 0.5), np.uint8)
    message = rf"different scales: expected one for the whole matrix, found {SCALE} in block 0 and 0.5 in block 7"
    with pytest.raises(ModelError, match=message):
        repack(blocks.reshape(-1), ggml_type)


@both
@pytest.mark.parametrize("scale", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("codes", [random_codes(1), np.tile(ZEROS, 3)], ids=["weights", "zeros"])
def test_a_scale_that_is_not_finite_is_refused(ggml_type: GGMLType, scale: float, codes: np.ndarray) -> None:
    blocks = blocks_of(codes, SCALE, ggml_type)
    blocks[2, -2:] = np.frombuffer(struct.pack("<e", scale), np.uint8)
    with pytest.raises(ModelError, match=f"scale of block 2: expected a finite value, found {scale}"):
        repack(blocks.reshape(-1), ggml_type)


@both
def test_a_negative_scale_is_refused(ggml_type: GGMLType) -> None:
    blocks = blocks_of(random_codes(), SCALE, ggml_type)
    blocks[:, -2:] = np.frombuffer(struct.pack("<e", -SCALE), np.uint8)
    with pytest.raises(ModelError, match="scale of block 0: expected a value above 0"):
        repack(blocks.reshape(-1), ggml_type)


@pytest.mark.parametrize("shift", [0, 2, 4, 6])
def test_code_3_is_refused_wherever_it_stands(shift: int) -> None:
    blocks = blocks_of(random_codes(), SCALE, GGMLType.TQ2_0)
    blocks[4, 20] |= 3 << shift
    with pytest.raises(ModelError, match="codes of block 4: expected 0, 1 or 2, found 3"):
        repack(blocks.reshape(-1), GGMLType.TQ2_0)


@both
@pytest.mark.parametrize("scale", [1e-6, 7e4, float("nan"), 0.0])
def test_a_scale_that_no_float16_holds_is_refused(ggml_type: GGMLType, scale: float) -> None:
    with pytest.raises(ModelError, match=f"{ggml_type.name} scale: expected one that a float16 holds"):
        tq_tensor(pack_codes(ZEROS), scale, ggml_type)


@both
def test_long_tensors_are_read_and_written_in_parts(monkeypatch: pytest.MonkeyPatch, ggml_type: GGMLType) -> None:
    codes = random_codes()
    whole = tq_tensor(pack_codes(codes), SCALE, ggml_type)
    monkeypatch.setattr("bitnet_py.tq._CHUNK_BLOCKS", 4)
    np.testing.assert_array_equal(tq_tensor(pack_codes(codes), SCALE, ggml_type), whole)
    np.testing.assert_array_equal(repack(whole, ggml_type)[0], pack_codes(codes))
