"""Sums carried in binary16: bitnet.cpp's main on processors that add in it, and its flash attention.

*Lanes* (builds for AVX512-FP16): 4 accumulators of 32 lanes take 128 products at a time, each added with one
rounding to binary16; 2 steps join the accumulators, 5 halve the lanes. A term passes through one rounding a block
and those 7. A product below the normal numbers is off by half of the smallest subnormal (sums of two numbers are
exact there). What is left over, beyond the last whole block, is added in binary64.

*Cells* (flash attention of fewer than 64 tokens): the weighted sum of the values is a binary16 vector. Key after
key it is scaled down if the score is a new maximum, and the value times its weight is added; each is one rounding.
Given how far the weights may be off, every step is monotone, so that carrying the smallest and the largest vector
through the same roundings encloses what the engine has: where they do not part, it is known to the last bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from crossval.audit.bounds.approx import RANDOM_SIGNS, Approx
from crossval.audit.bounds.arithmetic import U16, Arithmetic, U
from crossval.formats import F16, F32, to_f16
from crossval.model.kinds import FloatArray

BLOCK = 128
"""Products that 4 accumulators of 32 lanes take at a time."""
TREE = 7
"""Roundings that join accumulators and lanes."""
PADDED = 256
"""Cells of the KV cache come in multiples of this; those beyond the last token have weight 0."""
SPLIT = 512
"""Padded cells from which on flash attention divides those of a single token among its threads."""


def worst(n_blocks: int, magnitude: FloatArray) -> FloatArray:
    """Return the largest error of sums in lanes; ``magnitude``: of the terms of each sum, added up."""
    steps = (n_blocks + TREE) * U16
    allowed: FloatArray = steps / (1 - min(steps, 0.5)) * magnitude + n_blocks * BLOCK * F16.tiny
    return allowed if n_blocks else np.zeros_like(magnitude)


def likely(n_blocks: int, length: FloatArray) -> FloatArray:
    """Return the likely error of sums in lanes, as ``approx.random_sum`` has it; ``length``: norm of the terms.

    A lane's partial sums have ``k / n_blocks`` of its terms' squares, which makes ``n_blocks / 6`` of them all in
    the variance; each step of the tree rounds sums of all terms, which makes ``1 / 3``.
    """
    allowed: FloatArray = RANDOM_SIGNS * math.sqrt(n_blocks + 2 * TREE) * U16 * length
    return allowed + n_blocks * BLOCK * F16.tiny if n_blocks else np.zeros_like(length)


# --- cell by cell ---------------------------------------------------------------------------------------------

Interval = tuple[FloatArray, FloatArray]
"""Smallest and largest, elementwise."""


def by_cells(weights: Approx, values: Approx, a: Arithmetic) -> Interval:
    """Return the middle of the weighted sum of the values as flash attention rounds it, and how far it may be off.

    ``weights``: softmax, ``(n_heads, n_rows, n_cells)``; ``values`` ``(n_cells, n_kv_heads, head_dim)``.

    Returns:
        both ``(n_rows, n_heads * head_dim)``.
    """
    n_heads, n_rows, n_cells = weights.value.shape
    low = high = np.zeros((n_heads, n_rows, values.value.shape[-1]))
    for cells in _threads(n_cells, a):
        sums, top = _one_thread(cells, weights, values, a)
        of_thread = _times(sums, top)
        low, high = low + of_thread[0], high + of_thread[1]
    # the sum of the weights, the quotient and what joins the threads are in binary32
    middle, half = (low + high) / 2, (high - low) / 2
    half = half + (2 * n_cells + 8) * U * np.maximum(np.abs(low), np.abs(high)) + F32.tiny
    return _merged(middle), _merged(half)


def _merged(array: FloatArray) -> FloatArray:
    merged: FloatArray = array.transpose(1, 0, 2).reshape(array.shape[1], -1)
    return merged


def _threads(n_cells: int, a: Arithmetic) -> Iterator[range]:
    """Yield the cells of each thread."""
    padded = max(PADDED, math.ceil(n_cells / PADDED) * PADDED)
    divides = a.sums == "divided binary16 cells" and padded >= SPLIT
    each = math.ceil(padded / ((a.numerics.attention_threads or 1) if divides else 1))
    yield from (range(first, min(first + each, n_cells)) for first in range(0, n_cells, each))


def _one_thread(cells: range, weights: Approx, values: Approx, a: Arithmetic) -> tuple[Interval, Interval]:
    """Return the sums over some cells in units of the largest weight among them, and that weight."""
    below = np.maximum(weights.value - weights.total, 0.0)
    above = weights.value + weights.total
    n_heads, n_rows, _ = weights.value.shape
    group = n_heads // values.value.shape[1]
    low = high = np.zeros((n_heads, n_rows, values.value.shape[-1]))
    low_top = high_top = np.zeros((n_heads, n_rows))
    n_narrow = low.shape[-1] // BLOCK * BLOCK if a.numerics.binary16_sums else 0
    for cell in cells:
        seen = weights.value[..., cell] > 0  # the mask skips the others
        least, most = below[..., cell], above[..., cell]
        new_low, new_high = np.maximum(low_top, least), np.maximum(high_top, most)
        may_rise, must_rise = most > low_top, least > high_top
        scale = (
            np.where(may_rise, _ratio(low_top, new_high), 1.0),
            np.where(must_rise, _ratio(high_top, new_low), 1.0),
        )
        share = np.where(must_rise, 1.0, _ratio(least, new_high)), np.where(may_rise, 1.0, _ratio(most, new_low))
        value, error = (np.repeat(x[cell], group, axis=0)[:, None] for x in (values.value, values.total))
        scaled = _rounded(_times((low, high), scale, n_narrow))
        added = _times((value - error, value + error), share, n_narrow)
        next_low, next_high = _rounded((scaled[0] + added[0], scaled[1] + added[1]))
        low, high = np.where(seen[..., None], next_low, low), np.where(seen[..., None], next_high, high)
        low_top, high_top = np.where(seen, new_low, low_top), np.where(seen, new_high, high_top)
    return (low, high), (low_top, high_top)


def _ratio(x: FloatArray, y: FloatArray) -> FloatArray:
    """Return ``x / y``, at most 1; 1 where nothing is known of it."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        return np.minimum(np.nan_to_num(x / y, nan=1.0), 1.0)


def _times(x: Interval, factor: Interval, n_narrow: int = 0) -> Interval:
    """Multiply by factors, of each head and row, from 0 on; for the first elements they are rounded first."""
    low, high = (np.repeat(f[..., None], x[0].shape[-1], axis=-1) for f in factor)
    low[..., :n_narrow], high[..., :n_narrow] = to_f16(low[..., :n_narrow]), to_f16(high[..., :n_narrow])
    return np.minimum(x[0] * low, x[0] * high), np.maximum(x[1] * low, x[1] * high)


def _rounded(x: Interval) -> Interval:
    """Round to binary16, some elements through binary32."""
    return to_f16(x[0] - U * np.abs(x[0])), to_f16(x[1] + U * np.abs(x[1]))
