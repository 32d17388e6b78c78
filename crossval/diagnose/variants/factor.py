"""The correct output times a constant: least squares (the operation's own family)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np

from crossval.diagnose.variants.context import Array, Context, Inapplicable
from crossval.diagnose.variants.estimate import Fit, close, factor, fitted, number, require
from crossval.diagnose.variants.norms import token_factors
from crossval.diagnose.variants.variant import on
from crossval.model.taps import BITLINEARS, NORMS

ACTIVATIONS = on("ffn_act", "ffn_out")
FAMILY = {
    4: BITLINEARS,
    6: ACTIVATIONS,
    7: NORMS,
    8: on("q_rope", "k_rope"),
    9: on("q_scaled", "kq", "kq_soft_max", "kqv_out"),
    10: on("inp_embd", "inp_scaled", "result_output", "pooled", "embedding"),
    13: on("ffn_inp", "l_out"),
}
LEAST = 2e-6
"""Factors this close to 1 are rounding."""
LEAST_VALUES = 16
"""Minimum number of values: of fewer, such as one wrong feature, a factor has no meaning."""
WORTH = 0.1
"""A factor must remove all but this fraction of the deviation to be worth trying on every token."""


def _factor(context: Context) -> float:
    """Return the factor between the correct output and the recorded one.

    Raises:
        Inapplicable: none comes close.
    """
    target, right = context.masked(context.target), context.masked(context.expected)
    c = factor(target, right)
    if np.count_nonzero(right) < LEAST_VALUES:
        raise Inapplicable
    if np.linalg.norm(target - c * right) > WORTH * np.linalg.norm(target - right):
        raise Inapplicable
    return c


def _factors(context: Context) -> Iterator[Fit]:
    c = _factor(context)
    if context.op.name in NORMS and context.n_rows == 1:  # any eps explains the factor of one token
        factors, squares, _ = token_factors(context)
        if np.ptp(factors * np.sqrt(squares + context.config.rms_eps)) > 1e-5 * c:
            return
    if abs(c) > 1e-12 and not close(c, (0.0, 1.0), LEAST):
        yield Fit(number(c), partial(_times, factor=c))


def _times(context: Context, factor: float) -> Array:
    output = context.expected * factor
    return require(context, output) if context.op.name in ACTIVATIONS else output


def _product_factors(context: Context) -> Iterator[Fit]:
    """Fit what the product before a bias was multiplied by."""
    bias = context.bias
    if bias is None:
        raise Inapplicable
    c = factor(context.target - bias, context.expected - bias)
    if abs(c) > 1e-12 and not close(c, (0.0, 1.0), LEAST):
        yield Fit(number(c), lambda context: _product_times(context, c))


def _product_times(context: Context, factor: float) -> Array:
    if context.bias is None:
        raise Inapplicable
    return (context.expected - context.bias) * factor + context.bias


FITTED = (
    *(
        fitted("output times {}", "the output is {} times what it should be", _factors, family=family, ops=ops)
        for family, ops in FAMILY.items()
    ),
    fitted("product times {}", "the product is {} times what it should be, before the bias is added",
        _product_factors, family=4, ops=BITLINEARS),
)  # fmt: skip
