"""Norms with a parameter of their own: eps, divisor, weight offset and power, groups, fitted (family 7)."""

# mypy: disable-error-code="no-any-return"
from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from crossval.diagnose.variants.context import Array, Context, Inapplicable
from crossval.diagnose.variants.estimate import Estimate, close, factor, number
from crossval.diagnose.variants.norms import mean_square
from crossval.diagnose.variants.variant import Variant
from crossval.model.kinds import widen
from crossval.model.taps import NORMS

NOISE = 2e-7
"""Relative error of a token's factor in an engine that computes in float32."""
MOST_GROUPS = 64


def _evidence(context: Context) -> tuple[Array, Array]:
    """Return inputs and outputs of the tokens that tell: of this pass, or of all passes of a single token."""
    if context.n_rows > 1:
        return context.inputs[0], context.target
    pairs = []
    for record in context.passes:
        x, y = record.taps.get(context.op.inputs[0]), record.taps.get(context.op.output)
        alike = record.plan.kind == context.plan.kind and len(record.plan.token_ids) == context.n_tokens
        if x is not None and y is not None and alike and y.array.shape[0] == 1:
            pairs.append((widen(x.array)[-1], widen(y.array)[-1]))
    if len(pairs) < 2 or any(x.shape != y.shape for x, y in pairs):
        return context.inputs[0], context.target
    return np.stack([x for x, _ in pairs]), np.stack([y for _, y in pairs])


def token_factors(context: Context) -> tuple[Array, Array, Array]:
    """Return for each token the factor between input times weight and output, the mean square, and the input.

    Raises:
        Inapplicable: there are not two tokens, or an output is not its weighted input times a factor.
    """
    x, target = _evidence(context)
    weighted = x * context.vector
    with np.errstate(all="ignore"):
        factors = (weighted * target).sum(axis=-1) / (weighted * weighted).sum(axis=-1)
        off = np.linalg.norm(target - weighted * factors[:, None], axis=-1)
        fits = off <= 1e-5 * np.linalg.norm(target, axis=-1)
    squares = mean_square(x)[:, 0]
    if factors.size < 2 or not fits.all() or (factors <= 0).any() or (squares == 0).any():
        raise Inapplicable
    return factors, squares, x


def _eps(context: Context) -> Iterator[Estimate]:
    """Fit eps from the factors of two tokens or more (of one, any factor is some eps)."""
    factors, squares, _ = token_factors(context)
    values = 1.0 / factors**2 - squares
    noise = 2.0 * NOISE / factors**2
    weight = 1.0 / noise**2
    eps = float((values * weight).sum() / weight.sum())
    unsure = float(1.0 / np.sqrt(weight.sum()))
    own = context.config.rms_eps
    if (np.abs(values - eps) > 6 * noise).any() or any(abs(eps - x) <= 4 * unsure for x in (0.0, own)):
        return
    yield Estimate(number(eps, 2 if unsure < 2e-3 * abs(eps) else 1), eps)


def _with_eps(context: Context, fit: Estimate) -> Array:
    x = context.inputs[0]
    with np.errstate(invalid="ignore"):
        return x / np.sqrt(mean_square(x) + fit.value) * context.vector


def _powers(context: Context) -> Iterator[Estimate]:
    """Fit the power of the mean square by which tokens are divided, from two tokens or more."""
    factors, squares, _ = token_factors(context)
    logs = np.log(squares + context.config.rms_eps)
    if np.ptp(logs) < 1e-2:
        return
    power = float(-(logs * np.log(factors)).sum() / (logs * logs).sum())
    fits = np.abs(np.log(factors) + power * logs).max() < 1e-5
    if fits and not close(power, (0.5,)) and abs(power) > 1e-4:
        yield Estimate(number(power, 3), power)


def _with_power(context: Context, fit: Estimate) -> Array:
    x = context.inputs[0]
    return x / (mean_square(x) + context.config.rms_eps) ** fit.value * context.vector


def _unit(context: Context) -> Array:
    x = context.inputs[0]
    return x / np.sqrt(mean_square(x) + context.config.rms_eps)


def _offset(context: Context) -> float:
    unit = _unit(context)
    return factor(context.target - unit * context.vector, unit)


def _offsets(context: Context) -> Iterator[Estimate]:
    """Estimate a constant added to the norm's weight."""
    c = _offset(context)
    flat = np.ptp(context.vector) <= 1e-3 * np.abs(context.vector).max()  # then it is a factor of the output
    if abs(c) > 1e-6 and not flat:
        yield Estimate(number(c), c)


def _with_offset(context: Context, fit: Estimate) -> Array:
    return _unit(context) * (context.vector + _offset(context))


def _weight_powers(context: Context) -> Iterator[Estimate]:
    """Estimate the power to which the norm's weight was raised."""
    unit, weight = _unit(context), context.vector.astype(np.float64)
    with np.errstate(all="ignore"):
        used = (unit * context.target).sum(axis=0) / (unit * unit).sum(axis=0)
        usable = (weight > 0) & (used > 0) & (np.abs(np.log(weight)) > 1e-3)
        x, y = np.log(weight[usable]), np.log(used[usable])
    if x.size < 8:
        return
    power = factor(y, x)
    if not close(power, (1.0,), 1e-3) and abs(power) > 1e-3:
        yield Estimate(number(power, 3), power)


def _with_weight_power(context: Context, fit: Estimate) -> Array:
    weight = context.vector.astype(np.float64)
    return _unit(context) * np.sign(weight) * np.abs(weight) ** fit.value


def _groups(context: Context) -> Iterator[int]:
    """Yield the sizes of groups that a row could be normed in."""
    n = context.inputs[0].shape[-1]
    sizes = [size for size in range(2, n) if n % size == 0]
    return iter(sizes[-MOST_GROUPS:])


def _in_groups(context: Context, size: int) -> Array:
    x = context.inputs[0]
    groups = x.reshape(x.shape[0], -1, size)
    with np.errstate(all="ignore"):
        return (groups / np.sqrt(mean_square(groups) + context.config.rms_eps)).reshape(x.shape) * context.vector


def _parts(context: Context) -> Iterator[Estimate]:
    """Find how many values at the front of each row the mean square is taken over."""
    factors, _, x = token_factors(context)
    n = x.shape[-1]
    if factors.size < 3:  # there are as many lengths to choose from as values
        return
    sums = np.cumsum(x * x, axis=-1)
    wanted = 1.0 / factors**2 - context.config.rms_eps
    counts = np.arange(1, n)
    for whose, divisor in (("their number", counts), ("the whole length", np.full(n - 1, n))):
        off = np.abs(sums[:, :-1] / divisor / wanted[:, None] - 1.0).max(axis=0)
        best = int(off.argmin())
        if off[best] < 2e-6:
            yield Estimate(f"first {best + 1} of {n} values, divided by {whose}", (best + 1, int(divisor[best])))


def _of_part(context: Context, fit: Estimate) -> Array:
    count, divisor = fit.value
    x = context.inputs[0]
    square = (x[..., :count] ** 2).sum(axis=-1, keepdims=True) / divisor
    return x / np.sqrt(square + context.config.rms_eps) * context.vector


FITTED = (
    Variant(
        "eps {}",
        7,
        NORMS,
        "eps hard-coded to {} instead of the header's value",
        _with_eps,
        _eps,
        group="wrong eps",
    ),
    Variant(
        "mean square to the power {}",
        7,
        NORMS,
        "divided by the mean square to the power {} instead of its root",
        _with_power,
        _powers,
    ),
    Variant(
        "norm weight plus {}", 7, NORMS, "multiplied by weight plus {} instead of weight", _with_offset, _offsets
    ),
    Variant(
        "norm weight to the power {}",
        7,
        NORMS,
        "multiplied by the weight to the power {}",
        _with_weight_power,
        _weight_powers,
    ),
    Variant(
        "norm in groups of {}",
        7,
        NORMS,
        "every {} values are normed by themselves instead of the whole row",
        _in_groups,
        _groups,
        group="norm in groups",
    ),
    Variant("root mean square of the {}", 7, NORMS, "the mean square is taken of the {}", _of_part, _parts),
)
