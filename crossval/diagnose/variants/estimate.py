"""Mistakes with a parameter, which is estimated from the recorded values; then verified like any other.

An estimate is only a proposal. It has to explain every token as well as float32 arithmetic allows, which a wrong
formula cannot do by chance: there are always more recorded values than fitted ones. Fits are tried after the
mistakes without a parameter, so a factor of 2 keeps the name it has there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from crossval.diagnose.variants.context import Array, Context, Inapplicable
from crossval.diagnose.variants.distance import near_ties, per_token
from crossval.diagnose.variants.variant import Variant
from crossval.model.kinds import FloatArray, IntArray

STRICT = 1e-5
"""Relative L2 per token that a fitted output must reach: float32 arithmetic does, mere resemblance does not."""
ROUGHLY = 2e-3
"""The same before it is known which inputs an engine rounds to binary16."""
SAME = 1e-4
"""Two estimates nearer than this, relative, are the same number."""
CLOSE = 1e-3
"""Relative distance on a few values below which a fit is worth checking on all of them."""
MOST = 8
"""Number of fits of one kind that are checked on all tokens."""


@dataclass(frozen=True, eq=False)
class Fit:
    """A mistake with its parameter filled in; its string is its name."""

    name: str
    """What the variant's ``{}`` stands for: the parameter, or all of the name."""
    formula: Callable[[Context], Array]
    """Computes the wrong output of any pass."""
    sentence: str = ""
    group: str = ""

    def __format__(self, spec: str) -> str:
        return self.name


def fitted(name: str, explanation: str, fits: Callable[[Context], Iterator[Fit]], **more: Any) -> Variant:
    """Return a variant whose parameter is fitted; ``more``: other fields of ``Variant``."""
    return Variant(name, explanation, lambda context, fit: fit.formula(context), fits, **more)


# --- numbers --------------------------------------------------------------------------------------------------


def number(x: float, digits: int = 5) -> str:
    """Return a fitted number as it is printed in a name: the same in every pass of an engine."""
    text = f"{x:.{digits}g}"
    return "0" if float(text) == 0 else text


def close(x: float, values: Iterable[float], rel: float = SAME) -> bool:
    """Return whether a number is one of those that have their own names."""
    return any(abs(x - value) <= rel * max(abs(x), abs(value)) for value in values)


def snapped(value: float, near: float = 2e-4) -> float:
    """Return the integer, simple fraction or two-place decimal that a fitted number stands for, or six digits."""
    for denominator in (1, 2, 3, 4, 100):
        whole = round(value * denominator) / denominator
        if abs(value - whole) <= near * max(1.0, abs(value)):
            return whole
    return float(f"{value:.6g}")


def factor(target: Array, right: Array) -> float:
    """Return the least-squares factor from ``right`` to ``target``.

    Raises:
        Inapplicable: there is none, or a value is not finite.
    """
    with np.errstate(all="ignore"):
        c = float(np.vdot(right, target) / np.vdot(right, right))
    if not np.isfinite(c):
        raise Inapplicable
    return c


def log_minimum(distance: Callable[[float], float], middle: float, reach: float) -> float:
    """Return the number whose logarithm, within ``middle`` ± ``reach``, minimises a distance of the logarithm.

    The best of a grid of quarters is refined by golden-section search.
    """
    tried = np.linspace(middle - reach, middle + reach, int(8 * reach) + 1)
    best = float(tried[np.argmin([distance(x) for x in tried])])
    ratio = (np.sqrt(5.0) - 1.0) / 2.0
    a, b = best - 0.25, best + 0.25
    c, d = b - ratio * (b - a), a + ratio * (b - a)
    at_c, at_d = distance(c), distance(d)
    for _ in range(80):
        if at_c < at_d:
            b, d, at_d = d, c, at_c
            c = b - ratio * (b - a)
            at_c = distance(c)
        else:
            a, c, at_c = c, d, at_d
            d = a + ratio * (b - a)
            at_d = distance(d)
    return float(np.exp((a + b) / 2.0))


# --- rows looked up -------------------------------------------------------------------------------------------


def require(context: Context, output: Array, limit: float = STRICT) -> Array:
    """Return an output that fits the recorded one in every token.

    Raises:
        Inapplicable: it does not.
    """
    if not (per_token(context, output) <= limit).all():
        raise Inapplicable
    return output


def is_off(target: Array, right: Array, limit: float = STRICT) -> Array:
    """Return which rows of ``(rows, values)`` differ by more than rounding."""
    with np.errstate(all="ignore"):
        off = np.linalg.norm(target - right, axis=-1)
        size = np.maximum(np.linalg.norm(target, axis=-1), np.linalg.norm(right, axis=-1))
        return ~(off <= limit * size)


def sources(target: Array, pool: Array, limit: float = STRICT) -> Array:
    """Return for each row of ``target`` the equal row of ``pool``; -1: none.

    Both ``(rows, values)``. Rows of zeros equal nothing.
    """
    size_t, size_p = np.einsum("ij,ij->i", target, target), np.einsum("ij,ij->i", pool, pool)
    with np.errstate(all="ignore"):
        distance = size_t[:, None] + size_p[None] - 2.0 * target @ pool.T
    distance = np.where(np.isfinite(distance), distance, np.inf)
    best = distance.argmin(axis=1)
    wrong = is_off(target, pool[best], limit) | (size_t == 0)
    return np.where(wrong, -1, best)


# --- matrix products ------------------------------------------------------------------------------------------


def recorded_sums(context: Context, scale: Array | float) -> FloatArray:
    """Return the sums over the inputs that the recorded output corresponds to: ``(n_rows, features)``.

    Raises:
        Inapplicable: some values are not finite, or all are zero.
    """
    target = context.target if context.bias is None else context.target - context.bias
    if not np.isfinite(target).all() or not target.any():
        raise Inapplicable
    return target * scale / context.matrix.scale


def settled(context: Context) -> Context:
    """Return a product without the tokens whose codes depend on how an engine rounds, if others are left."""
    near = near_ties(context.inputs[0])
    return context.of_tokens(~near) if near.any() and not near.all() else context


def probe(context: Context, n_features: int) -> IntArray:
    """Return some of the sampled output features, spread evenly."""
    have = context.looked_at
    return have[np.unique(np.linspace(0, have.size - 1, n_features).astype(np.int64))]


def distance(recorded: Array, computed: Array) -> float:
    """Return the relative L2 distance of two arrays."""
    size = float(np.linalg.norm(recorded))
    return float(np.linalg.norm(recorded - computed)) / size if size else np.inf
