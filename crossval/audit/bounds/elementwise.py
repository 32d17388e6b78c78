"""Rounding of activations, products and sums of two tensors, norms and rotations."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from crossval.audit.bounds.approx import ONE_SIGN, Approx
from crossval.audit.bounds.arithmetic import SECOND_ORDER, TINY, Arithmetic, Array, U
from crossval.audit.bounds.rule import (
    Approxes,
    Arrays,
    Rule,
    in_parts,
    of_factors,
    one_rounding,
    own_rounding,
    rounding,
)
from crossval.formats import Format
from crossval.model.kinds import (
    Add,
    FloatArray,
    IntArray,
    Kind,
    Multiply,
    RmsNorm,
    Rope,
    Silu,
    SquaredRelu,
    join_pairs,
    rope_frequencies,
    sigmoid,
    split_pairs,
)

# --- one rounding ---------------------------------------------------------------------------------------------


def _rounded_once(
    of_inputs: Callable[[Arrays, FloatArray], FloatArray],
) -> Callable[[Kind, Arrays, FloatArray, Arithmetic], FloatArray]:
    """Return the bound in binary32 of a result that is one rounding of the exact one.

    An engine that carries more digits than it recorded has rounded inputs, too: ``of_inputs`` of these and of the
    result's size, in units of ``U``.
    """

    def single(kind: Kind, inputs: Arrays, expected: FloatArray, a: Arithmetic) -> FloatArray:
        size = np.abs(expected)
        if not a.known:
            size = size + of_inputs(inputs, size)
        return U * SECOND_ORDER * size + TINY

    return single


def _low_rounded_once(kind: Kind, inputs: Arrays, expected: FloatArray, a: Arithmetic) -> FloatArray:
    steps, fixed = one_rounding(a)
    return steps * np.abs(expected) + fixed


def _square_inputs(kind: SquaredRelu, inputs: Arrays, expected: FloatArray, form: Format) -> FloatArray:
    error = rounding(inputs[0], form)
    changed: FloatArray = 2 * np.maximum(inputs[0], 0) * error + error**2
    return changed


def _carry_square(kind: SquaredRelu, inputs: Approxes, weights: Sequence[Any], a: Arithmetic) -> Approx:
    x = inputs[0]
    value = kind.compute(x.value)
    noise, jump = ((2 * np.maximum(x.value, 0.0) + e) * e for e in (x.noise, x.jump))
    return Approx(value, noise + own_rounding(value, a), jump, 2 * x.shared)


def _carry_multiply(kind: Multiply, inputs: Approxes, weights: Sequence[Any], a: Arithmetic) -> Approx:
    x, y = inputs
    value = kind.compute(x.value, y.value)
    noise = np.abs(x.value) * y.noise + np.abs(y.value) * x.noise + x.noise * y.noise
    jump = np.abs(x.value) * y.jump + np.abs(y.value) * x.jump + x.jump * y.jump
    return Approx(value, noise + own_rounding(value, a), jump, x.shared + y.shared)


def _add_inputs(kind: Add, inputs: Arrays, expected: FloatArray, form: Format) -> FloatArray:
    return rounding(inputs[0], form) + rounding(inputs[1], form)


def _carry_add(kind: Add, inputs: Approxes, weights: Sequence[Any], a: Arithmetic) -> Approx:
    x, y = inputs
    value = kind.compute(x.value, y.value)
    noise = x.noise + y.noise + own_rounding(value, a)
    # what the values of one term have in common is nothing that the sum has in common
    return Approx(value, noise, x.jump + x.common + y.jump + y.common, np.zeros(value.shape[:1]))


# --- SiLU -----------------------------------------------------------------------------------------------------

LOST = 2.0**-120
"""A result of SiLU that is lost where ``exp(-gate)`` overflows binary32 is smaller."""


def _silu(kind: Silu, inputs: Arrays, expected: FloatArray, a: Arithmetic) -> FloatArray:
    # the exponential within four roundings, which the sum with 1 makes no larger; sum, reciprocal, product
    steps = 7 * np.abs(expected)
    if not a.known:  # a rounded gate, and the rounding of the record
        steps = steps + np.abs(expected) + _silu_slope(inputs[0]) * np.abs(inputs[0])
    return steps * U * SECOND_ORDER + LOST


def _low_silu(kind: Silu, inputs: Arrays, expected: FloatArray, a: Arithmetic) -> FloatArray:
    form, gate = a.format, np.abs(inputs[0])
    # exponential, sum, reciprocal and product; a reciprocal that underflows, a sum that overflows
    lost = form.tiny * (2 + gate) + gate / form.largest
    return (4 * form.unit_roundoff + 7 * U) * SECOND_ORDER * np.abs(expected) + lost


def _silu_inputs(kind: Silu, inputs: Arrays, expected: FloatArray, form: Format) -> FloatArray:
    return _silu_moved(inputs[0], rounding(inputs[0], form))


def _carry_silu(kind: Silu, inputs: Approxes, weights: Sequence[Any], a: Arithmetic) -> Approx:
    x = inputs[0]
    value = kind.compute(x.value)
    noise = _silu_moved(x.value, x.noise) + (7 if a.known else 8) * U * np.abs(value) + LOST
    # a factor that the gates of a token share is not one that the results share: they move together
    return Approx(value, noise, _silu_moved(x.value, x.jump + x.common), np.zeros(value.shape[:1]))


def _silu_slope(x: FloatArray) -> FloatArray:
    gain = sigmoid(x)
    return np.abs(gain * (1 + x * (1 - gain)))


def _silu_moved(x: FloatArray, error: FloatArray) -> FloatArray:
    """Return how far SiLU moves when its argument does; its second derivative is at most 1/2."""
    return (_silu_slope(x) + error / 4) * error


# --- RMS norm -------------------------------------------------------------------------------------------------


def _norm(kind: RmsNorm, inputs: Arrays, expected: FloatArray, a: Arithmetic) -> FloatArray:
    # half of: square, their sum, mean, + eps; then sqrt, reciprocal, product, product with the weight
    steps = 7.0 + (0.0 if a.known else inputs[0].shape[-1] / 2)  # known: the sum is in binary64
    return steps * U * SECOND_ORDER * np.abs(expected) + TINY


def _low_norm(kind: RmsNorm, inputs: Arrays, expected: FloatArray, a: Arithmetic) -> FloatArray:
    x, size = inputs[0], np.abs(expected)
    u, tiny = a.format.unit_roundoff, a.format.tiny
    square = np.mean(x * x, axis=-1, keepdims=True) + kind.eps
    # half of: squares, mean, eps, its sum with the mean; then root, quotient, weight, product with the weight
    steps = 6.0 * u + x.shape[-1] / 2 * U
    # the same four, where they are subnormal, change the root by half of what they are off by
    steps = steps + 2 * tiny / square
    # a quotient below the normal numbers loses up to ``tiny``, times the weight; and a weight, times the quotient
    root = np.sqrt(square)
    with np.errstate(divide="ignore", invalid="ignore"):
        weight = np.nan_to_num(size * root / np.abs(x), posinf=0.0)
    allowed: FloatArray = steps * SECOND_ORDER * size + (1 + weight + np.abs(x) / root) * tiny
    return allowed


def _norm_inputs(kind: RmsNorm, inputs: Arrays, expected: FloatArray, form: Format) -> FloatArray:
    # its input, and the root of the mean of their squares
    size = np.abs(expected)
    with np.errstate(divide="ignore", invalid="ignore"):
        weight = np.nan_to_num(size / np.abs(inputs[0]), posinf=0.0)
    changed: FloatArray = weight * rounding(inputs[0], form) + form.unit_roundoff * size
    return changed


def _carry_norm(kind: RmsNorm, inputs: Approxes, weights: Sequence[Any], a: Arithmetic) -> Approx:
    x, weight = inputs[0], np.asarray(weights[0], np.float64)
    n = x.value.shape[-1]
    value = kind.compute(x.value, weight)
    square = np.mean(x.value * x.value, axis=-1) + kind.eps
    of_square = np.sqrt(np.sum((x.value * x.noise) ** 2, axis=-1)) / n
    of_square += np.mean(np.abs(x.value) * x.jump + x.error**2, axis=-1)
    steps = (4.0 + (0.0 if a.known else ONE_SIGN / 2 * math.sqrt(n))) * U
    shared = x.shared * kind.eps / square + of_square / square + steps
    gain = np.abs(weight) / np.sqrt(square)[..., None]
    return Approx(value, x.noise * gain + 3 * U * np.abs(value) + TINY, x.jump * gain, shared)


# --- RoPE -----------------------------------------------------------------------------------------------------


def _rope_bound(kind: Rope, inputs: Arrays, expected: FloatArray, weights: Any, a: Arithmetic) -> FloatArray:
    # factors are exact, as token positions are: they belong to the angle
    return _ROPE_IN_PARTS(kind, [*inputs, *weights], expected, weights, a)


def _rope(kind: Rope, inputs: Arrays, expected: FloatArray, a: Arithmetic) -> FloatArray:
    x, positions, *factors = inputs
    first, second = split_pairs(np.abs(x), kind.pairing)
    angle_error = _angle(kind, x, positions, *factors) * _angle_steps(x) * U
    allowed: FloatArray = (first + second) * (angle_error + 4 * U)  # cos or sin, two products, one addition
    return join_pairs(allowed, allowed, kind.pairing) * SECOND_ORDER + TINY


def _low_rope(kind: Rope, inputs: Arrays, expected: FloatArray, a: Arithmetic) -> FloatArray:
    x, positions, *factors = inputs
    u, tiny = a.format.unit_roundoff, a.format.tiny
    angle = _angle(kind, x, positions, *factors)
    first, second = split_pairs(np.abs(x), kind.pairing)
    # angles are carried in binary32, as in ``_rope``; cos and sin, both products and their sum are rounded
    either = (first + second) * angle * _angle_steps(x) * U + (first + second + 3) * tiny
    allowed: FloatArray = (2 * u * _rotated(first, second, angle, kind) + u * np.abs(expected)) * SECOND_ORDER
    return allowed + join_pairs(either, either, kind.pairing)


def _rope_inputs(kind: Rope, inputs: Arrays, expected: FloatArray, form: Format) -> FloatArray:
    first, second = split_pairs(rounding(inputs[0], form), kind.pairing)
    return join_pairs(first + second, first + second, kind.pairing)


def _carry_rope(kind: Rope, inputs: Approxes, weights: Sequence[Any], a: Arithmetic) -> Approx:
    x, positions = inputs
    value = kind.compute(x.value, positions.value, *weights)
    angle = _angle(kind, x.value, positions.value, *weights)
    noise, jump = (_rotated(*split_pairs(error, kind.pairing), angle, kind) for error in (x.noise, x.jump))
    own = RULES[Rope].bound(kind, [x.value, positions.value], value, weights, a)
    return Approx(value, noise + own, jump, x.shared)


def _angle(kind: Rope, x: Array, positions: IntArray, factors: FloatArray | None = None) -> FloatArray:
    """Return the angle of every pair, ``(n_tokens, 1, head_dim/2)``."""
    frequencies = rope_frequencies(x.shape[-1], factors, base=kind.base, scale=kind.scale)
    angle: FloatArray = positions[:, None, None] * frequencies
    return angle


def _angle_steps(x: Array) -> Array:
    """Return the roundings of the angle of every pair.

    bitnet.cpp multiplies the angle up in binary32, one frequency after the other: three roundings a step (the
    ratio, twice, and the product); an engine with a table of frequencies has fewer. Then three at most: the
    division by a factor, the scale and the product with it.
    """
    steps: Array = 3 * np.arange(x.shape[-1] // 2) + 7
    return steps


def _rotated(first: FloatArray, second: FloatArray, angle: FloatArray, kind: Rope) -> FloatArray:
    """Return magnitudes after a rotation in which nothing cancels."""
    cos, sin = np.abs(np.cos(angle)), np.abs(np.sin(angle))
    return join_pairs(first * cos + second * sin, first * sin + second * cos, kind.pairing)


_multiply = _rounded_once(lambda inputs, size: 2 * size)
_add = _rounded_once(lambda inputs, size: np.abs(inputs[0]) + np.abs(inputs[1]))
_ROPE_IN_PARTS = in_parts(_rope, _low_rope, _rope_inputs)
RULES: Mapping[type[Kind], Rule] = {
    SquaredRelu: Rule(in_parts(_multiply, _low_rounded_once, _square_inputs), _carry_square, one_rounding=True),
    Multiply: Rule(in_parts(_multiply, _low_rounded_once, of_factors), _carry_multiply, one_rounding=True),
    Add: Rule(in_parts(_add, _low_rounded_once, _add_inputs), _carry_add, one_rounding=True),
    Silu: Rule(in_parts(_silu, _low_silu, _silu_inputs), _carry_silu),
    RmsNorm: Rule(in_parts(_norm, _low_norm, _norm_inputs), _carry_norm),
    Rope: Rule(_rope_bound, _carry_rope),
}
