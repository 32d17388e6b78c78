"""Gate, activation and product of the feed-forward network done wrong (family 6)."""

# mypy: disable-error-code="no-any-return"
from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from crossval.diagnose.variants.context import Array, Context
from crossval.diagnose.variants.variant import Variant, on
from crossval.model.kinds import squared_relu

ACT = on("ffn_act")
OUT = on("ffn_out")


def sigmoid(x: Array) -> Array:
    """Return ``1 / (1 + exp(-x))``."""
    with np.errstate(over="ignore"):
        y: Array = 1.0 / (1.0 + np.exp(-x))
    return y


def silu(x: Array) -> Array:
    """Return ``x * sigmoid(x)``."""
    return x * sigmoid(x)


def gelu(x: Array) -> Array:
    """Return ``x * Phi(x)`` with the exact normal distribution function."""
    erf = np.vectorize(math.erf, otypes=[np.float64])
    return x * 0.5 * (1.0 + erf(x / math.sqrt(2.0)))


def gelu_tanh(x: Array) -> Array:
    """Return the tanh approximation of GELU."""
    y: Array = 0.5 * x * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))
    return y


def _activation(name: str, function: Callable[[Array], Array]) -> Variant:
    return Variant(name, 6, ACT, f"{name} instead of squared ReLU", lambda c: function(c.inputs[0]))


def _up(context: Context) -> Array:
    return context.tap(context.name("ffn_up"))


def _gate(context: Context) -> Array:
    return context.tap(context.name("ffn_gate"))


_ACT = (
    _activation("SiLU", silu),
    _activation("GELU", gelu),
    _activation("GELU (tanh)", gelu_tanh),
    _activation("GELU (sigmoid)", lambda x: x * sigmoid(1.702 * x)),
    _activation("plain ReLU", lambda x: np.maximum(x, 0.0)),
    _activation("no activation", lambda x: x.copy()),
    _activation("square without ReLU", lambda x: x * x),
    _activation("signed square", lambda x: x * np.abs(x)),
    _activation("cubed ReLU", lambda x: np.maximum(x, 0.0) ** 3),
    _activation("squared SiLU", lambda x: silu(x) ** 2),
    _activation("sigmoid", sigmoid),
    _activation("tanh", np.tanh),
    _activation("softplus", lambda x: np.logaddexp(0.0, x)),
    Variant(
        "activation on up",
        6,
        ACT,
        "squared ReLU of ffn_up instead of ffn_gate (gate and up swapped)",
        lambda c: squared_relu(_up(c)),
    ),
    Variant("SiLU on up", 6, ACT, "SiLU of ffn_up instead of squared ReLU of ffn_gate", lambda c: silu(_up(c))),
    Variant(
        "already multiplied by up",
        6,
        ACT,
        "the tap holds the gated product, not the activation",
        lambda c: squared_relu(c.inputs[0]) * _up(c),
    ),
)

_OUT = (
    Variant("up ignored", 6, OUT, "the activation alone, not multiplied by ffn_up", lambda c: c.inputs[0].copy()),
    Variant("activation ignored", 6, OUT, "ffn_up alone, not gated", lambda c: c.inputs[1].copy()),
    Variant(
        "sum instead of product",
        6,
        OUT,
        "activation plus ffn_up instead of times",
        lambda c: c.inputs[0] + c.inputs[1],
    ),
    Variant(
        "multiplied by gate",
        6,
        OUT,
        "the activation is multiplied by ffn_gate instead of ffn_up",
        lambda c: c.inputs[0] * _gate(c),
    ),
    Variant("gate without activation", 6, OUT, "ffn_gate itself times ffn_up", lambda c: _gate(c) * c.inputs[1]),
    Variant(
        "activation on up",
        6,
        OUT,
        "squared ReLU of ffn_up times ffn_gate (gate and up swapped)",
        lambda c: squared_relu(c.inputs[1]) * _gate(c),
    ),
    Variant("SiLU gate", 6, OUT, "SiLU of ffn_gate times ffn_up", lambda c: silu(_gate(c)) * c.inputs[1]),
    Variant(
        "SiLU of the activation",
        6,
        OUT,
        "SiLU applied once more to the activation",
        lambda c: silu(c.inputs[0]) * c.inputs[1],
    ),
    Variant(
        "squared ReLU applied twice",
        6,
        OUT,
        "squared ReLU applied once more to the activation",
        lambda c: squared_relu(c.inputs[0]) * c.inputs[1],
    ),
    Variant(
        "activation on both",
        6,
        OUT,
        "ffn_up goes through squared ReLU too",
        lambda c: c.inputs[0] * squared_relu(c.inputs[1]),
    ),
    Variant("activation squared", 6, OUT, "the activation times itself", lambda c: c.inputs[0] ** 2),
)

VARIANTS = (*_ACT, *_OUT)
