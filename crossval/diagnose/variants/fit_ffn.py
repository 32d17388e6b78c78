"""Activation functions with a parameter of their own, fitted to the points of gate and activation (family 6)."""

# mypy: disable-error-code="no-any-return"
from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from crossval.diagnose.variants.context import Array, Context, Inapplicable
from crossval.diagnose.variants.estimate import Estimate, close, factor, golden, number, require
from crossval.diagnose.variants.ffn import ACT, OUT, gelu, gelu_tanh, sigmoid, silu
from crossval.diagnose.variants.variant import Variant

LEAST_POINTS = 8
"""Values that must be left to check a function on, beyond those it was fitted to."""


def _points(context: Context) -> tuple[Array, Array]:
    x, y = context.inputs[0].ravel(), context.target.ravel()
    if not np.isfinite(y).all() or x.size < LEAST_POINTS:
        raise Inapplicable
    return x, y


def _powers(context: Context) -> Iterator[Estimate]:
    """Estimate ``c · max(x, 0)^p``."""
    x, y = _points(context)
    usable = (x > 1e-6 * np.abs(x).max()) & (y > 0)
    if usable.sum() < LEAST_POINTS or (y[x < 0] != 0).any():
        return
    slope, constant = np.polyfit(np.log(x[usable]), np.log(y[usable]), 1, w=np.sqrt(np.abs(y[usable])))
    c = float(np.exp(constant))
    if close(slope, (2.0,)):  # a factor of the output
        return
    times = "" if close(c, (1.0,)) else f", times {number(c, 4)}"
    yield Estimate(f"ReLU to the power {number(slope, 4)}{times}", (slope, 1.0 if not times else c))


def _power(context: Context, fit: Estimate) -> Array:
    slope, c = fit.value
    return require(context, c * np.maximum(context.inputs[0], 0.0) ** slope)


Side = tuple[str, Callable[[Array], Array]]
SIDES: tuple[Side, ...] = (("x", lambda x: x), ("x²", lambda x: x * x))


def _leaks(context: Context) -> Iterator[Estimate]:
    """Estimate ``x`` or ``x²`` for positive values, a multiple of either for negative ones."""
    x, y = _points(context)
    negative = x < 0
    if negative.sum() < LEAST_POINTS or (~negative).sum() < LEAST_POINTS:
        return
    for left, below in SIDES:
        a = factor(y[negative], below(x[negative]))
        if abs(a) < 1e-6:
            continue
        for right, above in SIDES:
            yield Estimate(f"{right} above zero and {number(a, 4)}·{left} below", (above, below, a))


def _leaky(context: Context, fit: Estimate) -> Array:
    above, below, a = fit.value
    x = context.inputs[0]
    return require(context, np.where(x > 0, above(x), a * below(x)))


def _limited(y: Array) -> float:
    """Return the largest value, where it occurs so often that it must be a limit; else it is no limit."""
    top = float(y.max())
    alike = y[y >= top * (1 - 2e-6)]
    if alike.size < 2 or top <= 0:
        raise Inapplicable
    return float(np.median(alike))


FUNCTIONS: tuple[Side, ...] = (
    ("squared ReLU", lambda x: np.maximum(x, 0.0) ** 2),
    ("ReLU", lambda x: np.maximum(x, 0.0)),
    ("the input", lambda x: x.copy()),
)


def _limits(context: Context) -> Iterator[Estimate]:
    """Read a limit off the largest value."""
    _, y = _points(context)
    top = _limited(y)
    for name, function in FUNCTIONS:
        yield Estimate(f"{name} limited to {number(top, 4)}", (function, top))


def _limit(context: Context, fit: Estimate) -> Array:
    function, top = fit.value
    return require(context, np.minimum(function(context.inputs[0]), top))


def _lines(context: Context) -> Iterator[Estimate]:
    """Estimate ``a · x + b``."""
    x, y = _points(context)
    a, b = np.polyfit(x, y, 1)
    if abs(b) < 1e-6 * np.abs(y).max():
        if abs(a) > 1e-6:
            yield Estimate(f"{number(a, 4)}·x", (a, 0.0))
    elif abs(a) > 1e-6:
        yield Estimate(f"{number(a, 4)}·x {'+' if b > 0 else '-'} {number(abs(b), 4)}", (a, b))


def _line(context: Context, fit: Estimate) -> Array:
    a, b = fit.value
    return require(context, a * context.inputs[0] + b)


def _thresholds(context: Context) -> Iterator[Estimate]:
    """Estimate ``max(x - t, 0)²`` from the root of what was recorded."""
    x, y = _points(context)
    usable = y > 1e-6 * y.max()
    if usable.sum() < LEAST_POINTS or (y < 0).any():
        return
    t = float(np.median(x[usable] - np.sqrt(y[usable])))
    if abs(t) > 1e-4:
        yield Estimate(f"squared ReLU of x {'-' if t > 0 else '+'} {number(abs(t), 4)}", t)


def _threshold(context: Context, fit: Estimate) -> Array:
    return require(context, np.maximum(context.inputs[0] - fit.value, 0.0) ** 2)


def _swishes(context: Context) -> Iterator[Estimate]:
    """Estimate ``x · sigmoid(β x)``."""
    x, y = _points(context)
    spread = x[:: max(1, x.size // 4096)], y[:: max(1, x.size // 4096)]

    def distance(log_beta: float) -> float:
        return float(np.linalg.norm(spread[0] * sigmoid(np.exp(log_beta) * spread[0]) - spread[1]))

    tried = np.linspace(-4.0, 4.0, 33)
    best = tried[np.argmin([distance(b) for b in tried])]
    beta = float(np.exp(golden(distance, best - 0.25, best + 0.25)))
    yield Estimate(f"x·sigmoid({number(beta, 3)}·x)", beta)


def _swish(context: Context, fit: Estimate) -> Array:
    x = context.inputs[0]
    return require(context, x * sigmoid(fit.value * x), 1e-4)


def _fitted(function: Callable[..., Array], parameters: Callable[[Context], Iterator[Estimate]]) -> Variant:
    return Variant("{}", 6, ACT, "{} instead of squared ReLU", function, parameters, group="another activation")


def _gated(name: str, function: Callable[[Array], Array]) -> Variant:
    return Variant(
        f"{name} gate",
        6,
        OUT,
        f"{name} of ffn_gate times ffn_up",
        lambda c: function(c.tap(c.name("ffn_gate"))) * c.inputs[1],
    )


def _product_limits(context: Context) -> Iterator[Estimate]:
    """Read limits of the product off its largest values on either side."""
    y = np.abs(context.target)
    if np.isfinite(y).all():
        top = _limited(y)
        yield Estimate(number(top, 4), top)


FITTED = (
    _fitted(_power, _powers),
    _fitted(_leaky, _leaks),
    _fitted(_limit, _limits),
    _fitted(_line, _lines),
    _fitted(_threshold, _thresholds),
    _fitted(_swish, _swishes),
    _gated("GELU", gelu),
    _gated("GELU (tanh)", gelu_tanh),
    _gated("GELU (sigmoid)", lambda x: x * sigmoid(1.702 * x)),
    _gated("plain ReLU", lambda x: np.maximum(x, 0.0)),
    _gated("squared SiLU", lambda x: silu(x) ** 2),
    Variant(
        "product limited to ±{}",
        6,
        OUT,
        "the product is limited to ±{}",
        lambda c, fit: require(c, np.clip(c.expected, -fit.value, fit.value)),
        _product_limits,
    ),
)
