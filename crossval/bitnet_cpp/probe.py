"""Probe how a loaded library rounds (docs/numerics.md lists what depends on the build).

Compiler and instruction set decide the number of lanes of float32 reductions (8 in AVX2 builds, 16 in AVX-512
builds), whether sums of F16 products are binary16 themselves (builds for AVX512-FP16), and whether the activation
quantiser's product is rounded before it is rounded to an integer (clang) or not (gcc contracts both into one fused
operation). What matches nothing known is None.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import POINTER, c_float, c_int32, c_int64, c_void_p
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from crossval.bitnet_cpp import abi
from crossval.bitnet_cpp.abi import Library
from crossval.bitnet_cpp.table import ANY, TYPE_BF16, TYPE_F16, DotProduct
from crossval.formats import to_bf16

_ROWS = 24
_LENGTH = 256


def rounding(library: Library) -> dict[str, Any]:
    """Return what ``crossval.passes.Numerics`` says of a build, as far as it was found."""
    lanes, binary16_sums = dot_product(library)
    return {
        "simd_width": lanes,
        "binary16_sums": binary16_sums,
        "fused_quantizer": fused_quantizer(library),
        "bfloat_pairs": bfloat_pairs(library),
    }


def dot_product(library: Library) -> tuple[int | None, bool | None]:
    """Return the lanes of float32 reductions, 16 or 8, and whether F16 products are summed in binary16."""
    vec_dot = _vec_dot(library, library.table.dot)
    if vec_dot is None:
        return None, None
    x, y = dot_inputs()
    actual = _dots(vec_dot, x, y)
    if np.array_equal(actual, dot16_in_binary16(x, y)):
        return 16, True
    for width in (16, 8):
        if np.array_equal(actual, dot16(x, y, width)):
            return width, False
    return None, None


def bfloat_pairs(library: Library) -> bool | None:
    """Return whether BF16 products are added in pairs (builds for AVX512-BF16); None: as no known build does."""
    vec_dot = _vec_dot(library, library.table.dot, TYPE_BF16)
    if vec_dot is None:
        return None
    x, y = (to_bf16(array).astype(np.float32) for array in dot_inputs())
    actual = _dots(vec_dot, *((array.view(np.uint32) >> 16).astype(np.uint16) for array in (x, y)))
    if np.array_equal(actual, dot_bf16_in_pairs(x, y)):
        return True
    return False if any(np.array_equal(actual, dot_bf16(x, y, width)) for width in (8, 16)) else None


def _dots(vec_dot: Callable[..., None], x: npt.NDArray[Any], y: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    found = np.zeros(len(x), np.float32)
    for i in range(len(x)):
        result = c_float()
        vec_dot(_LENGTH, ctypes.byref(result), 0, x[i].ctypes.data, 0, y[i].ctypes.data, 0, 1)
        found[i] = result.value
    return found


def _vec_dot(library: Library, dot: DotProduct | None, kind: int = TYPE_F16) -> Callable[..., None] | None:
    """Return the library's dot product of F16 or BF16 vectors; None when it is not where the table says."""
    if dot is None:
        return None
    names = (dot.lookup,) if dot.prepare is None else (dot.prepare, dot.lookup)
    if not all(hasattr(library.shared_object, name) for name in names):
        return None
    if dot.prepare is not None:
        prepare = getattr(library.shared_object, dot.prepare)
        prepare.restype = None
        prepare()
    lookup = getattr(library.shared_object, dot.lookup)
    lookup.restype = POINTER(dot.traits.struct)
    lookup.argtypes = [ctypes.c_int]
    pointer = lookup(kind)
    if not pointer:
        return None
    traits: Any = pointer.contents
    own: dict[str, Any] = {} if kind == TYPE_F16 else {"type_name": b"bf16", "vec_dot_type": kind}
    expected = {name: value for name, _, value in dot.traits.fields}
    expected |= {name: value for name, value in own.items() if name in expected}
    fits = all(value is ANY or getattr(traits, name) == value for name, value in expected.items())
    return abi.VEC_DOT(traits.vec_dot) if fits and traits.vec_dot else None


def dot_inputs() -> tuple[npt.NDArray[np.float16], npt.NDArray[np.float16]]:
    """Return two F16 arrays ``(rows, length)`` on which the ways to sum give different bits."""
    rng = np.random.default_rng(20240607)
    x = (rng.standard_normal((_ROWS, _LENGTH)) * 2.0 ** rng.integers(-6, 7, (_ROWS, _LENGTH))).astype(np.float16)
    y = rng.standard_normal((_ROWS, _LENGTH)).astype(np.float16)
    return x, y


def dot16(x: npt.NDArray[np.float16], y: npt.NDArray[np.float16], width: int) -> npt.NDArray[np.float32]:
    """Emulate ``ggml_vec_dot_f16`` with ``width`` lanes on rows whose length is a multiple of 64.

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
    return _halved(lanes)


def dot16_in_binary16(x: npt.NDArray[np.float16], y: npt.NDArray[np.float16]) -> npt.NDArray[np.float32]:
    """Emulate it for AVX512-FP16, on rows whose length is a multiple of 128: accumulators of 32 binary16 numbers.

    The sum of an exact product and a binary16 number is exact in binary64 at these magnitudes, so rounding it
    once to binary16 is what the fused operation does.
    """
    products = x.astype(np.float64) * y.astype(np.float64)
    steps = products.reshape(len(x), -1, 4, 32)
    acc = np.zeros((len(x), 4, 32), np.float16)
    for step in range(steps.shape[1]):
        acc = (acc.astype(np.float64) + steps[:, step]).astype(np.float16)
    return _halved((acc[:, 0] + acc[:, 2]) + (acc[:, 1] + acc[:, 3])).astype(np.float32)


def dot_bf16(x: npt.NDArray[np.float32], y: npt.NDArray[np.float32], width: int) -> npt.NDArray[np.float32]:
    """Emulate ``ggml_vec_dot_bf16`` of AVX2 (8) or AVX-512 (16) on bfloat16 values, rows of a multiple of 32.

    32 lanes take the products, which are exact in binary32; 16 at a time are then reduced one after the other, or
    8 at a time together.
    """
    lanes = np.zeros((len(x), 32), np.float32)
    for step in (x * y).reshape(len(x), -1, 32).swapaxes(0, 1):
        lanes = lanes + step
    if width == 8:
        return _halved((lanes[:, :8] + lanes[:, 16:24]) + (lanes[:, 8:16] + lanes[:, 24:]))
    halves = [_halved(lanes[:, first : first + 16]).astype(np.float64) for first in (0, 16)]
    total: npt.NDArray[np.float32] = (halves[0] + halves[1]).astype(np.float32)
    return total


def dot_bf16_in_pairs(x: npt.NDArray[np.float32], y: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Emulate it for AVX512-BF16, rows of a multiple of 64: a lane adds the odd of two products, then the even."""
    pairs = (x * y).reshape(len(x), -1, 2, 16, 2)
    lanes = np.zeros((len(x), 2, 16), np.float32)
    for step in range(pairs.shape[1]):
        lanes = (lanes + pairs[:, step, ..., 1]) + pairs[:, step, ..., 0]
    halves = [_halved(lanes[:, i]).astype(np.float64) for i in (0, 1)]
    total: npt.NDArray[np.float32] = (halves[0] + halves[1]).astype(np.float32)
    return total


def _halved(lanes: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Add the upper half of the last axis to the lower until one is left."""
    while lanes.shape[1] > 1:
        half = lanes.shape[1] // 2
        lanes = lanes[:, :half] + lanes[:, half:]
    return np.ascontiguousarray(lanes[:, 0])


def fused_quantizer(library: Library) -> bool | None:
    """Return whether ``quantize_row_i8_s`` rounds product and integer in one step.

    None: there is no such function, or it does neither this nor what the unchanged source of the generation does.
    """
    expected = library.table.quantizer
    quantize = getattr(library.shared_object, "quantize_row_i8_s", None)
    if expected is None or quantize is None:
        return None
    quantize.restype = None
    quantize.argtypes = [c_void_p, c_void_p, c_int64, POINTER(c_float), POINTER(c_int32)]
    row, separate, fused = quantizer_row(expected.ties)
    result = np.zeros(len(row) + 64, np.int8)
    scale, total = c_float(), c_int32()

    def quantized(values: npt.NDArray[np.float32]) -> npt.NDArray[np.int8]:
        quantize(values.ctypes.data, result.ctypes.data, len(values), ctypes.byref(scale), ctypes.byref(total))
        copy: npt.NDArray[np.int8] = result[: len(values)].copy()
        return copy

    actual = quantized(row)
    if scale.value != 127.0 or total.value != int(actual.sum()):
        return None
    if quantized(np.zeros_like(row)).any() or scale.value != np.float32(expected.scale_of_zeros):
        return None
    if np.array_equal(actual, separate):
        return False
    # No compiler contracts the other way to round.
    return True if expected.ties == "even" and np.array_equal(actual, fused) else None


def quantizer_row(
    ties: Literal["even", "away"],
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int8], npt.NDArray[np.int8]]:
    """Return a row with maximum 1 (so the scale is 127) and its int8 values rounded in two steps and in one.

    Its elements are float32 neighbours of ``(k + 1/2) / 127`` whose product with 127 is a tie after rounding to
    binary32, most of them not before.
    """
    found = [np.float32(1.0)]
    for k in range(-126, 126):
        x = np.float32((k + 0.5) / 127.0)
        for candidate in (np.nextafter(x, np.float32(-2)), x, np.nextafter(x, np.float32(2))):
            if np.float64(np.float32(np.float64(candidate) * 127.0)) == k + 0.5:
                found.append(candidate)
    found += [np.float32(0.0)] * (-len(found) % 32)
    row = np.array(found, np.float32)
    exact_products = row.astype(np.float64) * 127.0
    separate = round_ties(exact_products.astype(np.float32).astype(np.float64), ties)
    return row, separate, round_ties(exact_products, ties)


def round_ties(values: npt.NDArray[np.float64], ties: Literal["even", "away"]) -> npt.NDArray[np.int8]:
    """Round to the nearest integer; ties to the even one, or away from zero."""
    rounded: npt.NDArray[Any] = np.rint(values) if ties == "even" else np.trunc(values + np.copysign(0.5, values))
    return rounded.astype(np.int8)
