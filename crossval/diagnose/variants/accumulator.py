"""Accumulators of BitLinear that are too narrow: 16-bit lanes and sums, partial sums of any width (family 15)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np

from crossval.diagnose.variants.context import Array, Context, Inapplicable, Product, linear
from crossval.diagnose.variants.estimate import Fit, fitted, recorded_sums
from crossval.diagnose.variants.variant import Variant
from crossval.model.taps import BITLINEARS

LANES = 16
GROUP = 4096
"""Number of elements after which bitnet.cpp widens its 16-bit lanes (32 blocks of 128)."""


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
        return total - codes.astype(np.float64).sum(axis=-1, keepdims=True)

    return dot


def _whole(limit: Callable[[Array], Array]) -> Product:
    return lambda codes, rows: limit((codes @ rows.T).astype(np.float64))


def _whole_raw(limit: Callable[[Array], Array]) -> Product:
    """Limit the sum of codes 0, 1, 2 times int8; the sum of the activations is subtracted afterwards."""

    def dot(codes: Array, rows: Array) -> Array:
        raw = (codes @ (rows + np.float32(1)).T).astype(np.float64)
        return limit(raw) - codes.astype(np.float64).sum(axis=-1, keepdims=True)

    return dot


def _in_16_bits(verb: str, what: str, dot: Product) -> Variant:
    said = f"the whole sum is kept in 16 bits and {what}"
    return accumulator(f"16-bit sum {verb}", said, lambda c: linear(c, dot=dot))


accumulator = partial(Variant, family=15, ops=BITLINEARS)
# fmt: off
VARIANTS = (
    accumulator("16-bit lanes wrap",
        "16-bit partial sums (16 lanes, widened every 4096 elements, as in bitnet.cpp) wrap around",
        lambda c: linear(c, dot=_lanes(_wrap16))),
    accumulator("16-bit lanes saturate", "16-bit partial sums (16 lanes, widened every 4096 elements) saturate",
        lambda c: linear(c, dot=_lanes(_saturate16))),
    _in_16_bits("wraps", "wraps around", _whole(_wrap16)),
    _in_16_bits("wraps", "wraps around", _whole_raw(_wrap16)),
    _in_16_bits("saturates", "saturates", _whole(_saturate16)),
    _in_16_bits("saturates", "saturates", _whole_raw(_saturate16)),
)
# fmt: on

# --- fitted: every wrong sum is off by a multiple of a power of two -------------------------------------------

WIDTHS = (16, 15, 14, 13, 12, 11, 10, 9)
"""Not 8: an int8 activation that wraps around is also off by 256."""
TOLERANCE = 1e-6
"""How far a float32 sum may be from an integer, relative to the sum."""
FEW = 0.05
"""The same, absolute."""
SHARP = 0.02
"""Fraction of the power of two within which a sum must be known to be of use."""


def _off(context: Context, modulus: float) -> tuple[Array, Array]:
    """Return by how many multiples of the modulus each sum is off, and which sums that does not explain."""
    codes, scale = context.quantized
    wanted = recorded_sums(context, scale)
    right = linear(context, codes=codes, scale=scale, unscale=1.0, weight_scale=1.0)
    times = np.rint((wanted - right) / modulus)
    off = np.abs(wanted - right - times * modulus)
    allowed = TOLERANCE * (np.abs(right) + np.abs(wanted)) + FEW
    return times, ~(off <= allowed) | (allowed > SHARP * modulus)


def _widths(context: Context) -> Iterator[Fit]:
    for bits in WIDTHS:
        times, unexplained = _off(context, 2.0**bits)
        if not unexplained.any() and times.any():
            said = f"every wrong sum is off by a multiple of {2**bits}: partial sums of {bits} bits wrap around"
            yield Fit(f"{bits}-bit partial sums wrap", partial(_wrapped, modulus=2.0**bits), said)
            return


def _wrapped(context: Context, modulus: float) -> Array:
    _, scale = context.quantized
    times, unexplained = _off(context, modulus)
    if unexplained.any():
        raise Inapplicable
    return context.expected + times * modulus / scale * context.matrix.scale


FITTED = (
    fitted(
        "{}",
        "{0.sentence}",
        _widths,
        family=15,
        ops=BITLINEARS,
        shown="*n*-bit partial sums wrap",
        shown_sentence="every wrong sum is off by a multiple of a power of two",
    ),
)
"""Tried when nothing simpler explains a matrix product."""
