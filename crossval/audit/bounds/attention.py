"""Rounding of attention: scores, softmax, and the weighted sum of values."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from crossval.audit.bounds import binary16
from crossval.audit.bounds.approx import ONE_SIGN, Approx, random_sum
from crossval.audit.bounds.arithmetic import SECOND_ORDER, TINY, Arithmetic, Reading, Sums, U
from crossval.audit.bounds.rule import Approxes, Arrays, Rule, in_parts, of_factors, rounding
from crossval.formats import Dtype, Format
from crossval.model.kinds import Attend, AttentionScores, FloatArray, Kind, Softmax, visible_keys

FLASH = Reading("v in F16, sums in F16 key by key", (None, "f16"), "binary16 cells")
"""Flash attention of few tokens; of an engine of unknown arithmetic where scores and weights were not recorded."""

# --- products with keys and values ----------------------------------------------------------------------------


def _scores_readings(kind: Kind, n_inputs: int, a: Arithmetic, n_tokens: int, n_rows: int) -> tuple[Reading, ...]:
    if a.is_main:
        lanes: Sums = "binary16 lanes" if a.numerics.binary16_sums else "lanes"
        if not a.numerics.flash_attention:
            return (_main("q and k", n_tokens == 1, lanes),)
        if a.is_tiled(n_tokens):
            return (Reading("k in F16, in tiles", (None, "f16"), "cells"),)
        return (_main("q and k", True, lanes),)
    # bitnet.cpp of March 2026: Q and K in binary16; a single head in a batch: K only
    return _readings("k", "q and k", a, n_tokens == 1 or a.n_heads > 1, both_first=True)


def _attend_readings(kind: Kind, n_inputs: int, a: Arithmetic, n_tokens: int, n_rows: int) -> tuple[Reading, ...]:
    if a.is_main:
        if not a.numerics.flash_attention:
            lanes: Sums = "binary16 lanes" if a.numerics.binary16_sums else "lanes"
            return (_main("weights and v", n_tokens == 1, lanes),)
        if a.is_tiled(n_tokens):
            return (Reading("v in F16, in tiles", (None, "f16"), "cells"),)
        cells: Sums = "divided binary16 cells" if n_tokens == 1 else "binary16 cells"
        return (replace(FLASH, sums=cells),)
    # bitnet.cpp of March 2026: V in binary16, attention weights only in passes of one token
    return _readings("v", "weights and v", a, n_tokens == 1, both_first=False)


def _main(pair: str, single: bool, lanes: Sums) -> Reading:
    """Return the reading of main: both in binary16 in every pass; ``lanes``: of sums outside of batches."""
    if single and lanes == "binary16 lanes":
        return Reading(f"{pair} in F16, sums in F16", ("f16", "f16"), lanes)
    return Reading(f"{pair} in F16", ("f16", "f16"))


def _readings(cells: str, pair: str, a: Arithmetic, rounds_both: bool, *, both_first: bool) -> tuple[Reading, ...]:
    """Return the readings: the cache in its format, alone or with what it is multiplied with.

    ``rounds_both``: what bitnet.cpp does (docs/numerics.md). An engine that states the format of its cache reads
    keys and values in that format and no other.
    """
    kv, plain = a.numerics.kv_dtype, Reading("no F16", (None, None))
    if kv == "f32" or (kv is None and a.low):  # a 16-bit engine's cache holds what was recorded
        return (plain,)
    cell: Dtype = kv or "f16"
    state = Reading(f"{cells} in {cell.upper()}", (None, cell))
    both = Reading(f"{pair} in {cell.upper()}", (cell, cell))
    if a.known:
        return (both if rounds_both else state,)
    found = (both, state) if both_first else (state, both)
    return found if kv is not None else (*found, plain)


def _sum(kind: Kind, inputs: Arrays, a: Arithmetic) -> FloatArray:
    """Return the roundings of a sum, times the sum of the terms' magnitudes."""
    first, second = inputs
    magnitude = kind.compute(np.abs(first), np.abs(second))
    allowed: FloatArray = (a.sum_steps(first.shape[-1]) + a.carried) * U * magnitude
    if a.sums == "binary16 lanes":
        allowed = allowed + binary16.worst(_blocks(kind, first.shape[-1]), magnitude)
    return allowed


def _blocks(kind: Kind, n: int) -> int:
    """Return the blocks of sums in binary16 lanes: of cells as many as hold weights, for they are padded."""
    return math.ceil(n / binary16.BLOCK) if isinstance(kind, Attend) else n // binary16.BLOCK


def _product(kind: Kind, inputs: Arrays, expected: FloatArray, a: Arithmetic) -> FloatArray:
    return _sum(kind, inputs, a) * SECOND_ORDER + TINY


def _low_product(kind: Kind, inputs: Arrays, expected: FloatArray, a: Arithmetic) -> FloatArray:
    return (_sum(kind, inputs, a) + a.format.unit_roundoff * np.abs(expected)) * SECOND_ORDER + a.format.tiny


def _carry_scores(kind: AttentionScores, inputs: Approxes, weights: Sequence[Any], a: Arithmetic) -> Approx:
    q, k = inputs
    value, noise = _carried(kind, q, k, a)
    jump = _carried_jump(kind, q, k, k.jump**2)
    jump += np.abs(value) * (q.shared[:, None] + k.shared)
    return Approx(value, noise, jump, np.zeros(1))


def _carry_attend(kind: Attend, inputs: Approxes, weights: Sequence[Any], a: Arithmetic) -> Approx:
    p, v = inputs
    if a.sums in ("binary16 cells", "divided binary16 cells"):
        middle, error = binary16.by_cells(p, v, a)
        return Approx(middle, error, np.zeros_like(middle), np.zeros(middle.shape[:1]))
    value, noise = _carried(kind, p, v, a)
    # what the values of a token share does not cancel against other tokens'
    jump = _carried_jump(kind, p, v, v.jump**2 + v.common**2)
    return Approx(value, noise, jump, np.zeros(value.shape[:1]))


def _carried(kind: Kind, x: Approx, y: Approx, a: Arithmetic) -> tuple[FloatArray, FloatArray]:
    """Return a product and its noise: that of both factors and of the sum, as squares."""
    dot: Callable[..., FloatArray] = kind.compute
    value = dot(x.value, y.value)
    carried = dot(x.value**2 + x.noise**2, y.noise**2) + dot(x.noise**2, y.value**2)
    length = np.sqrt(dot(x.value**2, y.value**2))
    own = random_sum(x.value.shape[-1], length, value, a)
    if a.sums == "binary16 lanes":
        own = own + binary16.likely(_blocks(kind, x.value.shape[-1]), length + np.abs(value))
    return value, np.sqrt(carried + own * own) + TINY


def _carried_jump(kind: Kind, x: Approx, y: Approx, of_y: FloatArray) -> FloatArray:
    jump: FloatArray = np.sqrt(kind.compute(x.value**2 + x.jump**2, of_y) + kind.compute(x.jump**2, y.value**2))
    return jump


# --- softmax --------------------------------------------------------------------------------------------------


def _softmax(kind: Softmax, inputs: Arrays, expected: FloatArray, a: Arithmetic) -> FloatArray:
    scores, positions = inputs
    n = scores.shape[-1]
    visible = visible_keys(n, positions)
    scaled = np.where(visible, np.abs(scores) * kind.scale, 0.0)
    # the scale (two roundings), the product, the difference to the maximum: absolute errors of the exponent
    argument = 4 * U * (scaled + scaled.max(axis=-1, keepdims=True))
    summed = argument.max(axis=-1, keepdims=True) + (8 if a.known else 4 + n) * U
    # a polynomial exponential is within two units in the last place; then reciprocal and product
    allowed: FloatArray = expected * (argument + summed + 8 * U)
    # masked: an exact zero; below 2^-126 engines may flush
    return np.where(visible, allowed + 2.0**-126, 0.0) * SECOND_ORDER + TINY


def _low_softmax(kind: Softmax, inputs: Arrays, expected: FloatArray, a: Arithmetic) -> FloatArray:
    scores, positions = inputs
    u, tiny, n = a.format.unit_roundoff, a.format.tiny, scores.shape[-1]
    visible = visible_keys(n, positions)
    scaled = np.where(visible, scores * kind.scale, -np.inf)
    largest = scaled.max(axis=-1, keepdims=True)
    scaled = np.where(visible, scaled, largest)
    # absolute errors of the exponent: of the scale and the difference, in the difference; of both products
    argument = 2 * u * (largest - scaled) + u * (np.abs(scaled) + np.abs(largest)) + 3 * tiny
    summed = (expected * argument).sum(axis=-1, keepdims=True)
    # the exponential, the sum and the quotient are rounded; what underflows is lost whole
    allowed: FloatArray = expected * (np.expm1(argument + summed) + 3 * u + n * U)
    return np.where(visible, allowed * SECOND_ORDER + 2 * tiny + n * tiny * expected, 0.0)


def _softmax_inputs(kind: Softmax, inputs: Arrays, expected: FloatArray, form: Format) -> FloatArray:
    scores, positions = inputs
    argument = np.where(visible_keys(scores.shape[-1], positions), rounding(scores, form) * kind.scale, 0.0)
    changed: FloatArray = expected * np.expm1(argument + argument.max(axis=-1, keepdims=True))
    return changed


def _carry_softmax(kind: Softmax, inputs: Approxes, weights: Sequence[Any], a: Arithmetic) -> Approx:
    scores, positions = inputs
    value = kind.compute(scores.value, positions.value)
    visible = visible_keys(value.shape[-1], positions.value)
    size, noise, jump = (
        np.where(visible, x * kind.scale, 0.0) for x in (np.abs(scores.value), scores.noise, scores.jump)
    )
    noise = noise + 4 * U * (size + size.max(axis=-1, keepdims=True))
    # a key's weight moves by its own argument and, the other way, by the average of all: a single key by nothing
    average = np.sqrt(np.sum((value * noise) ** 2, axis=-1, keepdims=True))
    steps = (16 + ONE_SIGN * math.sqrt(value.shape[-1])) * U
    noise = value * (np.maximum(noise * (1 - 2 * value) + average, 0.0) + steps) + 2.0**-126
    average = np.sqrt(np.sum((value * jump) ** 2, axis=-1, keepdims=True))
    jump = value * np.maximum(jump * (1 - 2 * value) + average, 0.0)
    return Approx(value, np.where(visible, noise, 0.0), jump, np.zeros(1))


RULES: Mapping[type[Kind], Rule] = {
    AttentionScores: Rule(in_parts(_product, _low_product, of_factors), _carry_scores, _scores_readings),
    Attend: Rule(in_parts(_product, _low_product, of_factors), _carry_attend, _attend_readings),
    Softmax: Rule(in_parts(_softmax, _low_softmax, _softmax_inputs), _carry_softmax),
}
