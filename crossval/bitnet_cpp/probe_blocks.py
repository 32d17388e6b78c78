"""Probe how a loaded library multiplies ternary matrices of TQ1_0 and TQ2_0 (docs/llama-cpp.md).

Activations are quantised in blocks (Q8_K). Whether ``x * factor`` is rounded before it is rounded to an integer,
and whether a block's scaled sum is before it is added to the others, depends on compiler and instruction set.
"""

from __future__ import annotations

import ctypes
from ctypes import c_int64, c_void_p
from typing import Any

import numpy as np
import numpy.typing as npt

from crossval.bitnet_cpp import abi
from crossval.bitnet_cpp.abi import Library

BLOCK = 256
LANES = 8
_Q8_K = np.dtype([("step", "<f4"), ("codes", "i1", BLOCK), ("sums", "<i2", BLOCK // 16)])
_TQ2_0 = np.dtype([("codes", "u1", BLOCK // 4), ("scale", "<f2")])
_N_BLOCKS = 24
_ROWS = 16


def rounding(library: Library) -> dict[str, bool | None]:
    """Return ``fused_quantizer`` and ``fused_sums`` as ``crossval.passes.Numerics`` has them; None: neither."""
    quantize = getattr(library.shared_object, "quantize_row_q8_K", None)
    multiply = getattr(library.shared_object, "ggml_vec_dot_tq2_0_q8_K", None)
    if quantize is None:
        return {"fused_quantizer": None, "fused_sums": None}
    quantize.restype, quantize.argtypes = None, [c_void_p, c_void_p, c_int64]
    fused_quantizer = _matching(_quantized(quantize, ties()), {f: codes(ties(), fused=f) for f in (False, True)})
    if multiply is None:
        return {"fused_quantizer": fused_quantizer, "fused_sums": None}
    rng = np.random.default_rng(20260701)
    x = (rng.standard_normal(_N_BLOCKS * BLOCK) * 2.0 ** rng.integers(-3, 4, _N_BLOCKS).repeat(BLOCK)).astype(
        "<f4"
    )
    weights = np.zeros((_ROWS, _N_BLOCKS), _TQ2_0)
    weights["codes"] = rng.choice(np.array([0, 1, 2], np.uint8), (*weights.shape, BLOCK // 4, 4)) @ [1, 4, 16, 64]
    weights["scale"] = 0.0371
    blocks, found = _blocks(quantize, x), np.zeros(_ROWS, np.float32)
    dot = ctypes.cast(multiply, abi.VEC_DOT)
    for row in range(_ROWS):
        out = found[row:].ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        dot(x.size, out, 0, weights[row:].ctypes.data, 0, blocks.ctypes.data, 0, 1)
    return {
        "fused_quantizer": fused_quantizer,
        "fused_sums": _matching(found, {f: products(weights, blocks, fused=f) for f in (False, True)}),
    }


def _matching(found: npt.NDArray[Any], expected: dict[bool, npt.NDArray[Any]]) -> bool | None:
    """Return which of two results, that differ, was found."""
    return next((name for name, result in expected.items() if np.array_equal(found, result)), None)


def _blocks(quantize: Any, x: npt.NDArray[np.float32]) -> npt.NDArray[Any]:
    blocks = np.zeros(x.size // BLOCK, _Q8_K)
    quantize(x.ctypes.data, blocks.ctypes.data, x.size)
    return blocks


def _quantized(quantize: Any, x: npt.NDArray[np.float32]) -> npt.NDArray[np.int8]:
    result: npt.NDArray[np.int8] = _blocks(quantize, x)["codes"].reshape(-1)
    return result


def ties() -> npt.NDArray[np.float32]:
    """Return a block of float32 neighbours of the quantiser's ties, most of which only rounding makes ties."""
    x = np.zeros(BLOCK, np.float32)
    x[0] = -1.3
    factor = np.float64(np.float32(-127.0) / x[0])
    found: list[np.float32] = []
    for k in range(-126, 126):
        near = np.float32((k + 0.5) / factor)
        for candidate in (np.nextafter(near, np.float32(-2)), near, np.nextafter(near, np.float32(2))):
            if np.float32(np.float64(candidate) * factor) == k + 0.5:
                found.append(candidate)
    n = min(len(found), BLOCK - 1)
    x[1 : n + 1] = found[:n]
    return x


def codes(x: npt.NDArray[np.float32], *, fused: bool) -> npt.NDArray[np.int8]:
    """Emulate ``quantize_row_q8_K`` on one block."""
    factor = np.float32(-127.0) / x[np.argmax(np.abs(x))]
    scaled = x.astype(np.float64) * np.float64(factor)
    if not fused:
        scaled = scaled.astype(np.float32).astype(np.float64)
    rounded: npt.NDArray[np.float64] = np.minimum(np.rint(scaled), 127)
    return rounded.astype(np.int8)


def products(weights: npt.NDArray[Any], blocks: npt.NDArray[Any], *, fused: bool) -> npt.NDArray[np.float32]:
    """Emulate ``ggml_vec_dot_tq2_0_q8_K`` of an AVX2 build for rows of weights and one row of blocks."""
    acc = np.zeros((len(weights), LANES), np.float32)
    for number, block in enumerate(blocks):
        unpacked = (
            weights["codes"][:, number].reshape(-1, 2, 1, 32) >> np.array([0, 2, 4, 6]).reshape(1, 1, 4, 1) & 3
        )
        terms = unpacked.reshape(len(weights), -1).astype(np.int32) * block["codes"].astype(np.int32)
        groups = block["codes"].astype(np.int32).reshape(LANES, -1).sum(axis=-1)
        sums = terms.reshape(len(weights), -1, LANES, 4).sum(axis=(1, 3)) - groups
        factor = block["step"] * weights["scale"][:, number].astype(np.float32)[:, None]
        exact = sums.astype(np.float64) * factor.astype(np.float64)  # 14 and 24 bits
        acc = (exact + acc).astype(np.float32) if fused else exact.astype(np.float32) + acc
    while acc.shape[1] > 1:
        half = acc.shape[1] // 2
        acc = acc[:, half:] + acc[:, :half]
    return acc[:, 0]
