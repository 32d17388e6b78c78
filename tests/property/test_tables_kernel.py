"""Products with tables of every type: every kernel family beside an emulation that shares no code with it."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from bitnet_py import _kernels, tables
from bitnet_py.arithmetic import Arithmetic
from bitnet_py.errors import NativeError
from bitnet_py.ggml_types import GGMLType
from bitnet_py.tables import TABLE_TYPES
from tests.support import tables as emulated
from tests.support.families import each_family

each_type = pytest.mark.parametrize("kind", TABLE_TYPES, ids=lambda kind: kind.name)
MULTIPLIED = tuple(kind for kind in TABLE_TYPES if kind is not GGMLType.F16)


def inputs(n_cols: int, n: int, seed: int = 1) -> np.ndarray:
    """Return columns of different sizes; one block of zeros, one value in another that is alone."""
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((n_cols, n)) * 2.0 ** rng.integers(-3, 4, (n_cols, 1))).astype(np.float32)
    x[0, :256] = 0.0
    x[0, 7] = 0.3
    x[-1, -256:] = 0.0
    return x


@each_family
@pytest.mark.parametrize("kind", MULTIPLIED, ids=lambda kind: kind.name)
@pytest.mark.parametrize("main", [False, True], ids=["march", "main"])
@pytest.mark.parametrize(("width", "pairs"), [(8, False), (16, False), (16, True)])
def test_equal_bits(kernel, kind, main, width, pairs):
    rows, x = emulated.random_rows(kind, 9, 768), inputs(3, 768)
    arithmetic = Arithmetic("main" if main else "march", width, bfloat_pairs=pairs)
    for tiled in (False, True):
        found = _kernels.table(rows, kind, x, arithmetic=arithmetic, is_tiled=tiled, kernel=kernel)
        expected = emulated.multiply(rows, kind, x, main=main, width=width, pairs=pairs, tiled=tiled)
        np.testing.assert_array_equal(found.view(np.uint32), expected.view(np.uint32))


@each_family
@pytest.mark.parametrize("main", [False, True], ids=["march", "main"])
def test_packed_rows(kernel, main):
    rows, x = emulated.random_rows(GGMLType.Q4_0, 19, 768), inputs(3, 768)
    arithmetic = Arithmetic("main" if main else "march", 16)
    found = _kernels.table(rows, GGMLType.Q4_0, x, arithmetic=arithmetic, packed=True, kernel=kernel)
    options = {"main": main, "width": 16, "pairs": False, "tiled": False}
    expected = emulated.multiply(rows, GGMLType.Q4_0, x, packed=True, **options)
    np.testing.assert_array_equal(found.view(np.uint32), expected.view(np.uint32))
    other = emulated.multiply(rows, GGMLType.Q4_0, x, packed=False, **options)
    assert np.array_equal(expected, other) is not main


@each_type
def test_values_are_those_of_the_gguf_package(kind):
    rows = emulated.random_rows(kind, 5, 512)
    expected = {GGMLType.F16: lambda: rows.view("<f2"), GGMLType.F32: lambda: rows.view("<f4")}.get(
        kind, lambda: gguf.dequantize(rows, gguf.GGMLQuantizationType(int(kind)))
    )()
    found = np.stack([tables.values(row, kind) for row in rows])
    np.testing.assert_array_equal(found.view(np.uint32), expected.astype(np.float32).view(np.uint32))


@pytest.mark.parametrize("kind", [GGMLType.Q6_K, GGMLType.Q3_K], ids=lambda kind: kind.name)
def test_values_of_written_codes(kind):
    """The formats of which the package has no writer, from codes and scales that were chosen."""
    rng = np.random.default_rng(3)
    if kind is GGMLType.Q6_K:
        codes, scales = rng.integers(-32, 32, (2, 256)), rng.integers(-128, 128, (2, 16)).astype(np.int8)
        blocks = emulated.pack_q6_k(codes, scales, np.array([0.25, -2.0], "<f2"))
    else:
        codes, scales = rng.integers(-4, 4, (2, 256)), rng.integers(-32, 32, (2, 16)).astype(np.int8)
        blocks = emulated.pack_q3_k(codes, scales, np.array([0.25, -2.0], "<f2"))
    expected = np.array([[0.25], [-2.0]]) * scales.repeat(16, axis=1).astype(float) * codes
    found = np.stack([tables.values(block, kind) for block in blocks])
    np.testing.assert_array_equal(found, expected)


@each_family
def test_largest_codes_do_not_wrap(kernel):
    """Q6_K: codes 31 and -32 times scales of -128, all activations at the ends of int8."""
    for code in (31, -32):
        codes, scales = np.full((1, 256), code), np.full((1, 16), -128, np.int8)
        rows = emulated.pack_q6_k(codes, scales, np.array([1.0], "<f2"))
        x = np.full((1, 256), 3.0, np.float32)
        for generation in ("march", "main"):
            found = _kernels.table(rows, GGMLType.Q6_K, x, arithmetic=Arithmetic(generation), kernel=kernel)
            np.testing.assert_allclose(found, [[256 * 3.0 * code * -128]], rtol=1e-6)


def test_what_is_not_finite_shows():
    x = inputs(1, 256)
    x[0, 40] = np.nan
    found = _kernels.table(emulated.random_rows(GGMLType.Q8_0, 2, 256), GGMLType.Q8_0, x)
    assert np.isnan(found).all()


def test_refusals():
    rows, x = emulated.random_rows(GGMLType.F16, 2, 256), inputs(1, 256)
    with pytest.raises(NativeError, match="bn_kernel_dots"):
        _kernels.table(rows, GGMLType.F16, x)
    with pytest.raises(NativeError, match="multiple of 128 and of the type's block"):
        _kernels.table(rows, GGMLType.Q6_K, inputs(1, 384)[:, :128].copy())
