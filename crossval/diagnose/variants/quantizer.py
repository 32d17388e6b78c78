"""The int8 activation quantiser of BitLinear done wrong, and its accumulator (families 5 and 15)."""

# mypy: disable-error-code="no-any-return"
from __future__ import annotations

from collections.abc import Callable

import numpy as np

from crossval.diagnose.variants.context import Array, Context, Inapplicable
from crossval.diagnose.variants.linear import Product, input_scale, linear, peak, quantize, scaled
from crossval.diagnose.variants.variant import Variant
from crossval.formats import to_bf16, to_f16
from crossval.model.taps import BITLINEARS

LINEAR = BITLINEARS

# --- scale ----------------------------------------------------------------------------------------------------


def _per_tensor(context: Context) -> Array:
    name = context.op.inputs[0]
    whole = context.inputs[0] if context.whole_pass else context.whole(name)
    if whole.shape[0] == 1:
        raise Inapplicable
    largest = np.full((context.n_rows, 1), np.abs(whole).max())
    return linear(context, scale=input_scale(context, context.inputs[0], largest=largest))


def _row_order(context: Context, which: str) -> Array:
    if not context.whole_pass or context.n_rows == 1:
        raise Inapplicable
    rows = np.arange(context.n_rows)
    return {
        "first": np.zeros_like(rows),
        "last": np.full_like(rows, context.n_rows - 1),
        "previous": np.maximum(rows - 1, 0),
        "next": np.minimum(rows + 1, context.n_rows - 1),
    }[which]


def _wrong_row(context: Context, which: str) -> Array:
    return linear(context, scale=input_scale(context, context.inputs[0])[_row_order(context, which)])


def _wrong_row_back(context: Context, which: str) -> Array:
    return linear(context, unscale=input_scale(context, context.inputs[0])[_row_order(context, which)])


def _mean_magnitude(context: Context) -> Array:
    x = context.inputs[0]
    return linear(context, scale=input_scale(context, x, largest=np.mean(np.abs(x), axis=-1, keepdims=True)))


def _levels(context: Context, levels: float) -> Array:
    scale = input_scale(context, context.inputs[0], levels=levels)
    codes = quantize(context, context.inputs[0], scale, low=-levels, high=min(levels, 127.0))
    return linear(context, scale=scale, codes=codes)


_ROWS = ("first", "previous", "next", "last")

_SCALE = (
    Variant(
        "input scale 1.0",
        5,
        LINEAR,
        "activations are rounded to integers without being scaled (input scale hard-coded to 1.0)",
        lambda c: linear(c, scale=1.0),
    ),
    Variant(
        "input scale 127",
        5,
        LINEAR,
        "activations are scaled by 127 as if every row's largest magnitude were 1",
        lambda c: linear(c, scale=127.0),
    ),
    Variant(
        "input scale not undone",
        5,
        LINEAR,
        "the sums are not divided by the input scale",
        lambda c: linear(c, unscale=1.0),
    ),
    Variant(
        "input scale undone twice",
        5,
        LINEAR,
        "the sums are divided by the input scale twice",
        lambda c: linear(c, unscale=input_scale(c, c.inputs[0]) ** 2),
    ),
    Variant(
        "input scale undone without 127",
        5,
        LINEAR,
        "the sums are multiplied by the row's largest magnitude but not divided by 127",
        lambda c: linear(c, unscale=1.0 / np.maximum(peak(c.inputs[0]), 1e-5)),
    ),
    Variant(
        "per-tensor absmax",
        5,
        LINEAR,
        "one input scale for all tokens of the pass instead of one per token",
        _per_tensor,
    ),
    Variant(
        "input scale of the {} row",
        5,
        LINEAR,
        "tokens are quantised with the input scale of the {} row",
        _wrong_row,
        lambda c: _ROWS,
        group="input scale of another row",
    ),
    Variant(
        "sums rescaled by the {} row's input scale",
        5,
        LINEAR,
        "tokens are quantised rightly, but their sums are divided by the input scale of the {} row",
        _wrong_row_back,
        lambda c: _ROWS,
        group="sums rescaled by another row's input scale",
    ),
    Variant(
        "mean magnitude instead of absmax",
        5,
        LINEAR,
        "the input scale is taken from the mean magnitude of the row instead of the largest",
        _mean_magnitude,
    ),
    Variant(
        "{:g} levels instead of 127",
        5,
        LINEAR,
        "activations are quantised to {:g} levels per sign instead of 127",
        _levels,
        lambda c: (128.0, 7.0, 8.0, 63.0, 64.0, 126.0, 255.0),
        group="wrong number of levels",
    ),
)

# --- rounding -------------------------------------------------------------------------------------------------


def _rounded(rounding: Callable[[Array], Array]) -> Callable[[Context], Array]:
    def function(c: Context) -> Array:
        scale = input_scale(c, c.inputs[0])
        return linear(c, scale=scale, codes=quantize(c, c.inputs[0], scale, rounding=rounding))

    return function


def _wrapped(context: Context) -> Array:
    """Scale by 128 and let +128 wrap to -128."""
    scale = input_scale(context, context.inputs[0], levels=128.0)
    codes = np.rint(scaled(context, context.inputs[0], scale))
    return linear(context, scale=scale, codes=np.where(codes > 127, codes - 256, codes).astype(np.float32))


def half_away(x: Array) -> Array:
    """Round halves away from zero, as C's ``round`` does."""
    whole = np.trunc(x)
    return whole + np.where(np.abs(x - whole) >= 0.5, np.sign(x), 0.0)


def away(x: Array) -> Array:
    """Round away from zero."""
    return np.copysign(np.ceil(np.abs(x)), x)


_ROUNDING = (
    Variant(
        "round half up",
        5,
        LINEAR,
        "ties are rounded up instead of to even",
        _rounded(lambda p: np.floor(p + 0.5)),
    ),
    Variant(
        "round half away from zero",
        5,
        LINEAR,
        "ties are rounded away from zero instead of to even",
        _rounded(half_away),
    ),
    Variant(
        "truncation",
        5,
        LINEAR,
        "scaled activations are truncated towards zero instead of rounded",
        _rounded(np.trunc),
    ),
    Variant(
        "rounded down",
        5,
        LINEAR,
        "scaled activations are rounded down (floor) instead of to nearest",
        _rounded(np.floor),
    ),
    Variant(
        "rounded up",
        5,
        LINEAR,
        "scaled activations are rounded up (ceil) instead of to nearest",
        _rounded(np.ceil),
    ),
    Variant(
        "rounded away from zero",
        5,
        LINEAR,
        "scaled activations are rounded away from zero instead of to nearest",
        _rounded(away),
    ),
    Variant(
        "scaled by 128 with wrap-around",
        5,
        LINEAR,
        "activations are scaled by 128 and the largest one wraps to -128",
        _wrapped,
        group="wrong number of levels",
    ),
    Variant(
        "no activation quantisation",
        5,
        LINEAR,
        "activations stay floating-point; they are not quantised to int8",
        lambda c: linear(c, codes=c.inputs[0], scale=1.0),
    ),
    Variant(
        "no activation quantisation (F16)",
        5,
        LINEAR,
        "activations are rounded to binary16 instead of quantised to int8",
        lambda c: linear(c, codes=to_f16(c.inputs[0]), scale=1.0),
    ),
    Variant(
        "no activation quantisation (BF16)",
        5,
        LINEAR,
        "activations are rounded to bfloat16 instead of quantised to int8",
        lambda c: linear(c, codes=to_bf16(c.inputs[0]), scale=1.0),
    ),
)

# --- accumulator ----------------------------------------------------------------------------------------------

LANES = 16
GROUP = 4096
"""Elements after which bitnet.cpp widens its 16-bit lanes (32 blocks of 128)."""


def _wrap16(x: Array) -> Array:
    return np.mod(x + 32768.0, 65536.0) - 32768.0


def _saturate16(x: Array) -> Array:
    return np.clip(x, -32768.0, 32767.0)


def _lanes(limit: Callable[[Array], Array]) -> Product:
    """Return a product whose 16 lanes are 16-bit, as in bitnet.cpp's ``ggml_vec_dot_i2_i8_s``.

    Codes 0, 1, 2 times int8; lane l of every 32 elements collects 2l and 2l+1; lanes are widened every 4096
    elements; the sum of the activations is subtracted at the end.
    """

    def dot(codes: Array, rows: Array) -> Array:
        shifted = rows + np.float32(1)
        lane = np.arange(codes.shape[-1]) % 32 // 2
        total = np.zeros((codes.shape[0], rows.shape[0]))
        for first in range(0, codes.shape[-1], GROUP):
            group = slice(first, first + GROUP)
            for one in range(LANES):
                at = np.flatnonzero(lane[group] == one) + first
                total += limit((codes[:, at] @ shifted[:, at].T).astype(np.float64))
        sums: Array = total - codes.astype(np.float64).sum(axis=-1, keepdims=True)
        return sums

    return dot


def _whole(limit: Callable[[Array], Array]) -> Product:
    return lambda codes, rows: limit((codes @ rows.T).astype(np.float64))


def _with_product(dot: Product) -> Callable[[Context], Array]:
    return lambda c: linear(c, dot=dot)


def _whole_raw(limit: Callable[[Array], Array]) -> Product:
    """The sum of codes 0, 1, 2 times int8 is limited; the sum of the activations is subtracted afterwards."""

    def dot(codes: Array, rows: Array) -> Array:
        raw = (codes @ (rows + np.float32(1)).T).astype(np.float64)
        return limit(raw) - codes.astype(np.float64).sum(axis=-1, keepdims=True)

    return dot


_ACCUMULATOR = (
    Variant(
        "16-bit lanes wrap",
        15,
        LINEAR,
        "16-bit partial sums (16 lanes, widened every 4096 elements, as in bitnet.cpp) wrap around",
        lambda c: linear(c, dot=_lanes(_wrap16)),
    ),
    Variant(
        "16-bit lanes saturate",
        15,
        LINEAR,
        "16-bit partial sums (16 lanes, widened every 4096 elements) saturate",
        lambda c: linear(c, dot=_lanes(_saturate16)),
    ),
    *(
        Variant(f"16-bit sum {verb}", 15, LINEAR, f"the whole sum is kept in 16 bits and {what}", function)
        for verb, what, limit in (("wraps", "wraps around", _wrap16), ("saturates", "saturates", _saturate16))
        for function in (_with_product(_whole(limit)), _with_product(_whole_raw(limit)))
    ),
)

VARIANTS = (*_SCALE, *_ROUNDING, *_ACCUMULATOR)
