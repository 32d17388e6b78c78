"""BitLinear in the integer domain: given equal int8 inputs the accumulator is exact, so equality is the test.

From the recorded float input the int8 codes are recomputed, from them the exact integer sums; the recorded
output is divided by its scales and must land on those integers. An engine that rounds its activations slightly
differently may put a value that lies within a few roundings of a tie on the other side; such flips are accepted
only when they explain every integer of the token exactly. An engine of unknown arithmetic may have multiplied with
dequantised weights, so that its sums are binary32 sums: near the integer, not on it, but nearer than to any other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from crossval.audit.bounds import SECOND_ORDER, TINY, Arithmetic, U
from crossval.ops import FloatArray, TernaryMatrix, accumulate, quantize_activations

TIE_DISTANCE = 127 * 4 * U
"""Scaled activations reach 127 and pass at most four roundings (scale twice, product, sum)."""
RESCALE_STEPS = 5.0
"""Roundings of the rescale: the integer's conversion, two scales, two products."""
HALF_UNIT = 0.49
"""Most that a binary32 sum may be off, in units of the integer: what is nearer to another integer is another."""
MOST_FLIPS = 24
"""Candidates for a flip in one token; more than this are not searched (0.15 are expected among 2560 values)."""


@dataclass(frozen=True)
class BitLinearCheck:
    """``expected`` and ``bound`` ``(n_tokens, rows)`` with explained flips already granted."""

    expected: FloatArray
    bound: FloatArray
    flips: int
    flipped_tokens: int


def check(
    x: npt.NDArray[np.float32], recorded: npt.NDArray[np.float32], weight: TernaryMatrix, arithmetic: Arithmetic
) -> BitLinearCheck:
    """Compare a recorded BitLinear output ``(n_tokens, rows)`` with the exact one of its recorded input.

    ``x``: float32 ``(n_tokens, cols)``, as the engine had it.
    """
    codes, scale, scaled = quantize(x, arithmetic)
    sums = accumulate(codes, weight).astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        found = recorded.astype(np.float64) * scale / weight.scale
        off = np.rint(found - sums)
    flips = flipped_tokens = 0
    for token in np.flatnonzero((off != 0).any(axis=-1)):
        moved = _explain(off[token], codes[token], scaled[token], weight)
        if moved:
            sums[token] += off[token]
            flips += moved
            flipped_tokens += 1
    expected = sums / scale * weight.scale
    bound = RESCALE_STEPS * U * SECOND_ORDER * np.abs(expected) + TINY
    if not arithmetic.known:
        magnitudes = np.abs(codes.astype(np.float64)).sum(axis=-1, keepdims=True)
        bound += np.minimum(codes.shape[-1] * U * magnitudes, HALF_UNIT) / scale * weight.scale
    return BitLinearCheck(expected, bound, flips, flipped_tokens)


def quantize(
    x: npt.NDArray[np.floating[Any]], arithmetic: Arithmetic
) -> tuple[npt.NDArray[np.int8], FloatArray, FloatArray]:
    """Return codes, scale per token (last axis 1) and the scaled values before rounding.

    Known families: bitnet.cpp ``quantize_row_i8_s``, the scale rounded to binary32 and the product too, unless
    compiled into one fused step.
    """
    wide = x.astype(np.float64)
    if not arithmetic.known:
        codes, scale = quantize_activations(wide)
        return codes, scale, wide * scale
    absmax = np.abs(wide).max(axis=-1, keepdims=True)
    scale = (127.0 / np.maximum(absmax, 1e-5)).astype(np.float32).astype(np.float64)
    product = wide * scale  # two binary32 factors: exact in binary64
    if not arithmetic.numerics.fused_quantizer:
        product = product.astype(np.float32).astype(np.float64)
    with np.errstate(invalid="ignore"):
        return np.clip(np.rint(product), -128, 127).astype(np.int8), scale, product


def _explain(off: FloatArray, codes: npt.NDArray[np.int8], scaled: FloatArray, weight: TernaryMatrix) -> int:
    """Return how many activations near a tie, moved to its other side, give exactly these integers; 0: none do."""
    if not np.isfinite(off).all():
        return 0
    fraction = scaled - np.floor(scaled)
    near = np.flatnonzero(np.abs(fraction - 0.5) <= TIE_DISTANCE)
    if not 0 < near.size <= MOST_FLIPS:
        return 0
    other_side = np.where(codes[near] > scaled[near], -1.0, 1.0)
    columns = weight.signs[:, near].astype(np.float64) * other_side
    moved = np.rint(np.linalg.lstsq(columns, off, rcond=None)[0])
    if ((moved == 0) | (moved == 1)).all() and np.array_equal(columns @ moved, off):
        return int(moved.sum())
    return 0
