"""Probe how a loaded bitnet.cpp rounds (docs/numerics.md lists what depends on the build).

Two things depend on compiler and instruction set: the number of lanes of float32 reductions (8 in
AVX2 builds, 16 in AVX-512 builds), and whether the activation quantiser's product is rounded before
it is rounded to an integer (clang) or not (gcc contracts both into one fused operation).
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_float, c_int32, c_int64, c_void_p

import numpy as np
import numpy.typing as npt

from crossval.bitnet_cpp import abi

_ROWS = 24
_LENGTH = 256


def simd_width(library: ctypes.CDLL) -> int | None:
    """Return 16 or 8 when the library's F16 dot product sums in that many lanes, else None."""
    try:
        lookup = library.ggml_get_type_traits
    except AttributeError:
        return None
    lookup.restype = POINTER(abi.TypeTraits)
    lookup.argtypes = [ctypes.c_int]
    traits = lookup(abi.TYPE_F16).contents
    layout = (traits.type_name, traits.blck_size, traits.type_size, traits.vec_dot_type, traits.nrows)
    if layout != (b"f16", 1, 2, abi.TYPE_F16, 1) or not traits.vec_dot:
        return None
    vec_dot = abi.VEC_DOT(traits.vec_dot)
    x, y = dot_inputs()
    actual = np.zeros(len(x), np.float32)
    for i in range(len(x)):
        result = c_float()
        vec_dot(_LENGTH, ctypes.byref(result), 0, x[i].ctypes.data, 0, y[i].ctypes.data, 0, 1)
        actual[i] = result.value
    for width in (16, 8):
        if np.array_equal(actual, dot16(x, y, width)):
            return width
    return None


def dot_inputs() -> tuple[npt.NDArray[np.float16], npt.NDArray[np.float16]]:
    """Return two F16 arrays ``(rows, length)`` on which 8 and 16 lanes give different bits."""
    rng = np.random.default_rng(20240607)
    x = (rng.standard_normal((_ROWS, _LENGTH)) * 2.0 ** rng.integers(-6, 7, (_ROWS, _LENGTH))).astype(np.float16)
    y = rng.standard_normal((_ROWS, _LENGTH)).astype(np.float16)
    return x, y


def dot16(x: npt.NDArray[np.float16], y: npt.NDArray[np.float16], width: int) -> npt.NDArray[np.float32]:
    """Emulate ``ggml_vec_dot_f16`` (``ggml.c``) with ``width`` lanes on rows whose length is a multiple of 64.

    Four accumulators of ``width`` lanes take the products, one accumulator after the other, by
    fused multiply-add. Products of two F16 numbers are exact in binary32 at these magnitudes, so
    adding them rounds exactly as the fused operation.
    """
    products = x.astype(np.float32) * y.astype(np.float32)
    steps = products.reshape(len(x), -1, 4, width)
    acc = np.zeros((len(x), 4, width), np.float32)
    for step in range(steps.shape[1]):
        acc = acc + steps[:, step]
    lanes = (acc[:, 0] + acc[:, 2]) + (acc[:, 1] + acc[:, 3])
    if width == 8:
        four = lanes[:, :4] + lanes[:, 4:]
        total: npt.NDArray[np.float32] = (four[:, 0] + four[:, 1]) + (four[:, 2] + four[:, 3])
        return total
    while lanes.shape[1] > 1:
        half = lanes.shape[1] // 2
        lanes = lanes[:, :half] + lanes[:, half:]
    return np.ascontiguousarray(lanes[:, 0])


def fused_quantizer(library: ctypes.CDLL) -> bool | None:
    """Return whether ``quantize_row_i8_s`` rounds product and integer in one step; None if it is missing."""
    try:
        quantize = library.quantize_row_i8_s
    except AttributeError:
        return None
    quantize.restype = None
    quantize.argtypes = [c_void_p, c_void_p, c_int64, POINTER(c_float), POINTER(c_int32)]
    row, separate, fused = quantizer_row()
    result = np.zeros(len(row) + 64, np.int8)
    scale, total = c_float(), c_int32()
    quantize(row.ctypes.data, result.ctypes.data, len(row), ctypes.byref(scale), ctypes.byref(total))
    if scale.value != 127.0:
        return None
    actual = result[: len(row)]
    if np.array_equal(actual, separate):
        return False
    return True if np.array_equal(actual, fused) else None


def quantizer_row() -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int8], npt.NDArray[np.int8]]:
    """Return a row with maximum 1 (so the scale is 127) and its int8 values rounded in two steps and in one.

    Its elements are those float32 neighbours of ``(k + 1/2) / 127`` whose product with 127 is a tie
    after rounding to binary32 but not before.
    """
    found = [np.float32(1.0)]
    for k in range(-126, 126):
        x = np.float32((k + 0.5) / 127.0)
        for candidate in (np.nextafter(x, np.float32(-2)), x, np.nextafter(x, np.float32(2))):
            exact = np.float64(candidate) * 127.0
            if np.rint(exact) != np.rint(np.float64(np.float32(exact))):
                found.append(candidate)
    found += [np.float32(0.0)] * (-len(found) % 32)
    row = np.array(found, np.float32)
    exact_products = row.astype(np.float64) * 127.0
    separate = np.rint(exact_products.astype(np.float32)).astype(np.int8)
    return row, separate, np.rint(exact_products).astype(np.int8)
