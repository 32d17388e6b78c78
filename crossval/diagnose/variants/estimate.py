"""Mistakes with a parameter: it is estimated from what was recorded, the mistake then verified like any other.

An estimate is only a proposal. It has to explain every token as well as float32 arithmetic allows, which a wrong
formula cannot do by chance: there are always more recorded values than fitted ones. Fits are tried after the
mistakes without a parameter, so a factor of 2 keeps the name it has there.
"""

# mypy: disable-error-code="no-any-return"
from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from crossval.diagnose.variants.context import Array, Context, Inapplicable
from crossval.diagnose.variants.distance import per_token

STRICT = 1e-5
"""Relative L2 per token that a fitted output must reach: float32 arithmetic does, a mere resemblance not."""
CLOSE = 1e-4
"""Two estimates nearer than this, relative, are the same number."""
DIGITS = 5


@dataclass(frozen=True, eq=False)
class Estimate:
    """An estimated parameter: how it is printed, and its value."""

    label: str
    value: Any

    def __format__(self, spec: str) -> str:
        return self.label


def number(x: float, digits: int = DIGITS) -> str:
    """Return a fitted number as a name prints it: the same in every pass of an engine."""
    text = f"{x:.{digits}g}"
    return "0" if float(text) == 0 else text


def close(x: float, values: Iterable[float], rel: float = CLOSE) -> bool:
    """Return whether a number is one of those with names of their own."""
    return any(abs(x - value) <= rel * max(abs(x), abs(value)) for value in values)


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


def require(context: Context, output: Array, limit: float = STRICT) -> Array:
    """Return an output that fits what was recorded in every token.

    Raises:
        Inapplicable: it does not.
    """
    if not (per_token(context, output) <= limit).all():
        raise Inapplicable
    return output


def listed(values: Sequence[int] | Array) -> str:
    """Return ``(0, 1, 0, 1)``."""
    return f"({', '.join(str(int(v)) for v in values)})"


def is_off(target: Array, right: Array, limit: float = STRICT) -> Array:
    """Return which rows, ``(rows, values)``, are farther apart than rounding."""
    with np.errstate(all="ignore"):
        off = np.linalg.norm(target - right, axis=-1)
        size = np.maximum(np.linalg.norm(target, axis=-1), np.linalg.norm(right, axis=-1))
        return ~(off <= limit * size)


def sources(target: Array, pool: Array, limit: float = STRICT) -> Array:
    """Return for each row of ``target`` the row of ``pool`` that it equals; -1: none.

    Both ``(rows, values)``. Rows of zeros equal nothing.
    """
    size_t, size_p = np.einsum("ij,ij->i", target, target), np.einsum("ij,ij->i", pool, pool)
    with np.errstate(all="ignore"):
        distance = size_t[:, None] + size_p[None] - 2.0 * target @ pool.T
    distance = np.where(np.isfinite(distance), distance, np.inf)
    best = distance.argmin(axis=1)
    wrong = is_off(target, pool[best], limit) | (size_t == 0)
    return np.where(wrong, -1, best)


def golden(function: Callable[[float], float], low: float, high: float, steps: int = 80) -> float:
    """Return where a function of one minimum has it, by golden-section search."""
    ratio = (np.sqrt(5.0) - 1.0) / 2.0
    a, b = low, high
    c, d = b - ratio * (b - a), a + ratio * (b - a)
    fc, fd = function(c), function(d)
    for _ in range(steps):
        if fc < fd:
            b, d, fd = d, c, fc
            c = b - ratio * (b - a)
            fc = function(c)
        else:
            a, c, fc = c, d, fd
            d = a + ratio * (b - a)
            fd = function(d)
    return (a + b) / 2.0
