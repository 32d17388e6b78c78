"""Is the scale of a ternary matrix right? If not: inverted, 1, rounded, or another matrix's.

An absmean scale is a mean of absolute values in float32. Its last bits depend on the order of the
sum: added up in a tree, as PyTorch and NumPy do, ``n`` values are off by at most ``log2(n)``
roundings of 2**-24, and two divisions and the mean add less than four more. Scales within that are
equal. A scale rounded to the type of the checkpoint's own weights is right as well, because
transformers rounds it so; the same rounding where nothing called for it is named.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from crossval.formats import BF16, F16

MAX_CHANCE = 1e-3
"""A scale is called another matrix's only when it would be one of them by chance less often than this."""
_FORMATS = {"bfloat16": BF16, "float16": F16}
_HALF_TYPES = ("F16", "TQ1_0", "TQ2_0")


@dataclass(frozen=True)
class Scale:
    """A scale in a file, and the one it should be."""

    value: float
    expected: float
    n_values: int
    """Weights of the matrix."""
    dtype: str
    """Of the weights in the checkpoint; ``uint8``: packed, with a scale of its own."""
    type: str
    """Of the tensor in the file."""
    largest: float | None = None
    """Float weights: the largest absolute one."""

    @property
    def tolerance(self) -> float:
        """Return the relative distance that the order of the summation explains."""
        return summation_error(self.n_values)


def summation_error(n_values: int) -> float:
    """Return the relative error bound of a mean of that many absolute values, summed in a tree in float32."""
    return (math.log2(max(n_values, 2)) + 4) * 2.0**-24


def explain(scale: Scale, others: Mapping[str, float]) -> list[str] | None:
    """Return None for a right scale, else every known cause that gives it: exactly one is a name.

    ``others``: expected scales of the other matrices, by name.
    """
    if _close(scale.value, scale.expected, scale.tolerance) or _accepted(scale):
        return None
    found = [name for name, gives in _CAUSES.items() if gives(scale)]
    if set(found) == set(_ROUNDED):
        found = ["rounded to 16 bits"]  # the same value in both formats
    return [*found, *(f"of {name}" for name in _holders(scale, others))]


def _close(value: float, expected: float, tolerance: float) -> bool:
    return math.isfinite(value) and abs(value - expected) <= tolerance * abs(expected)


def _rounds_to(value: float, exact: float, tolerance: float, dtype: str) -> bool:
    """Return whether a value is the rounding to a 16-bit type of a number this close to ``exact``."""
    near = np.array([exact * (1 - tolerance), exact, exact * (1 + tolerance)])
    return bool((_FORMATS[dtype].round(near) == value).any())


def _accepted(scale: Scale) -> bool:
    """Return whether the scale is rounded as the checkpoint's weights or the file's type are."""
    allowed = {scale.dtype} & set(_FORMATS) | ({"float16"} if scale.type in _HALF_TYPES else set())
    return any(_rounds_to(scale.value, scale.expected, scale.tolerance, one) for one in allowed)


def _inverted(scale: Scale) -> bool:
    exact = 1 / scale.expected
    return _close(scale.value, exact, scale.tolerance) or any(
        _rounds_to(scale.value, exact, scale.tolerance, one) for one in _FORMATS
    )


_ROUNDED = ("rounded to bfloat16", "rounded to float16")
_CAUSES: Mapping[str, Callable[[Scale], bool]] = {
    "one": lambda scale: scale.value == 1.0,
    "inverted": _inverted,
    "largest weight": lambda scale: scale.largest is not None and scale.value == float(np.float32(scale.largest)),
    "squared": lambda scale: _close(scale.value, scale.expected**2, 2 * scale.tolerance),
    "negative": lambda scale: _close(-scale.value, scale.expected, scale.tolerance),
    _ROUNDED[0]: lambda scale: _rounds_to(scale.value, scale.expected, scale.tolerance, "bfloat16"),
    _ROUNDED[1]: lambda scale: _rounds_to(scale.value, scale.expected, scale.tolerance, "float16"),
}


def _holders(scale: Scale, others: Mapping[str, float]) -> Iterator[str]:
    """Yield the matrices whose scale this is, unless that may be chance.

    The scales of a model lie within a small range; of ``k`` of them a wrong value, anywhere in it,
    hits one with about ``k * width / range``, where the width is the tolerance, or the spacing of a
    16-bit format that holds the value.
    """
    if not others or not scale.value > 0:
        return
    distinct = sorted(set(others.values()))
    spread = max(math.log(distinct[-1] / distinct[0]), math.log(2)) if distinct[0] > 0 else math.log(2)
    coarse = [
        2 * one.unit_roundoff
        for one in _FORMATS.values()
        if float(one.round(np.array([scale.value]))[0]) == scale.value
    ]
    width = max([2 * scale.tolerance, *coarse])
    if len(distinct) * width / spread > MAX_CHANCE:
        return
    yield from (name for name, value in others.items() if _close(scale.value, value, scale.tolerance))
