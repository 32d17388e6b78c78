"""Accumulators that are too narrow: every wrong sum is off by a multiple of a power of two."""

# mypy: disable-error-code="no-any-return"
from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from crossval.diagnose.variants.context import Array, Context, Inapplicable
from crossval.diagnose.variants.fit import Fit, recorded_sums
from crossval.diagnose.variants.linear import linear
from crossval.diagnose.variants.variant import Variant
from crossval.model.taps import BITLINEARS

WIDTHS = (16, 15, 14, 13, 12, 11, 10, 9)
"""Not 8: an int8 activation that wraps is off by 256, too."""
TOLERANCE = 1e-6
"""Relative to the sum: how far float32 may be from a whole number."""
FEW = 0.05
"""The same, absolutely."""
SHARP = 0.02
"""Share of the power of two within which a sum has to be known to prove anything."""


def _off(context: Context, modulus: float) -> tuple[Array, Array]:
    """Return by how many moduli each sum is off, and which sums that does not explain."""
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
            yield Fit(
                f"{bits}-bit partial sums wrap",
                f"every wrong sum is off by a multiple of {2**bits}: partial sums of {bits} bits wrap around",
                bits,
            )
            return


def _wrapped(context: Context, fit: Fit) -> Array:
    _, scale = context.quantized
    modulus = 2.0**fit.data
    times, unexplained = _off(context, modulus)
    if unexplained.any():
        raise Inapplicable
    return context.expected + times * modulus / scale * context.matrix.scale


FITTED = (
    Variant(
        "{0.name}",
        15,
        BITLINEARS,
        "{0.sentence}",
        _wrapped,
        _widths,
        shown="*n*-bit partial sums wrap",
        shown_sentence="every wrong sum is off by a multiple of a power of two",
    ),
)
"""Tried when nothing simpler explains a matrix product."""
