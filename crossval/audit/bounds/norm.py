"""Rounding of RMS norms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from crossval.audit.bounds.approx import ONE_SIGN, Approx
from crossval.audit.bounds.arithmetic import SECOND_ORDER, TINY, Arithmetic, Array, U
from crossval.audit.bounds.rule import PartsRule, rounded
from crossval.formats import Format
from crossval.model.kinds import FloatArray, RmsNorm


class NormRule(PartsRule[RmsNorm]):
    """``x / sqrt(mean(x^2) + eps) * weight``."""

    def single(self, kind: RmsNorm, inputs: Sequence[Array], expected: FloatArray, a: Arithmetic) -> FloatArray:
        """Half of: square, their sum, mean, + eps; then sqrt, reciprocal, product, product with the weight."""
        steps = 7.0 + (0.0 if a.known else inputs[0].shape[-1] / 2)  # known: the sum is in binary64
        return steps * U * SECOND_ORDER * np.abs(expected) + TINY

    def low(self, kind: RmsNorm, inputs: Sequence[Array], expected: FloatArray, a: Arithmetic) -> FloatArray:
        """Every step in the format, the sum in binary32."""
        x, size = inputs[0], np.abs(expected)
        u, tiny = a.format.unit_roundoff, a.format.tiny
        square = np.mean(x * x, axis=-1, keepdims=True) + kind.eps
        # half of: squares, mean, eps, its sum with the mean; then root, quotient, weight, product with the weight
        steps = 6.0 * u + x.shape[-1] / 2 * U
        # the same four, where they are subnormal, change the root by half of what they are off by
        steps = steps + 2 * tiny / square
        # a quotient below the normal numbers loses up to ``tiny``, times the weight
        with np.errstate(divide="ignore", invalid="ignore"):
            weight = np.nan_to_num(size * np.sqrt(square) / np.abs(x), posinf=0.0)
        allowed: FloatArray = steps * SECOND_ORDER * size + (1 + weight) * tiny
        return allowed

    def input_error(
        self, kind: RmsNorm, inputs: Sequence[Array], expected: FloatArray, form: Format
    ) -> FloatArray:
        """Its input, and the root of the mean of their squares."""
        size = np.abs(expected)
        with np.errstate(divide="ignore", invalid="ignore"):
            weight = np.nan_to_num(size / np.abs(inputs[0]), posinf=0.0)
        changed: FloatArray = weight * rounded(inputs[0], form) + form.unit_roundoff * size
        return changed

    def propagate(self, kind: RmsNorm, inputs: Sequence[Approx], weights: Sequence[Any], a: Arithmetic) -> Approx:
        """The root is one factor of all values of a token: its error is shared."""
        x, weight = inputs[0], np.asarray(weights[0], np.float64)
        n = x.value.shape[-1]
        value = kind.compute(x.value, weight)
        square = np.mean(x.value * x.value, axis=-1) + kind.eps
        of_square = np.sqrt(np.sum((x.value * x.noise) ** 2, axis=-1)) / n
        of_square += np.mean(np.abs(x.value) * x.jump + x.error**2, axis=-1)
        rounding = (4.0 + (0.0 if a.known else ONE_SIGN / 2 * math.sqrt(n))) * U
        shared = x.shared * kind.eps / square + of_square / square + rounding
        gain = np.abs(weight) / np.sqrt(square)[..., None]
        return Approx(value, x.noise * gain + 3 * U * np.abs(value) + TINY, x.jump * gain, shared)
