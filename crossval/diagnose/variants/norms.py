"""RMSNorm done wrong: formula, weight, eps, groups, with parameters that are fitted (family 7)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np

from crossval.diagnose.variants.context import Array, Context, Inapplicable
from crossval.diagnose.variants.estimate import Fit, close, factor, fitted, number
from crossval.diagnose.variants.variant import Variant, on
from crossval.model.graphs import op_table
from crossval.model.kinds import Add, RmsNorm, rms_norm, widen
from crossval.model.taps import NORMS

EPS = (0.0, 1e-12, 1e-8, 1e-6, 1e-5, 1e-4, 1e-3)
RESIDUAL_NORMS = on("attn_norm", "ffn_norm", "result_norm")
NOISE = 2e-7
"""Relative error of a token's factor in an engine that computes in float32."""
MOST_GROUPS = 64


def _x(context: Context) -> Array:
    return context.inputs[0]


def mean_square(x: Array) -> Array:
    """Return the mean of the squares of each row, last axis 1."""
    return np.mean(x * x, axis=-1, keepdims=True)


def unit(context: Context, x: Array | None = None) -> Array:
    """Return the input, or another array, divided by its root mean square: normed, not weighted."""
    x = _x(context) if x is None else x
    return x / np.sqrt(mean_square(x) + context.config.rms_eps)


def _norm(
    context: Context, x: Array | None = None, weight: Array | None = None, eps: float | None = None
) -> Array:
    return rms_norm(
        _x(context) if x is None else x,
        context.vector if weight is None else weight,
        eps=context.config.rms_eps if eps is None else eps,
    )


MISPLACED_EPS = "wrong or misplaced eps"
"""What is known where value and place of eps cannot be told apart."""


def _other_eps(context: Context) -> Iterator[float]:
    own = context.config.rms_eps
    return (eps for eps in EPS if abs(eps - own) > 1e-6 * own)


def _centred(context: Context) -> Array:
    """Subtract the mean, but divide by the root mean square of the uncentred row."""
    mean = _x(context).mean(axis=-1, keepdims=True)
    return _norm(context) - mean / np.sqrt(mean_square(_x(context)) + context.config.rms_eps) * context.vector


def _unbiased(context: Context) -> Array:
    x = _x(context)
    mean = np.sum(x * x, axis=-1, keepdims=True) / (x.shape[-1] - 1)
    return x / np.sqrt(mean + context.config.rms_eps) * context.vector


def _per_tensor(context: Context) -> Array:
    if context.n_rows == 1 or not context.whole_pass:
        raise Inapplicable
    return _x(context) / np.sqrt(np.mean(_x(context) ** 2) + context.config.rms_eps) * context.vector


def _per_head(context: Context) -> Array:
    if context.config.n_heads == 1:
        raise Inapplicable
    heads = _x(context).reshape(context.n_rows, context.config.n_heads, -1)
    return unit(context, heads).reshape(_x(context).shape) * context.vector


def _other_weights(context: Context) -> Iterator[str]:
    """Yield the norms of the whole model; those of another length do not apply."""
    norms = [op for op in op_table(context.config) if isinstance(op.kind, RmsNorm)]
    names = (op.weights[0] for op in sorted(norms, key=lambda op: op.layer is not None))
    return (name for name in names if name != context.op.weights[0])


def _with_weight(context: Context, name: str) -> Array:
    weight = context.array(name)
    if weight.shape != context.vector.shape:
        raise Inapplicable
    return _norm(context, weight=weight)


def _summands(context: Context) -> tuple[str, str]:
    """Return the taps whose sum the norm reads: branch and residual stream."""
    for op in op_table(context.config):
        if op.output == context.op.inputs[0] and isinstance(op.kind, Add):
            return op.inputs[0], op.inputs[1]
    raise Inapplicable


norm = partial(Variant, family=7, ops=NORMS)
# fmt: off
VARIANTS = (
    norm("norm skipped", "the input is passed on unnormed", lambda c: _x(c).copy()),
    norm("norm skipped but for its weight", "only multiplied by the weight, not normed",
        lambda c: _x(c) * c.vector),
    norm("eps {:g}", "eps hard-coded to {:g} instead of the header's value", lambda c, eps: _norm(c, eps=eps),
        _other_eps, group=MISPLACED_EPS),
    norm("eps outside the root", "eps is added to the root mean square instead of to the mean square",
        lambda c: _x(c) / (np.sqrt(mean_square(_x(c))) + c.config.rms_eps) * c.vector, group=MISPLACED_EPS),
    norm("eps as a lower limit", "eps limits the mean square from below instead of being added to it",
        lambda c: _x(c) / np.sqrt(np.maximum(mean_square(_x(c)), c.config.rms_eps)) * c.vector,
        group=MISPLACED_EPS),
    norm("eps added to the sum", "eps is added to the sum of squares, before the division by the length",
        lambda c: _norm(c, eps=c.config.rms_eps / _x(c).shape[-1]), group=MISPLACED_EPS),
    norm("LayerNorm", "mean-centred LayerNorm instead of RMSNorm",
        lambda c: unit(c, _x(c) - _x(c).mean(axis=-1, keepdims=True)) * c.vector),
    norm("centred without variance of it",
        "the mean is subtracted, but the divisor is the root mean square of the uncentred row",
        _centred),
    norm("norm weight not applied", "the norm's weight is not applied",
        lambda c: _norm(c, weight=np.ones_like(c.vector))),
    norm("norm weight + 1", "multiplied by 1 + weight (Gemma) instead of weight",
        lambda c: _norm(c, weight=c.vector + 1)),
    norm("norm weight - 1", "multiplied by weight - 1: the 1 of Gemma's norms, which files hold, is taken off",
        lambda c: _norm(c, weight=c.vector - 1)),
    norm("norm weight applied twice", "the norm's weight is applied twice",
        lambda c: _norm(c, weight=c.vector**2)),
    norm("norm weight as a bias", "the norm's weight is added instead of multiplied",
        lambda c: _norm(c, weight=np.ones_like(c.vector)) + c.vector),
    norm("norm weight of {}", "the weight is that of {}", _with_weight, _other_weights,
        group="norm weight of another tensor"),
    norm("sum instead of mean", "divided by the root of the sum of squares instead of their mean (L2 norm)",
        lambda c: _x(c) / np.sqrt(np.sum(_x(c) ** 2, axis=-1, keepdims=True) + c.config.rms_eps) * c.vector),
    norm("n - 1 instead of n", "the sum of squares is divided by n - 1", _unbiased),
    norm("root missing", "divided by the mean square instead of its root",
        lambda c: _x(c) / (mean_square(_x(c)) + c.config.rms_eps) * c.vector),
    norm("per-tensor norm", "one root mean square for all tokens of the pass", _per_tensor),
    Variant("per-head norm", "every head is normed by itself", _per_head, family=7, ops=on("attn_sub_norm")),
    norm("norm applied twice", "normed and weighted twice", lambda c: _norm(c, _norm(c))),
    Variant("norm of the branch without its residual", "norms what was added last, without the residual stream",
        lambda c: _norm(c, c.tap(_summands(c)[0])), family=13, ops=RESIDUAL_NORMS),
    Variant("norm of the stream without its branch",
        "norms the residual stream as it was before the last addition",
        lambda c: _norm(c, c.tap(_summands(c)[1])), family=13, ops=RESIDUAL_NORMS),
)
# fmt: on

# --- fitted ---------------------------------------------------------------------------------------------------


def _evidence(context: Context) -> tuple[Array, Array]:
    """Return inputs and outputs of the tokens to fit: of this pass, or of all single-token passes."""
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


def _eps(context: Context) -> Iterator[Fit]:
    """Fit eps from the factors of two tokens or more (for one, any factor corresponds to some eps)."""
    factors, squares, _ = token_factors(context)
    values = 1.0 / factors**2 - squares
    noise = 2.0 * NOISE / factors**2
    weight = 1.0 / noise**2
    eps = float((values * weight).sum() / weight.sum())
    unsure = float(1.0 / np.sqrt(weight.sum()))
    own = context.config.rms_eps
    if (np.abs(values - eps) > 6 * noise).any() or any(abs(eps - x) <= 4 * unsure for x in (0.0, own)):
        return

    def formula(c: Context) -> Array:
        with np.errstate(invalid="ignore"):
            return _x(c) / np.sqrt(mean_square(_x(c)) + eps) * c.vector

    yield Fit(number(eps, 2 if unsure < 2e-3 * abs(eps) else 1), formula)


def _powers(context: Context) -> Iterator[Fit]:
    """Fit the power of the mean square by which tokens are divided, from two tokens or more."""
    factors, squares, _ = token_factors(context)
    logs = np.log(squares + context.config.rms_eps)
    if np.ptp(logs) < 1e-2:
        return
    power = float(-(logs * np.log(factors)).sum() / (logs * logs).sum())
    fits = np.abs(np.log(factors) + power * logs).max() < 1e-5
    if fits and not close(power, (0.5,)) and abs(power) > 1e-4:
        yield Fit(number(power, 3), lambda c: _x(c) / (mean_square(_x(c)) + c.config.rms_eps) ** power * c.vector)


def _offset(context: Context) -> float:
    return factor(context.target - unit(context) * context.vector, unit(context))


def _offsets(context: Context) -> Iterator[Fit]:
    """Estimate a constant added to the norm's weight."""
    offset = _offset(context)
    flat = np.ptp(context.vector) <= 1e-3 * np.abs(context.vector).max()  # then it is a factor of the output
    if abs(offset) > 1e-6 and not flat:
        yield Fit(number(offset), lambda c: unit(c) * (c.vector + _offset(c)))


def _weight_powers(context: Context) -> Iterator[Fit]:
    """Estimate the power to which the norm's weight was raised."""
    normed, weight = unit(context), context.vector.astype(np.float64)
    with np.errstate(all="ignore"):
        used = (normed * context.target).sum(axis=0) / (normed * normed).sum(axis=0)
        usable = (weight > 0) & (used > 0) & (np.abs(np.log(weight)) > 1e-3)
        x, y = np.log(weight[usable]), np.log(used[usable])
    if x.size < 8:
        return
    power = factor(y, x)
    if not close(power, (1.0,), 1e-3) and abs(power) > 1e-3:
        signed = np.sign(weight) * np.abs(weight) ** power
        yield Fit(number(power, 3), lambda c: unit(c) * signed)


def _groups(context: Context) -> Iterator[int]:
    """Yield the sizes of groups in which a row could be normed."""
    n = _x(context).shape[-1]
    return iter([size for size in range(2, n) if n % size == 0][-MOST_GROUPS:])


def _in_groups(context: Context, size: int) -> Array:
    groups = _x(context).reshape(context.n_rows, -1, size)
    with np.errstate(all="ignore"):
        return unit(context, groups).reshape(_x(context).shape) * context.vector


def _parts(context: Context) -> Iterator[Fit]:
    """Find over how many leading values of each row the mean square is computed."""
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
            formula = partial(_of_part, count=best + 1, divisor=int(divisor[best]))
            yield Fit(f"first {best + 1} of {n} values, divided by {whose}", formula)


def _of_part(context: Context, count: int, divisor: int) -> Array:
    square = (_x(context)[..., :count] ** 2).sum(axis=-1, keepdims=True) / divisor
    return _x(context) / np.sqrt(square + context.config.rms_eps) * context.vector


fitted_norm = partial(fitted, family=7, ops=NORMS)
# fmt: off
FITTED = (
    fitted_norm("eps {}", "eps hard-coded to {} instead of the header's value", _eps, group=MISPLACED_EPS),
    fitted_norm("mean square to the power {}", "divided by the mean square to the power {} instead of its root",
        _powers),
    fitted_norm("norm weight plus {}", "multiplied by weight plus {} instead of weight", _offsets),
    fitted_norm("norm weight to the power {}", "multiplied by the weight to the power {}", _weight_powers),
    norm("norm in groups of {}", "every {} values are normed by themselves instead of the whole row",
        _in_groups, _groups, group="norm in groups"),
    fitted_norm("root mean square of the {}", "the mean square is taken of the {}", _parts),
)
# fmt: on
