"""Gate, activation and product of the feed-forward network done wrong, also fitted (family 6)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np

from crossval.diagnose.variants.context import Array, Context, Inapplicable
from crossval.diagnose.variants.estimate import STRICT, Fit, close, factor, fitted, log_minimum, number, require
from crossval.diagnose.variants.variant import Variant, on
from crossval.formats import to_f16
from crossval.model.kinds import squared_relu

ACT = on("ffn_act")
OUT = on("ffn_out")
Function = Callable[[Array], Array]
OWN = {"relu_squared": "squared ReLU", "silu": "SiLU", "gelu": "GELU (tanh)"}
"""``SpecConfig.activation`` in words."""
LEAST_POINTS = 8
"""Minimum number of values to check a function on, besides those it was fitted to."""


def sigmoid(x: Array) -> Array:
    """Return ``1 / (1 + exp(-x))``."""
    with np.errstate(over="ignore"):
        return 1.0 / (1.0 + np.exp(-x))


def silu(x: Array) -> Array:
    """Return ``x * sigmoid(x)``."""
    return x * sigmoid(x)


def gelu(x: Array) -> Array:
    """Return ``x * Phi(x)`` with the exact normal distribution function."""
    erf = np.vectorize(math.erf, otypes=[np.float64])
    return x * 0.5 * (1.0 + erf(x / math.sqrt(2.0)))


def gelu_tanh(x: Array) -> Array:
    """Return the tanh approximation of GELU."""
    return 0.5 * x * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def relu(x: Array) -> Array:
    """Return ``max(x, 0)``."""
    return np.maximum(x, 0.0)


FUNCTIONS: dict[str, Function] = {
    "squared ReLU": squared_relu,
    "SiLU": silu,
    "GELU": gelu,
    "GELU (tanh)": gelu_tanh,
    "GELU (sigmoid)": lambda x: x * sigmoid(1.702 * x),
    "plain ReLU": relu,
    "no activation": lambda x: x.copy(),
    "square without ReLU": lambda x: x * x,
    "signed square": lambda x: x * np.abs(x),
    "cubed ReLU": lambda x: relu(x) ** 3,
    "squared SiLU": lambda x: silu(x) ** 2,
    "sigmoid": sigmoid,
    "tanh": np.tanh,
    "softplus": lambda x: np.logaddexp(0.0, x),
}


def _up(context: Context) -> Array:
    return context.tap(context.name("ffn_up"))


def _gate(context: Context) -> Array:
    return context.tap(context.name("ffn_gate"))


def _of_gate(function: Function) -> Callable[[Context], Array]:
    return lambda c: function(_gate(c)) * c.inputs[1]


def _unless_own(activation: str, function: Function) -> Callable[[Context], Array]:
    """Return the product with a function of the gate that is not the model's."""

    def product(c: Context) -> Array:
        if c.config.activation == activation:
            raise Inapplicable
        return function(_gate(c)) * c.inputs[1]

    return product


def _activation(name: str, function: Function) -> Variant:
    """Return a function in the place of the model's own."""

    def own(context: Context) -> tuple[str, ...]:
        words = OWN[context.config.activation]
        return () if words == name else (words,)

    return activation(
        name, f"{name} instead of {{}}", lambda c, _: function(c.inputs[0]), own,
        shown_sentence=f"{name} instead of the model's activation",
    )  # fmt: skip


def _looked_up(name: str, function: Function) -> Variant:
    """Return a function in the place of GELU, from a table of binary16 as llama.cpp has one of GELU."""

    def table(context: Context) -> Array:
        if context.config.activation != "gelu" or name == OWN["gelu"]:
            raise Inapplicable
        with np.errstate(over="ignore"):
            return to_f16(function(to_f16(context.inputs[0])))

    return activation(f"{name} by a table", f"{name}, rounded to F16 with its gate, instead of GELU (tanh)", table)


activation = partial(Variant, family=6, ops=ACT)
gated = partial(Variant, family=6, ops=OUT)
# fmt: off
VARIANTS = (
    *(_activation(name, f) for name, f in FUNCTIONS.items()),
    *(_looked_up(name, FUNCTIONS[name]) for name in ("GELU", "SiLU", "GELU (sigmoid)")),
    activation("activation on up", "squared ReLU of ffn_up instead of ffn_gate (gate and up swapped)",
        lambda c: squared_relu(_up(c))),
    activation("SiLU on up", "SiLU of ffn_up instead of squared ReLU of ffn_gate", lambda c: silu(_up(c))),
    activation("already multiplied by up", "the tap holds the gated product, not the activation",
        lambda c: squared_relu(c.inputs[0]) * _up(c)),
    gated("up ignored", "the activation alone, not multiplied by ffn_up", lambda c: c.inputs[0].copy()),
    gated("activation ignored", "ffn_up alone, not gated", lambda c: c.inputs[1].copy()),
    gated("sum instead of product", "activation plus ffn_up instead of times",
        lambda c: c.inputs[0] + c.inputs[1]),
    gated("multiplied by gate", "the activation is multiplied by ffn_gate instead of ffn_up",
        lambda c: c.inputs[0] * _gate(c)),
    gated("gate without activation", "ffn_gate itself times ffn_up", lambda c: _gate(c) * c.inputs[1]),
    gated("activation on up", "squared ReLU of ffn_up times ffn_gate (gate and up swapped)",
        lambda c: squared_relu(c.inputs[1]) * _gate(c)),
    gated("SiLU gate", "SiLU of ffn_gate times ffn_up", _unless_own("silu", silu)),
    gated("SiLU of the activation", "SiLU applied once more to the activation",
        lambda c: silu(c.inputs[0]) * c.inputs[1]),
    gated("squared ReLU applied twice", "squared ReLU applied once more to the activation",
        lambda c: squared_relu(c.inputs[0]) * c.inputs[1]),
    gated("activation on both", "ffn_up goes through squared ReLU too",
        lambda c: c.inputs[0] * squared_relu(c.inputs[1])),
    gated("activation squared", "the activation times itself", lambda c: c.inputs[0] ** 2),
)
# fmt: on

# --- fitted ---------------------------------------------------------------------------------------------------


def _points(context: Context) -> tuple[Array, Array]:
    x, y = context.inputs[0].ravel(), context.target.ravel()
    if not np.isfinite(y).all() or x.size < LEAST_POINTS:
        raise Inapplicable
    return x, y


def _fit(name: str, function: Function, limit: float = STRICT) -> Fit:
    """Return a function of the input that has to fit every token."""
    return Fit(name, lambda c: require(c, function(c.inputs[0]), limit))


def _powers(context: Context) -> Iterator[Fit]:
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
    c = c if times else 1.0
    yield _fit(f"ReLU to the power {number(slope, 4)}{times}", lambda x: c * relu(x) ** slope)


def _leaks(context: Context) -> Iterator[Fit]:
    """Estimate ``x`` or ``x²`` for positive values, a multiple of either for negative ones."""
    x, y = _points(context)
    negative = x < 0
    if negative.sum() < LEAST_POINTS or (~negative).sum() < LEAST_POINTS:
        return
    for left, p in (("x", 1), ("x²", 2)):
        a = factor(y[negative], x[negative] ** p)
        for right, q in (("x", 1), ("x²", 2)) if abs(a) >= 1e-6 else ():
            yield _fit(f"{right} above zero and {number(a, 4)}·{left} below", partial(_leaky, p=p, q=q, a=a))


def _leaky(x: Array, p: int, q: int, a: float) -> Array:
    return np.where(x > 0, x**q, a * x**p)


def _limited(y: Array) -> float:
    """Return the largest value if it occurs so often that it must be a limit; otherwise there is none."""
    top = float(y.max())
    alike = y[y >= top * (1 - 2e-6)]
    if alike.size < 2 or top <= 0:
        raise Inapplicable
    return float(np.median(alike))


def _limits(context: Context) -> Iterator[Fit]:
    """Derive a limit from the largest value."""
    top = _limited(_points(context)[1])
    words = f"limited to {number(top, 4)}"
    yield _fit(f"squared ReLU {words}", lambda x: np.minimum(relu(x) ** 2, top))
    yield _fit(f"ReLU {words}", lambda x: np.minimum(relu(x), top))
    yield _fit(f"the input {words}", lambda x: np.minimum(x, top))


def _lines(context: Context) -> Iterator[Fit]:
    """Estimate ``a · x + b``."""
    x, y = _points(context)
    a, b = np.polyfit(x, y, 1)
    if abs(a) <= 1e-6:
        return
    if abs(b) < 1e-6 * np.abs(y).max():
        yield _fit(f"{number(a, 4)}·x", lambda x: a * x)
    else:
        yield _fit(f"{number(a, 4)}·x {'+' if b > 0 else '-'} {number(abs(b), 4)}", lambda x: a * x + b)


def _thresholds(context: Context) -> Iterator[Fit]:
    """Estimate ``max(x - t, 0)²`` from the root of the recorded values."""
    x, y = _points(context)
    usable = y > 1e-6 * y.max()
    if usable.sum() < LEAST_POINTS or (y < 0).any():
        return
    t = float(np.median(x[usable] - np.sqrt(y[usable])))
    if abs(t) > 1e-4:
        words = f"squared ReLU of x {'-' if t > 0 else '+'} {number(abs(t), 4)}"
        yield _fit(words, lambda x: relu(x - t) ** 2)


def _swishes(context: Context) -> Iterator[Fit]:
    """Estimate ``x · sigmoid(β x)``."""
    x, y = _points(context)
    step = max(1, x.size // 4096)
    x, y = x[::step], y[::step]
    beta = log_minimum(lambda log_beta: float(np.linalg.norm(x * sigmoid(np.exp(log_beta) * x) - y)), 0.0, 4.0)
    yield _fit(f"x·sigmoid({number(beta, 3)}·x)", lambda x: x * sigmoid(beta * x), 1e-4)


def _product_limits(context: Context) -> Iterator[Fit]:
    """Derive limits of the product from its largest values of either sign."""
    y = np.abs(context.target)
    if np.isfinite(y).all():
        top = _limited(y)
        yield Fit(number(top, 4), lambda c: require(c, np.clip(c.expected, -top, top)))


FITTED = (
    *(
        fitted("{}", "{} instead of squared ReLU", fits, group="another activation", family=6, ops=ACT)
        for fits in (_powers, _leaks, _limits, _lines, _thresholds, _swishes)
    ),
    *(
        gated(f"{name} gate", f"{name} of ffn_gate times ffn_up", _of_gate(FUNCTIONS[name]))
        for name in ("GELU", "GELU (tanh)", "GELU (sigmoid)", "plain ReLU", "squared SiLU")
    ),
    fitted("product limited to ±{}", "the product is limited to ±{}", _product_limits, family=6, ops=OUT),
)
