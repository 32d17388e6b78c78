"""Single operations: roundings, products, the quantiser, exponentials."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bitnet_py.arithmetic import Arithmetic
from tests.support.numpy_bitnet.model import Matrix

F32 = npt.NDArray[np.float32]
F16 = npt.NDArray[np.float16]
Float = F32 | F16
LIBM = ctypes.CDLL("libm.so.6")
INFINITY = np.float32(np.inf)


def _of_libm(name: str) -> Callable[[F32], F32]:
    function = getattr(LIBM, name)
    function.restype, function.argtypes = ctypes.c_float, [ctypes.c_float]

    def apply(x: F32) -> F32:
        return np.array([function(float(one)) for one in np.ravel(x)], np.float32).reshape(np.shape(x))

    return apply


expf, cosf, sinf, tanhf = (_of_libm(name) for name in ("expf", "cosf", "sinf", "tanhf"))


# --- rounding -------------------------------------------------------------------------------------------------


def fused(a: Float, b: Float, c: Float, dtype: type = np.float32) -> Float:
    """Return ``a * b + c`` with one rounding to ``dtype``; the factors have at most 24 bits.

    The product is exact in float64. The sum there is rounded to odd: what it lost, found by Knuth's two-sum, moves
    an even last bit to its odd neighbour, so that the second rounding sees on which side the exact value lies.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        product = np.asarray(a, np.float64) * np.asarray(b, np.float64)
        product, addend = np.broadcast_arrays(product, np.asarray(c, np.float64))
        total = product + addend
        seen = total - product
        lost = (product - (total - seen)) + (addend - seen)
        bits = np.asarray(total).view(np.int64)
        is_moved = np.isfinite(lost) & (lost != 0) & (bits & 1 == 0)
        outward = np.where((lost > 0) == (total > 0), 1, -1)
        return (bits + np.where(is_moved, outward, 0)).view(np.float64).astype(dtype)


def f16(x: Float) -> F16:
    """Round to binary16."""
    with np.errstate(over="ignore"):
        return np.asarray(x, np.float32).astype(np.float16)


def f32(x: Float) -> F32:
    """Widen or round to binary32."""
    return np.asarray(x).astype(np.float32)


def tree(x: Float) -> Float:
    """Add the last axis by halves: lane l and lane l + n/2, and so on, in the array's own type."""
    while x.shape[-1] > 1:
        half = x.shape[-1] // 2
        with np.errstate(over="ignore"):  # infinite, as in the kernel
            x = x[..., :half] + x[..., half:]
    return x[..., 0]


# --- products -------------------------------------------------------------------------------------------------


def dot(a: F16, b: F16, arithmetic: Arithmetic) -> F32:
    """Multiply the last axes: four accumulators of ``simd_width`` lanes, or of 32 lanes in binary16."""
    a, b = np.broadcast_arrays(a, b)
    lanes = 32 if arithmetic.half_sums else arithmetic.simd_width
    kind = np.float16 if arithmetic.half_sums else np.float32
    whole = a.shape[-1] // (4 * lanes) * 4 * lanes
    sums = np.zeros((*a.shape[:-1], 4, lanes), kind)
    for i in range(0, whole, 4 * lanes):
        part = (slice(i, i + 4 * lanes),)
        sums = fused(a[(..., *part)].reshape(sums.shape), b[(..., *part)].reshape(sums.shape), sums, kind)
    joined = (sums[..., 0, :] + sums[..., 2, :]) + (sums[..., 1, :] + sums[..., 3, :])
    if lanes == 8:  # the AVX2 build adds neighbours after the first halving
        four = joined[..., :4] + joined[..., 4:]
        reduced = (four[..., 0] + four[..., 1]) + (four[..., 2] + four[..., 3])
    else:
        reduced = tree(joined)
    total = reduced.astype(np.float64)
    for i in range(whole, a.shape[-1]):
        total += a[..., i].astype(np.float64) * b[..., i].astype(np.float64)
    return total.astype(np.float32)


def tiled(a: F16, b: F16, arithmetic: Arithmetic) -> F32:
    """The same by one accumulator of ``simd_width`` lanes."""
    a, b = np.broadcast_arrays(a, b)
    sums = np.zeros((*a.shape[:-1], arithmetic.simd_width), np.float32)
    for i in range(0, a.shape[-1], arithmetic.simd_width):
        sums = fused(a[..., i : i + arithmetic.simd_width], b[..., i : i + arithmetic.simd_width], sums)
    return tree(sums)


@dataclass(frozen=True)
class Quantised:
    """Integers of each row, the scale they were multiplied by, and their sum."""

    values: npt.NDArray[np.int64]
    scale: F32
    total: npt.NDArray[np.int64]


def quantise(x: F32) -> Quantised:
    """Round rows to int8: half away from zero, no smallest scale."""
    top = np.zeros(x.shape[:-1], np.float32)
    for i in range(x.shape[-1]):  # a NaN stays only until the next number
        magnitude = np.abs(x[..., i])
        top = np.where(top > magnitude, top, magnitude)
    with np.errstate(all="ignore"):
        scale = np.where(top > 0, np.float32(127) / top, np.float32(0)).astype(np.float32)
        p = x * scale[..., None]
    wide = np.where(np.isfinite(p), p, -1000).astype(np.float64)
    away = np.floor(np.abs(wide) + 0.5) * np.sign(wide)
    values = np.clip(away, -128, 127).astype(np.int64)
    return Quantised(values, scale, values.sum(-1))


def bitlinear(x: F32, matrix: Matrix, arithmetic: Arithmetic) -> F32:
    """Multiply rows with a ternary matrix."""
    q = quantise(x)
    codes = matrix.signs.astype(np.float64) + 1
    accumulated = q.values.astype(np.float64) @ codes.T  # integers below 2^53: exact
    with np.errstate(all="ignore"):
        factor = np.float32(matrix.scale) / q.scale
        y = (f32(accumulated) - f32(q.total)[..., None]) * factor[..., None]
    if not arithmetic.follow_reference:
        y[~x.any(-1)] = 0
    return y


# --- exponentials ---------------------------------------------------------------------------------------------


def exponential(x: F32, width: int) -> F32:
    """Return e^x as llama.cpp's polynomial of that SIMD width has it."""

    def constant(text: str) -> np.float32:
        return np.float32(float.fromhex(text))

    with np.errstate(all="ignore"):
        shift = constant("0x1.8p23")
        n = fused(x, constant("0x1.715476p+0"), shift) - shift
        b = fused(-n, constant("0x1.7f7d1cp-20"), fused(-n, constant("0x1.62e4p-1"), x))
        square = b * b
        low = fused(constant("0x1.555e66p-3"), b, constant("0x1.fffdb6p-2"))
        h = fused(fused(constant("0x1.0e4020p-7"), b, constant("0x1.573e2ep-5")), square, low)
        power = np.where(np.abs(n) <= 192, n, 0).astype(np.int32)
        first = constant("0x1.ffffecp-1")
        if width == 16:
            j = fused(h, square, fused(first, b, np.float32(1)))
            result = np.ldexp(j.astype(np.float64), power).astype(np.float32)
        else:
            j = fused(h, square, first * b)
            scale = np.ldexp(np.float32(1), np.clip(power, -126, 126))
            plain = fused(scale, j, scale)
            step = np.where(power <= 0, -125, 127)
            rest = np.ldexp(np.float32(1), np.clip(power - step, -126, 127))
            split = fused(rest, j, rest) * np.ldexp(np.float32(1), step)
            result = np.where(np.abs(power) <= 126, plain, split)
        result = np.where(np.abs(n) > 192, np.where(n <= 0, np.float32(0), INFINITY), result)
        return np.where(np.isnan(x), x, result).astype(np.float32)


def exponentials(x: F32, top: F32, width: int) -> tuple[F32, npt.NDArray[np.float64]]:
    """Return e^(x - top) along the last axis, and its sum by groups of ``width``."""
    with np.errstate(invalid="ignore"):
        e = exponential(x - top[..., None], width)
    total = np.zeros(e.shape[:-1])
    for i in range(0, e.shape[-1], width):
        total += tree(e[..., i : i + width]).astype(np.float64)
    return e, total


def gated(gate: F32, up: F32, width: int | None) -> tuple[F32, F32]:
    """Return the activation and its product with ``up``: SiLU of a SIMD width, or squared ReLU for None."""
    with np.errstate(all="ignore"):
        if width is None:
            relu = np.where(gate > 0, gate, np.float32(0))
            act = relu * relu
        else:
            act = gate / (np.float32(1) + exponential(np.float32(0) - gate, width))
        return act, act * up


@functools.cache
def gelu_table() -> F16:
    """Return GELU of every binary16 number, by its bits: tanh's approximation in binary32, rounded at the end."""
    x = f32(np.arange(1 << 16, dtype=np.uint16).view(np.float16))
    with np.errstate(all="ignore"):
        inner = np.float32(0.79788456) * x * fused(np.float32(0.044715) * x, x, np.float32(1))
        return f16(np.float32(0.5) * x * (np.float32(1) + tanhf(inner)))


def gelu(gate: F32, up: F32) -> tuple[F32, F32]:
    """Return GELU as ggml looks it up, and its product with ``up``."""
    with np.errstate(invalid="ignore"):
        found = f32(gelu_table()[f16(gate).view(np.uint16)])
        act = np.where(gate <= -10, np.float32(0), np.where(gate >= 10, gate, found))
        return act, act * up
