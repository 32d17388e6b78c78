"""Rounding of what embedding models add: GELU, products with a constant, pooling, the Euclidean norm."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from crossval.audit.bounds.approx import ONE_SIGN, Approx
from crossval.audit.bounds.arithmetic import SECOND_ORDER, TINY, Arithmetic, U
from crossval.audit.bounds.rule import Approxes, Arrays, Rule, in_parts, one_rounding, own_rounding, rounding
from crossval.formats import F16, Format
from crossval.model.kinds import (
    GELU_CUBIC,
    FloatArray,
    Gelu,
    Kind,
    L2Norm,
    Pool,
    Scale,
    gelu,
    gelu_argument,
    sigmoid,
)

# --- GELU -----------------------------------------------------------------------------------------------------

TABLE_ENDS = 10.0
"""Beyond this magnitude llama.cpp's table is not read: the result is the gate, or zero."""


def table_entry(gate: FloatArray) -> FloatArray:
    """Return GELU as llama.cpp looks it up: of the gate rounded to binary16, rounded to binary16."""
    with np.errstate(over="ignore", invalid="ignore"):
        entry = F16.round(gelu(F16.round(gate)))
    return np.where(gate <= -TABLE_ENDS, 0.0, np.where(gate >= TABLE_ENDS, gate, entry))


def _evaluated(gate: FloatArray, u: float) -> FloatArray:
    """Return how far off GELU may be when its steps are rounded with the unit roundoff ``u``.

    ``1 + tanh`` loses what ``tanh`` is off by, whatever little of it is left: two roundings there, and one of the
    sum. Six of the argument, which ``tanh`` passes on by its slope; three products of the result.
    """
    argument = gelu_argument(gate)
    slope = 4.0 * sigmoid(2 * argument) * sigmoid(-2 * argument)
    off: FloatArray = np.abs(gate) / 2 * (3 + 6 * slope * np.abs(argument)) * u + 3 * u * np.abs(gelu(gate))
    return off


def _looked_up(gate: FloatArray, expected: FloatArray) -> FloatArray:
    """Return how far the table is from GELU at these gates; entries that binary32 may round otherwise included."""
    with np.errstate(over="ignore", invalid="ignore"):
        narrow = F16.round(gate)
        exact, off = gelu(narrow), _evaluated(narrow, U)
        entry = F16.round(exact)
        step = np.maximum(np.abs(F16.round(exact + off) - entry), np.abs(F16.round(exact - off) - entry))
    inside = np.abs(gate) < TABLE_ENDS
    found: FloatArray = np.abs(table_entry(gate) - expected) + np.where(inside, step, 0.0)
    return found


def _gelu(kind: Gelu, inputs: Arrays, expected: FloatArray, a: Arithmetic) -> FloatArray:
    allowed = _looked_up(inputs[0], expected)
    if not a.is_main:  # no table, or one; a rounded gate, and the rounding of the record
        moved = _gelu_moved(inputs[0], U * np.abs(inputs[0])) + U * np.abs(expected)
        allowed = np.maximum(allowed, _evaluated(inputs[0], U)) + (0.0 if a.known else moved)
    return allowed * SECOND_ORDER + TINY


def _low_gelu(kind: Gelu, inputs: Arrays, expected: FloatArray, a: Arithmetic) -> FloatArray:
    # steps are in binary32 or from a table: with ``1 + tanh`` in 16 bits there is no GELU left of negative gates
    steps, fixed = one_rounding(a)
    return (steps * np.abs(expected) + _looked_up(inputs[0], expected)) * SECOND_ORDER + fixed


def _gelu_inputs(kind: Gelu, inputs: Arrays, expected: FloatArray, form: Format) -> FloatArray:
    return _gelu_moved(inputs[0], rounding(inputs[0], form))


def _carry_gelu(kind: Gelu, inputs: Approxes, weights: Sequence[Any], a: Arithmetic) -> Approx:
    x = inputs[0]
    value = kind.compute(x.value)
    # a gate with an error may be rounded to either neighbour in binary16
    own = _gelu_moved(x.value, rounding(x.value, F16)) + rounding(value, F16) + _evaluated(x.value, U)
    noise = _gelu_moved(x.value, x.noise) + own
    return Approx(value, noise, _gelu_moved(x.value, x.jump + x.common), np.zeros(value.shape[:1]))


def _gelu_moved(x: FloatArray, error: FloatArray) -> FloatArray:
    """Return how far GELU moves when its argument does; its second derivative is at most 0.8."""
    gain = sigmoid(2.0 * gelu_argument(x))
    of_argument = np.sqrt(2.0 / np.pi) * (1.0 + 3.0 * GELU_CUBIC * x * x)
    slope = np.abs(gain + 2.0 * x * gain * (1.0 - gain) * of_argument)
    moved: FloatArray = (slope + 0.4 * error) * error
    return moved


# --- product with a constant ----------------------------------------------------------------------------------


def _factor_steps(factor: float) -> float:
    """Return the roundings of a product with a constant: a power of two has none, others may be rounded first."""
    if math.frexp(factor)[0] == 0.5:
        return 0.0
    return 1.0 if float(np.float32(factor)) == factor else 2.0


def _scale(kind: Scale, inputs: Arrays, expected: FloatArray, a: Arithmetic) -> FloatArray:
    steps = _factor_steps(kind.factor) + (0.0 if a.known else 2.0)  # a rounded input, and the record
    return steps * U * SECOND_ORDER * np.abs(expected) + TINY


def _low_scale(kind: Scale, inputs: Arrays, expected: FloatArray, a: Arithmetic) -> FloatArray:
    steps, fixed = one_rounding(a)  # of the constant and of the product
    return 2 * steps * SECOND_ORDER * np.abs(expected) + fixed


def _scale_inputs(kind: Scale, inputs: Arrays, expected: FloatArray, form: Format) -> FloatArray:
    changed: FloatArray = abs(kind.factor) * rounding(inputs[0], form)
    return changed


def _carry_scale(kind: Scale, inputs: Approxes, weights: Sequence[Any], a: Arithmetic) -> Approx:
    x, size = inputs[0], abs(kind.factor)
    value = kind.compute(x.value)
    return Approx(value, size * x.noise + 2 * own_rounding(value, a), size * x.jump, x.shared)


# --- pooling --------------------------------------------------------------------------------------------------


def _pool(kind: Pool, inputs: Arrays, expected: FloatArray, a: Arithmetic) -> FloatArray:
    if kind.pooling != "mean":  # copies
        return (0.0 if a.known else U) * np.abs(expected)
    states, positions = inputs
    terms = kind.compute(np.abs(states), positions)
    # a sum of as many terms as tokens; 1 / their number, and the product with it
    steps = a.sum_steps(int(positions.max()) + 1) + 2
    return steps * U * SECOND_ORDER * terms + TINY


def _low_pool(kind: Pool, inputs: Arrays, expected: FloatArray, a: Arithmetic) -> FloatArray:
    steps, fixed = one_rounding(a)
    return _pool(kind, inputs, expected, a) + steps * np.abs(expected) + fixed


def _pool_inputs(kind: Pool, inputs: Arrays, expected: FloatArray, form: Format) -> FloatArray:
    return kind.compute(rounding(inputs[0], form), inputs[1])


def _carry_pool(kind: Pool, inputs: Approxes, weights: Sequence[Any], a: Arithmetic) -> Approx:
    x, positions = inputs[0], inputs[1].value
    value = kind.compute(x.value, positions)
    noise, jump = kind.compute(x.noise, positions), kind.compute(x.jump + x.common, positions)
    if kind.pooling == "mean":  # noise of different tokens is independent
        counts = positions[:, None] + 1
        noise = np.sqrt(kind.compute(x.noise * x.noise, positions) / counts)
    own = _pool(kind, [x.value, positions], value, a)
    return Approx(value, noise + own, jump, np.zeros(value.shape[:1]))


# --- Euclidean norm -------------------------------------------------------------------------------------------


def _l2(kind: L2Norm, inputs: Arrays, expected: FloatArray, a: Arithmetic) -> FloatArray:
    # half of: square, their sum; then root, reciprocal, product
    steps = 4.0 + (0.0 if a.known else inputs[0].shape[-1] / 2)  # known: the sum is in binary64
    return steps * U * SECOND_ORDER * np.abs(expected) + TINY


def _low_l2(kind: L2Norm, inputs: Arrays, expected: FloatArray, a: Arithmetic) -> FloatArray:
    u, tiny = a.format.unit_roundoff, a.format.tiny
    steps = 4.0 * u + inputs[0].shape[-1] / 2 * U
    allowed: FloatArray = steps * SECOND_ORDER * np.abs(expected) + tiny
    return allowed


def _l2_inputs(kind: L2Norm, inputs: Arrays, expected: FloatArray, form: Format) -> FloatArray:
    norm = np.linalg.norm(inputs[0], axis=-1, keepdims=True)
    changed: FloatArray = rounding(inputs[0], form) / np.where(norm > 0, norm, 1.0)
    found: FloatArray = changed + form.unit_roundoff * np.abs(expected)
    return found


def _carry_l2(kind: L2Norm, inputs: Approxes, weights: Sequence[Any], a: Arithmetic) -> Approx:
    x = inputs[0]
    value, norm = kind.compute(x.value), np.linalg.norm(x.value, axis=-1)
    norm = np.where(norm > 0, norm, 1.0)
    # the norm moves by at most that of the errors; what a row shares is divided out
    moved = np.sqrt(np.sum((x.value * x.noise) ** 2, axis=-1)) / norm**2
    moved += np.sum(np.abs(x.value) * x.jump + x.error**2, axis=-1) / norm**2
    steps = (3.0 + (0.0 if a.known else ONE_SIGN / 2 * math.sqrt(x.value.shape[-1]))) * U
    gain = 1.0 / norm[:, None]
    return Approx(value, x.noise * gain + 2 * U * np.abs(value) + TINY, x.jump * gain, moved + steps)


RULES: Mapping[type[Kind], Rule] = {
    Gelu: Rule(in_parts(_gelu, _low_gelu, _gelu_inputs), _carry_gelu),
    Scale: Rule(in_parts(_scale, _low_scale, _scale_inputs), _carry_scale),
    Pool: Rule(in_parts(_pool, _low_pool, _pool_inputs), _carry_pool),
    L2Norm: Rule(in_parts(_l2, _low_l2, _l2_inputs), _carry_l2),
}
