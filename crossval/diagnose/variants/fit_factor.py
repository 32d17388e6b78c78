"""The right output times a constant, and weighted sums of branch and residual stream: least squares."""

# mypy: disable-error-code="no-any-return"
from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from crossval.diagnose.variants.context import Array, Context, Inapplicable
from crossval.diagnose.variants.estimate import Estimate, close, factor, number, require
from crossval.diagnose.variants.fit_norms import token_factors
from crossval.diagnose.variants.residual import ADD
from crossval.diagnose.variants.variant import Variant, on
from crossval.model.taps import BITLINEARS, NORMS

FAMILY = {
    4: BITLINEARS,
    6: on("ffn_act", "ffn_out"),
    7: NORMS,
    8: on("q_rope", "k_rope"),
    9: on("kq", "kq_soft_max", "kqv_out"),
    10: on("inp_embd", "result_output"),
    13: ADD,
}
LEAST = 2e-6
"""Factors this near to 1 are rounding."""


LEAST_VALUES = 16
"""Of fewer values, the wrong one of a single feature say, a factor says nothing."""
WORTH = 0.1
"""A factor must take away all but this part of what deviates to be worth trying on every token."""


def _fitted(context: Context) -> float:
    """Return the factor between the right output and the recorded one.

    Raises:
        Inapplicable: there is none that comes near.
    """
    target, right = context.target, context.expected
    if context.visible is not None:
        target, right = (np.where(context.visible, array, 0.0) for array in (target, right))
    c = factor(target, right)
    if np.count_nonzero(right) < LEAST_VALUES:
        raise Inapplicable
    if np.linalg.norm(target - c * right) > WORTH * np.linalg.norm(target - right):
        raise Inapplicable
    return c


def _factors(context: Context) -> Iterator[Estimate]:
    c = _fitted(context)
    if context.op.name in NORMS and context.n_rows == 1:  # any eps explains the factor of one token
        factors, squares, _ = token_factors(context)
        if np.ptp(factors * np.sqrt(squares + context.config.rms_eps)) > 1e-5 * c:
            return
    if abs(c) > 1e-12 and not close(c, (0.0, 1.0), LEAST):
        yield Estimate(number(c), c)


def _times(context: Context, c: Estimate) -> Array:
    output = context.expected * c.value
    return require(context, output) if context.op.name in FAMILY[6] else output


def _weights(context: Context) -> Iterator[Estimate]:
    """Fit the weights of branch and residual stream."""
    if not np.isfinite(context.target).all():
        raise Inapplicable
    branch, stream = (x.ravel() for x in context.inputs)
    found = np.linalg.lstsq(np.stack([branch, stream], axis=-1), context.target.ravel(), rcond=None)[0]
    a, b = (0.0 if abs(x) < LEAST else 1.0 if abs(x - 1) < LEAST else float(x) for x in found)
    if abs(a - b) > LEAST:  # a factor of the sum otherwise
        yield Estimate(f"{number(a)} times the branch plus {number(b)} times the residual stream", (a, b))


def _weighted(context: Context, weights: Estimate) -> Array:
    a, b = weights.value
    return a * context.inputs[0] + b * context.inputs[1]


FITTED = (
    *(
        Variant("output times {}", family, ops, "the output is {} times what it should be", _times, _factors)
        for family, ops in FAMILY.items()
    ),
    Variant("{}", 13, ADD, "the sum is {}", _weighted, _weights),
)
