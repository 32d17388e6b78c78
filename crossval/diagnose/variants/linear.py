"""BitLinear and the head with every step exchangeable: what the variants of matrix products are built from."""

# mypy: disable-error-code="no-any-return"
from __future__ import annotations

from collections.abc import Callable

import numpy as np

from crossval.diagnose.variants.context import Array, Context
from crossval.model.kinds import IntArray, TernaryMatrix

RowsOf = Callable[[TernaryMatrix, IntArray], Array]
"""Gives some rows of a matrix as an engine sees them: ``(features, cols)``."""
Product = Callable[[Array, Array], Array]
"""Multiplies codes ``(n_rows, cols)`` with rows of a matrix: ``(n_rows, features)``."""


def peak(x: Array) -> Array:
    """Return the largest magnitude of each row, ``(n_rows, 1)``."""
    largest: Array = np.max(np.abs(x), axis=-1, keepdims=True)
    return largest


def input_scale(context: Context, x: Array, *, largest: Array | None = None, levels: float = 127.0) -> Array:
    """Return what activations are multiplied by: ``levels / max(largest, 1e-5)``, rounded as the engine does."""
    largest = np.maximum(peak(x) if largest is None else largest, 1e-5)
    if context.quantizer == "divide":
        return 1.0 / _f32(largest / levels)
    scale = levels / largest
    return scale if context.quantizer == "float64" else _f32(scale)


def scaled(context: Context, x: Array, scale: Array | float) -> Array:
    """Return ``x * scale`` before it is rounded to integers.

    ``float32``: the product is rounded to binary32 first; ``fused``: it is not (one FMA with the rounding);
    ``divide``: ``x`` divided by the binary32 step size; ``float64``: no binary32 anywhere.
    """
    if context.quantizer == "float32":
        return _f32(x * scale)
    return _f32(x / (1.0 / np.asarray(scale))) if context.quantizer == "divide" else x * scale


def quantize(
    context: Context,
    x: Array,
    scale: Array | float,
    *,
    rounding: Callable[[Array], Array] = np.rint,
    low: float = -128.0,
    high: float = 127.0,
) -> Array:
    """Return integer codes as float32 (exact)."""
    with np.errstate(invalid="ignore", over="ignore"):
        codes: Array = np.clip(rounding(scaled(context, x, scale)), low, high)
    return codes.astype(np.float32)


def own_rows(matrix: TernaryMatrix, features: IntArray) -> Array:
    """Return rows of a matrix as they are."""
    return matrix.signs[features]


def product(codes: Array, rows: Array) -> Array:
    """Return ``codes @ rows.T`` in float64; through binary32 where that is exact (integers below 2^24)."""
    if codes.dtype == np.float32 and rows.dtype == np.float32:
        return (codes @ rows.T).astype(np.float64)
    return codes.astype(np.float64, copy=False) @ rows.astype(np.float64, copy=False).T


def multiply(
    context: Context, codes: Array, matrix: TernaryMatrix, rows_of: RowsOf = own_rows, dot: Product = product
) -> Array:
    """Return the sums of the output features looked at, ``(n_rows, features)``."""
    n_features = matrix.signs.shape[0]
    parts = [dot(codes, rows_of(matrix, features)) for features in context.feature_chunks(n_features)]
    return np.concatenate(parts, axis=-1)


def linear(
    context: Context,
    *,
    x: Array | None = None,
    scale: Array | float | None = None,
    unscale: Array | float | None = None,
    codes: Array | None = None,
    matrix: TernaryMatrix | None = None,
    weight_scale: float | None = None,
    rows_of: RowsOf = own_rows,
    dot: Product = product,
) -> Array:
    """Compute BitLinear with some of its parts exchanged: quantise, accumulate, rescale.

    ``scale`` quantises; the sums are divided by ``unscale`` (the same unless given), then multiplied by
    ``weight_scale``. ``matrix`` is another tensor, cut to the rows looked at (``Context.other``).
    """
    if x is None and scale is None and codes is None:
        codes, scale = context.quantized
    x = context.inputs[0] if x is None else x
    scale = input_scale(context, x) if scale is None else scale
    codes = quantize(context, x, scale) if codes is None else codes
    if matrix is None:
        matrix = context.matrix
        sums = multiply(context, codes, matrix, rows_of, dot)
    else:
        sums = multiply(context.sampled(None), codes, matrix, rows_of, dot)
    return (
        sums / (scale if unscale is None else unscale) * (matrix.scale if weight_scale is None else weight_scale)
    )


def head(context: Context, x: Array | None = None, table: Array | None = None) -> Array:
    """Multiply with the rows of the head's table that are looked at: logits ``(n_rows, features)``."""
    x = context.inputs[0] if x is None else x
    table = context.vector if table is None else table
    parts = [x @ table[features].astype(np.float64).T for features in context.feature_chunks(table.shape[0])]
    return np.concatenate(parts, axis=-1)


def _f32(x: Array) -> Array:
    with np.errstate(over="ignore", invalid="ignore"):
        return x.astype(np.float32).astype(np.float64)
