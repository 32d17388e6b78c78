"""How a kind of operation rounds: its rule, and parts that several rules share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from crossval.audit.bounds.approx import Approx
from crossval.audit.bounds.arithmetic import SECOND_ORDER, TINY, Arithmetic, Array, Reading, U
from crossval.formats import F32, Format
from crossval.model.kinds import FloatArray, Kind

Arrays = Sequence[Array]
"""Inputs as the reading has them, float64."""
Approxes = Sequence[Approx]
Bound = Callable[[Any, Arrays, FloatArray, Sequence[Any], Arithmetic], FloatArray]
"""(kind, inputs, expected, weights, arithmetic) -> largest allowed ``|recorded - expected|``, elementwise."""


def unrounded(kind: Kind, n_inputs: int, a: Arithmetic, n_tokens: int, n_rows: int) -> tuple[Reading, ...]:
    """Return the only reading of a kind whose inputs no engine rounds first."""
    return (Reading("", (None,) * n_inputs),)


@dataclass(frozen=True)
class Rule:
    """How one kind of operation rounds."""

    bound: Bound
    propagate: Callable[[Any, Approxes, Sequence[Any], Arithmetic], Approx]
    """(kind, inputs, weights, arithmetic) -> the result in binary32 with its error, from inputs with errors."""
    readings: Callable[[Any, int, Arithmetic, int, int], tuple[Reading, ...]] = unrounded
    one_rounding: bool = False
    """Whether each value of the result is one rounding of the exact result of its inputs."""


def in_parts(
    single: Callable[[Any, Arrays, FloatArray, Arithmetic], FloatArray],
    low: Callable[[Any, Arrays, FloatArray, Arithmetic], FloatArray],
    of_inputs: Callable[[Any, Arrays, FloatArray, Format], FloatArray],
) -> Bound:
    """Return a bound made of three: in binary32, in a 16-bit format, and of inputs recorded with fewer digits.

    The first two take inputs to be what the engine had; ``of_inputs`` is what one rounding of every input to a
    format may change of the output, to first order.
    """

    def bound(kind: Kind, inputs: Arrays, expected: FloatArray, weights: Any, a: Arithmetic) -> FloatArray:
        allowed = (low if a.low else single)(kind, inputs, expected, a)
        if a.recorded is not F32:
            allowed = allowed + of_inputs(kind, inputs, expected, a.recorded) * SECOND_ORDER
        if a.lost is not F32:
            allowed = allowed + rounding(expected, a.lost) * SECOND_ORDER
        return allowed

    return bound


def rounding(array: Array, form: Format) -> FloatArray:
    """Return what one rounding to a format may change of an array."""
    changed: FloatArray = form.unit_roundoff * np.abs(array) + form.tiny
    return changed


def of_factors(kind: Kind, inputs: Arrays, expected: FloatArray, form: Format) -> FloatArray:
    """Return what one rounding of both factors of a product may change of it."""
    (x, y), (of_x, of_y) = inputs, (rounding(array, form) for array in inputs)
    return kind.compute(of_x, np.abs(y)) + kind.compute(np.abs(x), of_y)


def one_rounding(a: Arithmetic) -> tuple[float, float]:
    """Return what one rounding to the engine's format changes of a value that came through binary32.

    Returns:
        relative to the value, and added to that.
    """
    return a.format.unit_roundoff + 2 * U, a.format.tiny


def own_rounding(value: FloatArray, a: Arithmetic) -> FloatArray:
    """Return the rounding of an elementwise result; of three where the engine may work in other steps."""
    allowed: FloatArray = (1.0 if a.known else 3.0) * U * np.abs(value) + TINY
    return allowed
