"""Rounding of activations, products and sums of two tensors."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np

from crossval.audit.bounds.approx import Approx
from crossval.audit.bounds.arithmetic import SECOND_ORDER, TINY, Arithmetic, Array, U
from crossval.audit.bounds.rule import K, PartsRule, one_rounding, own_rounding, rounded
from crossval.formats import Format
from crossval.model.kinds import Add, FloatArray, Multiply, Silu, SquaredRelu, sigmoid


class OneRounding(PartsRule[K]):
    """A kind whose result is one rounding of the exact result of its inputs."""

    def single(self, kind: K, inputs: Sequence[Array], expected: FloatArray, a: Arithmetic) -> FloatArray:
        """One rounding; an engine that carries more digits than it recorded has rounded inputs, too."""
        size = np.abs(expected)
        if not a.known:
            size = size + self._of_inputs(inputs, size)
        return U * SECOND_ORDER * size + TINY

    def low(self, kind: K, inputs: Sequence[Array], expected: FloatArray, a: Arithmetic) -> FloatArray:
        """One rounding to the format."""
        steps, fixed = one_rounding(a)
        return steps * np.abs(expected) + fixed

    @abstractmethod
    def _of_inputs(self, inputs: Sequence[Array], size: FloatArray) -> FloatArray:
        """Return what the rounding of the inputs changes of a result of some size, in units of ``U``."""


class SquaredReluRule(OneRounding[SquaredRelu]):
    """``max(gate, 0)^2``."""

    def _of_inputs(self, inputs: Sequence[Array], size: FloatArray) -> FloatArray:
        return 2 * size

    def input_error(
        self, kind: SquaredRelu, inputs: Sequence[Array], expected: FloatArray, form: Format
    ) -> FloatArray:
        """Twice the value, and the square of the error."""
        error = rounded(inputs[0], form)
        changed: FloatArray = 2 * np.maximum(inputs[0], 0) * error + error**2
        return changed

    def propagate(
        self, kind: SquaredRelu, inputs: Sequence[Approx], weights: Sequence[Any], a: Arithmetic
    ) -> Approx:
        """Twice the value, and the square of the error."""
        x = inputs[0]
        value = kind.compute(x.value)
        noise, jump = ((2 * np.maximum(x.value, 0.0) + e) * e for e in (x.noise, x.jump))
        return Approx(value, noise + own_rounding(value, a), jump, 2 * x.shared)


class SiluRule(PartsRule[Silu]):
    """``gate / (1 + exp(-gate))``.

    The exponential is within four roundings, which the sum with 1 makes no larger; then the sum and the quotient,
    or a reciprocal and a product. Where ``exp(-gate)`` overflows the result is lost: less than 2^-120.
    """

    def single(self, kind: Silu, inputs: Sequence[Array], expected: FloatArray, a: Arithmetic) -> FloatArray:
        """Seven roundings; an engine that carries more digits than it recorded has a rounded gate, too."""
        allowed = 7 * U * np.abs(expected)
        if not a.known:
            allowed = allowed + U * (np.abs(expected) + _slope(inputs[0]) * np.abs(inputs[0]))
        return allowed * SECOND_ORDER + 2.0**-120

    def low(self, kind: Silu, inputs: Sequence[Array], expected: FloatArray, a: Arithmetic) -> FloatArray:
        """The exponential, the sum, the reciprocal and the product are rounded to the format."""
        # a sum that overflows or a reciprocal that underflows costs ``tiny`` of it, times the gate
        lost = a.format.tiny * (2 + np.abs(inputs[0])) + np.abs(inputs[0]) / a.format.largest
        allowed: FloatArray = (4 * a.format.unit_roundoff + 7 * U) * SECOND_ORDER * np.abs(expected) + lost
        return allowed

    def input_error(self, kind: Silu, inputs: Sequence[Array], expected: FloatArray, form: Format) -> FloatArray:
        """The slope, and half of the largest curvature, 1/2, times the square of the error."""
        return _moved(inputs[0], rounded(inputs[0], form))

    def propagate(self, kind: Silu, inputs: Sequence[Approx], weights: Sequence[Any], a: Arithmetic) -> Approx:
        """A shared factor of the gate is none of the result: it becomes a jump."""
        x = inputs[0]
        value = kind.compute(x.value)
        own = (7 if a.known else 8) * U * np.abs(value) + 2.0**-120
        jump = _moved(x.value, x.jump + x.common)
        return Approx(value, _moved(x.value, x.noise) + own, jump, np.zeros(value.shape[:1]))


def _slope(x: FloatArray) -> FloatArray:
    """Return the magnitude of SiLU's derivative."""
    share = sigmoid(x)
    return np.abs(share * (1 + x * (1 - share)))


def _moved(x: FloatArray, error: FloatArray) -> FloatArray:
    """Return how far SiLU moves when its argument does: its curvature is at most 1/2."""
    return (_slope(x) + error / 4) * error


class MultiplyRule(OneRounding[Multiply]):
    """A product."""

    def _of_inputs(self, inputs: Sequence[Array], size: FloatArray) -> FloatArray:
        return 2 * size

    def input_error(
        self, kind: Multiply, inputs: Sequence[Array], expected: FloatArray, form: Format
    ) -> FloatArray:
        """One factor's error times the other."""
        (x, y), (of_x, of_y) = inputs, (rounded(array, form) for array in inputs)
        changed: FloatArray = of_x * np.abs(y) + np.abs(x) * of_y
        return changed

    def propagate(self, kind: Multiply, inputs: Sequence[Approx], weights: Sequence[Any], a: Arithmetic) -> Approx:
        """Errors times the other factor; relative errors of a token add up."""
        x, y = inputs
        value = kind.compute(x.value, y.value)
        noise = np.abs(x.value) * y.noise + np.abs(y.value) * x.noise + x.noise * y.noise
        jump = np.abs(x.value) * y.jump + np.abs(y.value) * x.jump + x.jump * y.jump
        return Approx(value, noise + own_rounding(value, a), jump, x.shared + y.shared)


class AddRule(OneRounding[Add]):
    """A sum."""

    def _of_inputs(self, inputs: Sequence[Array], size: FloatArray) -> FloatArray:
        terms: FloatArray = np.abs(inputs[0]) + np.abs(inputs[1])
        return terms

    def input_error(self, kind: Add, inputs: Sequence[Array], expected: FloatArray, form: Format) -> FloatArray:
        """Both."""
        return rounded(inputs[0], form) + rounded(inputs[1], form)

    def propagate(self, kind: Add, inputs: Sequence[Approx], weights: Sequence[Any], a: Arithmetic) -> Approx:
        """Errors add up; what the values of one term share is nothing that the sum shares."""
        x, y = inputs
        value = kind.compute(x.value, y.value)
        noise = x.noise + y.noise + own_rounding(value, a)
        return Approx(value, noise, x.jump + x.common + y.jump + y.common, np.zeros(value.shape[:1]))
