"""Rounding of rotary position embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from crossval.audit.bounds.approx import Approx
from crossval.audit.bounds.arithmetic import SECOND_ORDER, TINY, Arithmetic, Array, U
from crossval.audit.bounds.rule import PartsRule, rounded
from crossval.formats import Format
from crossval.model.kinds import FloatArray, IntArray, Rope, join_pairs, split_pairs


class RopeRule(PartsRule[Rope]):
    """A rotation of every pair by position times frequency."""

    def single(self, kind: Rope, inputs: Sequence[Array], expected: FloatArray, a: Arithmetic) -> FloatArray:
        """The angle's error times the length of the pair; then cos or sin, two products, one addition."""
        x, positions = inputs
        first, second = split_pairs(np.abs(x), kind.pairs)
        allowed: FloatArray = (first + second) * (_angle(kind, x, positions) * _angle_steps(x) * U + 4 * U)
        return join_pairs(allowed, allowed, kind.pairs) * SECOND_ORDER + TINY

    def low(self, kind: Rope, inputs: Sequence[Array], expected: FloatArray, a: Arithmetic) -> FloatArray:
        """Angles are carried in binary32; cos and sin, both products and their sum are rounded."""
        x, positions = inputs
        u, tiny = a.format.unit_roundoff, a.format.tiny
        angle = _angle(kind, x, positions)
        first, second = split_pairs(np.abs(x), kind.pairs)
        either = (first + second) * angle * _angle_steps(x) * U + (first + second + 3) * tiny
        products = _turned(first, second, angle, kind)
        allowed: FloatArray = (2 * u * products + u * np.abs(expected)) * SECOND_ORDER
        return allowed + join_pairs(either, either, kind.pairs)

    def input_error(self, kind: Rope, inputs: Sequence[Array], expected: FloatArray, form: Format) -> FloatArray:
        """Both elements of the pair, whatever the angle."""
        first, second = split_pairs(rounded(inputs[0], form), kind.pairs)
        return join_pairs(first + second, first + second, kind.pairs)

    def propagate(self, kind: Rope, inputs: Sequence[Approx], weights: Sequence[Any], a: Arithmetic) -> Approx:
        """Errors turn with the pairs."""
        x, positions = inputs
        value = kind.compute(x.value, positions.value)
        angle = _angle(kind, x.value, positions.value)
        noise, jump = (_turned(*split_pairs(e, kind.pairs), angle, kind) for e in (x.noise, x.jump))
        own = self.bound(kind, [x.value, positions.value], value, (), a)
        return Approx(value, noise + own, jump, x.shared)


def _angle(kind: Rope, x: Array, positions: IntArray) -> FloatArray:
    """Return the angle of every pair, ``(n_tokens, 1, head_dim/2)``."""
    half = x.shape[-1] // 2
    angle: FloatArray = positions[:, None, None] * kind.base ** (-np.arange(half) / half)
    return angle


def _angle_steps(x: Array) -> Array:
    """Return the roundings of the angle of every pair.

    bitnet.cpp multiplies the angle up in binary32, one frequency after the other: three roundings a step (the
    ratio, twice, and the product); an engine with a table of frequencies has fewer.
    """
    steps: Array = 3 * np.arange(x.shape[-1] // 2) + 4
    return steps


def _turned(first: FloatArray, second: FloatArray, angle: FloatArray, kind: Rope) -> FloatArray:
    """Return magnitudes turned by an angle, all signs being bad."""
    cos, sin = np.abs(np.cos(angle)), np.abs(np.sin(angle))
    return join_pairs(first * cos + second * sin, first * sin + second * cos, kind.pairs)
