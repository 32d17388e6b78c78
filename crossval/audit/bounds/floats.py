"""BitLinear over activations that an engine does not quantise: a sum of floating-point products.

``y_j = w sum_i x_i t_ij`` with signs ``t`` and scale ``w``. Where the signs are multiplied (packed weights), a
term passes through the sum and the product with the scale; with weights brought back to their size, each product
is rounded before the sum. Either way at most ``n + 2`` roundings of a term of magnitude ``w |x_i t_ij|``, whatever
the order, in binary32 unless the engine states that it adds in fewer digits. That the scale was rounded with the
weights is no part of the bound: ``weight`` has the rounded one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from crossval.audit.bounds.approx import Approx, random_sum
from crossval.audit.bounds.arithmetic import SECOND_ORDER, TINY, Arithmetic, U
from crossval.audit.bounds.integers import BitLinearCheck
from crossval.formats import F32, FORMATS
from crossval.model.kinds import FloatArray, TernaryMatrix

BESIDE_SUM = 2.0
"""Roundings to binary32 beside the sum: a product, and the scale or the result."""


def is_float(arithmetic: Arithmetic) -> bool:
    """Return whether an engine multiplies activations as they are."""
    return arithmetic.numerics.activation_quantization == "none"


def check(
    x: npt.NDArray[np.float32],
    recorded: npt.NDArray[np.floating[Any]],
    weight: TernaryMatrix,
    arithmetic: Arithmetic,
    added: FloatArray,
) -> BitLinearCheck:
    """Return product and bound for a recorded input ``(n_tokens, cols)``; arguments as of ``integers.check``.

    An engine of a 16-bit format may round an input of more digits first: of the two, what fits better.
    """
    wide, form = x.astype(np.float64), arithmetic.format
    given = [wide]
    if arithmetic.low and not form.holds(x):
        given.append(form.round(wide))
    found = [_multiplied(one, weight, arithmetic, added) for one in given]
    with np.errstate(invalid="ignore", over="ignore"):
        return min(found, key=lambda one: float(np.nanmax(np.abs(recorded - one.expected) / one.bound)))


def _multiplied(x: FloatArray, weight: TernaryMatrix, a: Arithmetic, added: FloatArray) -> BitLinearCheck:
    signs = weight.signs.T.astype(np.float64)
    expected = x @ signs * weight.scale
    magnitudes = np.abs(x) @ np.abs(signs) * weight.scale
    bound = (a.sum_steps(x.shape[-1]) + a.carried + BESIDE_SUM) * U * magnitudes + _few_digits(x, magnitudes, a)
    if a.recorded is not F32:
        bound = bound + a.recorded.unit_roundoff * magnitudes + a.recorded.tiny * x.shape[-1] * weight.scale
    bound = bound + _after(expected, a) + a.stored(expected)
    return BitLinearCheck(expected, bound * SECOND_ORDER + TINY + added, 0, x, np.ones((len(x), 1)))


def _few_digits(x: FloatArray, magnitudes: FloatArray, a: Arithmetic) -> FloatArray | float:
    """Return what a sum in the 16-bit format that the engine states may lose, in any order."""
    form = FORMATS[a.numerics.accumulate or "f32"]
    return 0.0 if form is F32 else x.shape[-1] * (form.unit_roundoff * magnitudes + form.tiny)


def _after(expected: FloatArray, a: Arithmetic) -> FloatArray | float:
    """Return the roundings to a 16-bit format before the last: with packed weights, of sum and scale."""
    if not a.low or a.numerics.weights not in (None, "packed"):
        return 0.0
    return 2 * (a.format.unit_roundoff * np.abs(expected) + a.format.tiny)


def propagate(x: Approx, weight: TernaryMatrix, a: Arithmetic) -> Approx:
    """Compute the product with its error; ``x`` is flat, ``(n_rows, cols)``."""
    signs = weight.signs.T.astype(np.float64)
    chosen, scale = np.abs(signs), weight.scale
    value = x.value @ signs * scale
    length = np.sqrt(x.value**2 @ chosen) * scale
    own = random_sum(x.value.shape[-1], length, value, a) + _after(value, a)
    own = own + _few_digits(x.value, np.abs(x.value) @ chosen * scale, a)
    if a.low:  # the result is rounded, and the input may be
        own = own + a.format.unit_roundoff * (np.abs(value) + length) + a.format.tiny
    noise = np.sqrt(x.noise**2 @ chosen) * scale + own + TINY
    return Approx(value, noise, np.sqrt(x.jump**2 @ chosen) * scale, x.shared)
