"""Rows of tables of every type, and their products as bitnet.cpp computes them, in NumPy alone.

Shares no code with the engine or the harness. Values of Q6_K and Q3_K are written here from random codes, of the
other types by the ``gguf`` package.
"""

from __future__ import annotations

from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from bitnet_py.ggml_types import GGMLType
from bitnet_py.tables import TABLE_TYPES
from tests.support import q8_k

F32 = npt.NDArray[np.float32]
IN_BLOCKS = tuple(kind for kind in TABLE_TYPES if kind not in (GGMLType.F16, GGMLType.F32, GGMLType.BF16))
TERNARY = (GGMLType.TQ1_0, GGMLType.TQ2_0)


def random_rows(kind: GGMLType, rows: int, cols: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    """Return the bytes of rows with values of either sign and of different sizes."""
    rng = np.random.default_rng(seed)
    if kind in (GGMLType.Q6_K, GGMLType.Q3_K):
        return _written(kind, rng, rows, cols)
    values = (rng.standard_normal((rows, cols)) * 2.0 ** rng.integers(-4, 3, (rows, 1))).astype(np.float32)
    if kind is GGMLType.F16:
        return values.astype(np.float16).view(np.uint8)
    return gguf.quantize(values, gguf.GGMLQuantizationType(int(kind))).view(np.uint8)


def _written(kind: GGMLType, rng: np.random.Generator, rows: int, cols: int) -> npt.NDArray[np.uint8]:
    n = rows * cols // 256
    d = rng.uniform(-0.01, 0.01, n).astype("<f2")
    if kind is GGMLType.Q6_K:
        codes, scales = rng.integers(-32, 32, (n, 256)), rng.integers(-128, 128, (n, 16)).astype(np.int8)
        return pack_q6_k(codes, scales, d).reshape(rows, -1)
    codes, scales = rng.integers(-4, 4, (n, 256)), rng.integers(-32, 32, (n, 16)).astype(np.int8)
    return pack_q3_k(codes, scales, d).reshape(rows, -1)


def pack_q6_k(
    codes: npt.NDArray[Any], scales: npt.NDArray[np.int8], d: npt.NDArray[np.float16]
) -> npt.NDArray[Any]:
    """Return blocks of 210 bytes: codes -32..31 ``(n, 256)``, int8 scales ``(n, 16)``, one float16 each."""
    q = (codes + 32).astype(np.uint8).reshape(-1, 2, 4, 32)  # halves of 128, groups of 32
    low, high = q & 15, q >> 4
    ql = np.concatenate([low[:, :, :2] | low[:, :, 2:] << 4], axis=2).reshape(len(q), -1)
    qh = (high[:, :, 0] | high[:, :, 1] << 2 | high[:, :, 2] << 4 | high[:, :, 3] << 6).reshape(len(q), -1)
    return np.concatenate([ql, qh, scales.view(np.uint8), d[:, None].view(np.uint8)], axis=1)


def pack_q3_k(
    codes: npt.NDArray[Any], scales: npt.NDArray[np.int8], d: npt.NDArray[np.float16]
) -> npt.NDArray[Any]:
    """Return blocks of 110 bytes: codes -4..3 ``(n, 256)``, scales -32..31 ``(n, 16)``, one float16 each."""
    q = (codes + 4).astype(np.uint8).reshape(-1, 2, 4, 32)
    low, high = q & 3, (q >> 2).reshape(-1, 8, 32)
    hmask = np.bitwise_or.reduce(high << np.arange(8, dtype=np.uint8)[:, None], axis=1)
    qs = np.bitwise_or.reduce(low << np.array([0, 2, 4, 6], np.uint8)[:, None], axis=2).reshape(len(q), -1)
    s = (scales.astype(np.int16) + 32).astype(np.uint8)
    first = s[:, :8] & 15 | (s[:, 8:] & 15) << 4
    top = (s >> 4).reshape(-1, 4, 4)
    last = top[:, 0] | top[:, 1] << 2 | top[:, 2] << 4 | top[:, 3] << 6
    return np.concatenate([hmask, qs, first, last, d[:, None].view(np.uint8)], axis=1)


# --- products ------------------------------------------------------------------------------------------------


def multiply(
    rows: npt.NDArray[np.uint8],
    kind: GGMLType,
    x: F32,
    *,
    main: bool,
    width: int,
    pairs: bool,
    tiled: bool,
    packed: bool = False,
) -> F32:
    """Return ``(n_cols, rows)`` as a clang build of bitnet.cpp computes it."""
    if kind is GGMLType.F32:
        return _floats(rows.view("<f4"), x, width, tiled=tiled)
    if kind is GGMLType.BF16:
        w = _bfloat(rows.view("<u2"))
        narrow = _bfloat(_to_bfloat(x))
        if pairs:
            return _pairs(w, narrow, 1 if tiled and main else 2)
        return _floats(w, narrow, width, tiled=True) if tiled and main else _bfloats(w, narrow, width)
    if packed and main and kind is GGMLType.Q4_0:
        return _packed(rows, x)
    return _blocks(rows, kind, x, main=main)


def _fma(a: Any, b: Any, c: Any) -> F32:
    """Return ``a * b + c`` rounded once: the product is exact in binary64, the sum rounded to odd there first."""
    product = a.astype(np.float64) * b.astype(np.float64)
    total = product + c
    of_c = total - product
    error = (product - (total - of_c)) + (c - of_c)
    odd = total.view(np.int64) & 1
    step = np.where((error > 0) == (total > 0), 1, -1)
    fixed = np.where((error != 0) & (odd == 0), total.view(np.int64) + step, total.view(np.int64))
    return fixed.view(np.float64).astype(np.float32)


def _halved(lanes: F32) -> F32:
    while lanes.shape[-1] > 1:
        half = lanes.shape[-1] // 2
        lanes = lanes[..., :half] + lanes[..., half:]
    return lanes[..., 0]


def _lanes(w: F32, x: F32, n_lanes: int) -> F32:
    """Return ``(n_cols, rows, n_lanes)``: fused sums of every ``n_lanes``-th product."""
    lanes = np.zeros((len(x), len(w), n_lanes), np.float32)
    for i in range(0, w.shape[1], n_lanes):
        lanes = _fma(w[None, :, i : i + n_lanes], x[:, None, i : i + n_lanes], lanes)
    return lanes


def _floats(w: F32, x: F32, width: int, *, tiled: bool) -> F32:
    if tiled:
        return _halved(_lanes(w, x, width))
    a = _lanes(w, x, 4 * width).reshape(len(x), len(w), 4, width)
    joined = (a[..., 0, :] + a[..., 2, :]) + (a[..., 1, :] + a[..., 3, :])
    if width == 16:
        return _halved(joined)
    four = joined[..., :4] + joined[..., 4:]
    return (four[..., 0] + four[..., 1]) + (four[..., 2] + four[..., 3])


def _bfloat(bits: npt.NDArray[np.uint16]) -> F32:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _to_bfloat(x: F32) -> npt.NDArray[np.uint16]:
    bits = x.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def _bfloats(w: F32, x: F32, width: int) -> F32:
    lanes = _lanes(w, x, 32)
    if width == 8:
        a = lanes.reshape(len(x), len(w), 4, 8)
        return _halved((a[..., 0, :] + a[..., 2, :]) + (a[..., 1, :] + a[..., 3, :]))
    halves = [_halved(lanes[..., i : i + 16]).astype(np.float64) for i in (0, 16)]
    return (halves[0] + halves[1]).astype(np.float32)


def _pairs(w: F32, x: F32, n_sums: int) -> F32:
    lanes = np.zeros((n_sums, len(x), len(w), 16), np.float32)
    for i in range(0, w.shape[1], 32):
        at = i // 32 % n_sums
        for first in (i + 1, i):
            lanes[at] = _fma(w[None, :, first : i + 32 : 2], x[:, None, first : i + 32 : 2], lanes[at])
    total = sum(_halved(one).astype(np.float64) for one in lanes)
    return np.asarray(total).astype(np.float32)


def _blocks(rows: npt.NDArray[np.uint8], kind: GGMLType, x: F32, *, main: bool) -> F32:
    """Return the product in blocks: integer sums in eight lanes, times both steps, added block after block."""
    d, scales, codes = decode(rows, kind)  # (rows, blocks), (rows, blocks, values), the same
    values = codes.shape[-1]
    q, steps = quantize_q8_0(x) if values == 32 else _q8_k(x)
    ternary = kind in TERNARY
    offset = 1 if ternary else 32 if main and kind is GGMLType.Q6_K else 0
    lanes = np.zeros((len(x), len(rows), 8), np.float32)
    for b in range(codes.shape[1]):
        scaled = scales[None, :, b] * q[:, None, b].astype(np.int64)
        terms = scaled * (codes[None, :, b] + offset)
        sums = terms.reshape(len(x), len(rows), -1, 8, 4).sum(axis=(2, 4))
        if offset:
            sums = sums - offset * scaled.reshape(len(x), len(rows), 8, 32).sum(axis=-1)
        factor = (d[None, :, b] * steps[:, None, b])[..., None]
        whole = sums.astype(np.int32).astype(np.float32)
        lanes = factor * whole + lanes if ternary else _fma(factor, whole, lanes)
    return _halved(lanes)


def _packed(rows: npt.NDArray[np.uint8], x: F32) -> F32:
    """Return the product with Q4_0 whose rows are packed by eight: one accumulator for a row's blocks."""
    d, _, codes = decode(rows, GGMLType.Q4_0)
    q, steps = quantize_q8_0(x)
    total = np.zeros((len(x), len(rows)), np.float32)
    for b in range(codes.shape[1]):
        sums = q[:, b].astype(np.int64) @ codes[:, b].T
        total = _fma(sums.astype(np.float32), d[None, :, b] * steps[:, None, b], total)
    return total


def decode(rows: npt.NDArray[np.uint8], kind: GGMLType) -> tuple[F32, npt.NDArray[Any], npt.NDArray[Any]]:
    """Return step ``(rows, blocks)``, integer scales and codes ``(rows, blocks, values)``, by its values."""
    exact = gguf.dequantize(rows, gguf.GGMLQuantizationType(int(kind))).astype(np.float64)
    values = 32 if kind in (GGMLType.Q8_0, GGMLType.Q4_0, GGMLType.Q5_0) else 256
    exact = exact.reshape(len(rows), -1, values)
    at = {GGMLType.Q6_K: 208, GGMLType.Q3_K: 108, GGMLType.TQ1_0: 52, GGMLType.TQ2_0: 64}.get(kind, 0)
    blocks = rows.reshape(len(rows), exact.shape[1], -1)
    d = np.ascontiguousarray(blocks[..., at : at + 2]).view("<f2")[..., 0].astype(np.float32)
    scales = np.ones_like(exact)
    if kind is GGMLType.Q6_K:
        scales = blocks[..., 192:208].view(np.int8).repeat(16, axis=-1).astype(np.float64)
    if kind is GGMLType.Q3_K:
        scales = _q3_k_scales(blocks[..., 96:108]).repeat(16, axis=-1).astype(np.float64)
    unit = d[..., None].astype(np.float64) * scales
    codes = np.rint(np.divide(exact, unit, out=np.zeros_like(exact), where=unit != 0)).astype(np.int64)
    return d, scales.astype(np.int64), codes


def _q3_k_scales(packed: npt.NDArray[np.uint8]) -> npt.NDArray[Any]:
    low = np.concatenate([packed[..., :8] & 15, packed[..., :8] >> 4], axis=-1)
    high = np.concatenate([packed[..., 8:] >> shift & 3 for shift in (0, 2, 4, 6)], axis=-1)
    return (low | high << 4).astype(np.int64) - 32


def quantize_q8_0(x: F32) -> tuple[npt.NDArray[Any], F32]:
    """Return codes ``(n_cols, blocks, 32)`` and steps ``(n_cols, blocks)``."""
    blocks = x.reshape(len(x), -1, 32)
    top = np.abs(blocks).max(axis=-1)
    inverse = np.divide(np.float32(127), top, out=np.zeros_like(top), where=top != 0)
    codes = np.rint(blocks * inverse[..., None]).astype(np.int8)
    return codes, (top / np.float32(127)).astype(np.float16).astype(np.float32)


def _q8_k(x: F32) -> tuple[npt.NDArray[Any], F32]:
    found = [q8_k.quantize(row, fused=False) for row in x]
    return np.stack([np.stack(codes) for codes, _ in found]), np.array([steps for _, steps in found], np.float32)
