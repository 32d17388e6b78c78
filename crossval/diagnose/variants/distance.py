"""How far a variant is from the recorded values, and how far correct float32 arithmetic may be."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from crossval.audit import bounds
from crossval.audit.bounds import Arithmetic, U
from crossval.diagnose.variants.context import Array, Context
from crossval.model.kinds import (
    Add,
    Embedding,
    FloatArray,
    Gelu,
    Head,
    Multiply,
    RmsNorm,
    Silu,
    Softmax,
    SquaredRelu,
)

SLACK = 4.0
"""An engine with a mistake has as many roundings as a correct one, within this factor."""
LINEAR_FLOOR = 2e-5
"""One int8 flip in a row moves it by 1e-4 or more; a float32 sum over all inputs, in any order, stays below."""
LOW_STEPS = 6.0
"""Maximum number of roundings to a 16-bit format in one operation."""
LARGEST_FLOOR = 1e-2
"""However ill-conditioned an operation is on its input, a variant farther away than this does not fit."""
TIE_REACH = 127 * 4 * U
"""Distance from a tie, in codes, within which a recorded activation may be rounded either way."""
TABLE_FLOOR = 2e-3
"""ggml looks some activation functions up in a binary16 table."""


def per_token(context: Context, output: Array) -> FloatArray:
    """Return the relative L2 distance of a computed output from the recorded one for each token.

    Relative to the larger of the two. Equal infinities and NaN in the same places count as equal; any other value
    that is not finite makes the token infinitely far. Scores of later tokens do not count.
    """
    target, output = context.target_by_token, context.by_token(output)
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        difference = target - output
        off = _squares(difference)
        size = np.maximum(context.once("squares", _squares_of_target), _squares(output))
        if np.isfinite(off).all() and np.isfinite(size).all():
            if size.all():
                return np.sqrt(off / size)
            if (off[size == 0] == 0).all():
                return np.sqrt(off / np.where(size == 0, 1.0, size))
        difference = np.where((target == output) | (np.isnan(target) & np.isnan(output)), 0.0, difference)
        size = np.maximum(_length(np.nan_to_num(target)), _length(np.nan_to_num(output)))
        off = _length(difference)
        relative = np.where(off == 0, 0.0, off / size)
    return np.where(np.isfinite(relative), relative, np.inf)


def _squares(rows: FloatArray) -> FloatArray:
    return np.einsum("ij,ij->i", rows, rows)


def _squares_of_target(context: Context) -> FloatArray:
    return _squares(context.target_by_token)


def floor(context: Context, output: Array, family: int, arithmetic: Arithmetic) -> FloatArray:
    """Return for each token how far the engine's arithmetic may be from a formula in float64, relative L2."""
    op, n_rows = context.op, context.n_rows
    read = bounds.readings(op, arithmetic, context.n_tokens, n_rows)
    arithmetic = arithmetic.reading(next((one for one in read if one.rounded == context.rounded), None))
    if arithmetic.low:
        return np.full(n_rows, LOW_STEPS * arithmetic.format.unit_roundoff)
    if context.is_linear:
        return np.full(n_rows, LINEAR_FLOOR)
    if isinstance(op.kind, RmsNorm):
        n = context.inputs[0].shape[-1]
        return np.full(n_rows, SLACK * U * (8.0 + (0.0 if arithmetic.known else n / 2)))
    if isinstance(op.kind, SquaredRelu | Silu | Multiply):
        return np.full(n_rows, TABLE_FLOOR if family == 6 else SLACK * 2 * U)
    if isinstance(op.kind, Gelu) and family == 6:
        return np.full(n_rows, TABLE_FLOOR)
    if isinstance(op.kind, Softmax):
        scores = context.inputs[0]
        seen = np.where(context.mask(scores.shape[-1]), np.abs(scores), 0.0)
        return np.minimum(SLACK * U * (16.0 + 4.0 * seen.max(axis=(0, 2))), LARGEST_FLOOR)
    if isinstance(op.kind, Head):
        allowed = _head_bound(context, arithmetic)
    elif isinstance(op.kind, Add):
        allowed = 8 * U * (np.abs(context.inputs[0]) + np.abs(context.inputs[1]))
    elif isinstance(op.kind, Embedding):
        allowed = 2 * U * np.abs(output)
    else:
        own: list[Any] = [context.weights[name] for name in op.weights]
        allowed = bounds.bound(op, context.inputs, context.expected, own, arithmetic)
    size = np.maximum(_length(context.by_token(np.nan_to_num(output))), np.finfo(np.float64).tiny)
    return np.minimum(SLACK * _length(context.by_token(allowed)) / size, LARGEST_FLOOR)


def near_ties(x: Array, reach: float = TIE_REACH) -> npt.NDArray[np.bool_]:
    """Return which rows have an activation so near to a rounding tie that engines may differ."""
    scaled = x * (127.0 / np.maximum(np.abs(x).max(axis=-1, keepdims=True), 1e-5))
    with np.errstate(invalid="ignore"):
        return np.asarray((np.abs(scaled - np.floor(scaled) - 0.5) <= reach).any(axis=-1))


def _head_bound(context: Context, arithmetic: Arithmetic) -> FloatArray:
    table = context.vector
    wanted = np.arange(table.shape[0]) if context.features is None else context.features
    norms = bounds.row_norms(table[wanted[:: max(1, wanted.size // 256)]], arithmetic.head_table)
    typical = np.full(wanted.size, np.sqrt(np.mean(norms**2)))
    return bounds.head_bound(context.inputs[0], typical, arithmetic)


def _length(rows: FloatArray) -> FloatArray:
    """Return the Euclidean norm of each row, safe against overflow of the squares."""
    largest = np.abs(rows).max(axis=-1)
    safe = np.where((largest > 0) & np.isfinite(largest), largest, 1.0)
    length: FloatArray = np.sqrt(np.sum((rows / safe[:, None]) ** 2, axis=-1)) * safe
    return length
