"""Rounding of attention: scores, softmax, and the weighted sum of values."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np

from crossval.audit.bounds.approx import ONE_SIGN, Approx, random_sum
from crossval.audit.bounds.arithmetic import SECOND_ORDER, TINY, Arithmetic, Array, Reading, U
from crossval.audit.bounds.rule import PartsRule, rounded
from crossval.formats import Dtype, Format
from crossval.model.kinds import Attend, AttentionScores, FloatArray, Softmax, visible_keys

P = TypeVar("P", AttentionScores, Attend)


class _ProductRule(PartsRule[P]):
    """A product with keys or values.

    bitnet.cpp reads Q and K in binary16 (a single head in a batch: K only), V in binary16, attention weights only
    in passes of one token (docs/numerics.md). An engine that states the format of its cache reads keys and values
    in that format and no other.
    """

    state: str
    """What the cache holds."""
    both: str
    """That, and what it is multiplied with."""
    state_first: bool
    """Which of the readings is tried first where the engine's family is not known."""

    @abstractmethod
    def _rounds_both(self, arithmetic: Arithmetic, single: bool) -> bool:
        """Return whether bitnet.cpp rounds both."""

    def readings(
        self, kind: P, n_inputs: int, arithmetic: Arithmetic, n_tokens: int, n_rows: int
    ) -> tuple[Reading, ...]:
        """Return them: the state in the format of the cache, alone or with what it is multiplied with."""
        kv, plain = arithmetic.numerics.kv_dtype, Reading("no F16", (None, None))
        if kv == "f32" or (kv is None and arithmetic.low):  # a 16-bit engine's cache holds what was recorded
            return (plain,)
        cell: Dtype = kv or "f16"
        state = Reading(f"{self.state} in {cell.upper()}", (None, cell))
        both = Reading(f"{self.both} in {cell.upper()}", (cell, cell))
        if arithmetic.known:
            return (both if self._rounds_both(arithmetic, n_tokens == 1) else state,)
        found: tuple[Reading, ...] = (state, both) if self.state_first else (both, state)
        return found if kv is not None else (*found, plain)

    def single(self, kind: P, inputs: Sequence[Array], expected: FloatArray, a: Arithmetic) -> FloatArray:
        """The roundings of a sum, times the sum of the terms' magnitudes."""
        return self._sum(kind, inputs, a) * SECOND_ORDER + TINY

    def low(self, kind: P, inputs: Sequence[Array], expected: FloatArray, a: Arithmetic) -> FloatArray:
        """The sum is carried in binary32 and rounded once."""
        rounding = a.format.unit_roundoff * np.abs(expected)
        return (self._sum(kind, inputs, a) + rounding) * SECOND_ORDER + a.format.tiny

    def _sum(self, kind: P, inputs: Sequence[Array], a: Arithmetic) -> FloatArray:
        first, second = inputs
        terms = kind.compute(np.abs(first), np.abs(second))
        return (a.sum_steps(first.shape[-1]) + a.carried) * U * terms

    def input_error(self, kind: P, inputs: Sequence[Array], expected: FloatArray, form: Format) -> FloatArray:
        """One factor's error times the other."""
        (x, y), (of_x, of_y) = inputs, (rounded(array, form) for array in inputs)
        return kind.compute(of_x, np.abs(y)) + kind.compute(np.abs(x), of_y)


class ScoresRule(_ProductRule[AttentionScores]):
    """Queries times keys."""

    state, both, state_first = "k", "q and k", False

    def _rounds_both(self, arithmetic: Arithmetic, single: bool) -> bool:
        return single or arithmetic.n_heads > 1

    def propagate(
        self, kind: AttentionScores, inputs: Sequence[Approx], weights: Sequence[Any], a: Arithmetic
    ) -> Approx:
        """Noise adds as squares; what all of a query or key share moves its scores together."""
        q, k = inputs
        dot = kind.compute
        value = dot(q.value, k.value)
        carried = dot(q.value**2 + q.noise**2, k.noise**2) + dot(q.noise**2, k.value**2)
        length = np.sqrt(dot(q.value**2, k.value**2))
        own = random_sum(q.value.shape[-1], length, value, a)
        jump = np.sqrt(dot(q.value**2 + q.jump**2, k.jump**2) + dot(q.jump**2, k.value**2))
        jump += np.abs(value) * (q.shared[:, None] + k.shared)
        return Approx(value, np.sqrt(carried + own * own) + TINY, jump, np.zeros(1))


class AttendRule(_ProductRule[Attend]):
    """Attention weights times values."""

    state, both, state_first = "v", "weights and v", True

    def _rounds_both(self, arithmetic: Arithmetic, single: bool) -> bool:
        return single

    def propagate(self, kind: Attend, inputs: Sequence[Approx], weights: Sequence[Any], a: Arithmetic) -> Approx:
        """Noise adds as squares; what a value shares does not cancel against other tokens' values."""
        p, v = inputs
        attend = kind.compute
        value = attend(p.value, v.value)
        carried = attend(p.value**2 + p.noise**2, v.noise**2) + attend(p.noise**2, v.value**2)
        length = np.sqrt(attend(p.value**2, v.value**2))
        own = random_sum(p.value.shape[-1], length, value, a)
        jump = np.sqrt(attend(p.value**2 + p.jump**2, v.jump**2 + v.common**2) + attend(p.jump**2, v.value**2))
        return Approx(value, np.sqrt(carried + own * own) + TINY, jump, np.zeros(value.shape[:1]))


class SoftmaxRule(PartsRule[Softmax]):
    """``exp(scale * score - maximum)`` over its sum, of the visible keys."""

    def single(self, kind: Softmax, inputs: Sequence[Array], expected: FloatArray, a: Arithmetic) -> FloatArray:
        """Absolute errors of the exponent: of the scale (twice), the product, the difference to the maximum."""
        scores, positions = inputs
        n = scores.shape[-1]
        visible = visible_keys(n, positions)
        scaled = np.where(visible, np.abs(scores) * kind.scale, 0.0)
        argument = 4 * U * (scaled + scaled.max(axis=-1, keepdims=True))
        summed = argument.max(axis=-1, keepdims=True) + (8 if a.known else 4 + n) * U
        # a polynomial exponential is within two units in the last place; then reciprocal and product
        allowed: FloatArray = expected * (argument + summed + 8 * U)
        # masked: an exact zero; below 2^-126 engines may flush
        return np.where(visible, allowed + 2.0**-126, 0.0) * SECOND_ORDER + TINY

    def low(self, kind: Softmax, inputs: Sequence[Array], expected: FloatArray, a: Arithmetic) -> FloatArray:
        """Every step in the format, the sum in binary32."""
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

    def input_error(
        self, kind: Softmax, inputs: Sequence[Array], expected: FloatArray, form: Format
    ) -> FloatArray:
        """The exponent's, and that of the maximum."""
        scores, positions = inputs
        visible = visible_keys(scores.shape[-1], positions)
        argument = np.where(visible, rounded(scores, form) * kind.scale, 0.0)
        changed: FloatArray = expected * np.expm1(argument + argument.max(axis=-1, keepdims=True))
        return changed

    def propagate(self, kind: Softmax, inputs: Sequence[Approx], weights: Sequence[Any], a: Arithmetic) -> Approx:
        """A key's weight moves by its own argument and, the other way, by the average of all.

        That of a single key does not move.
        """
        scores, positions = inputs
        value = kind.compute(scores.value, positions.value)
        visible = visible_keys(value.shape[-1], positions.value)
        size, noise, jump = (
            np.where(visible, x * kind.scale, 0.0) for x in (np.abs(scores.value), scores.noise, scores.jump)
        )
        noise = noise + 4 * U * (size + size.max(axis=-1, keepdims=True))
        average = np.sqrt(np.sum((value * noise) ** 2, axis=-1, keepdims=True))
        rounding = (16 + ONE_SIGN * math.sqrt(value.shape[-1])) * U
        noise = value * (np.maximum(noise * (1 - 2 * value) + average, 0.0) + rounding) + 2.0**-126
        average = np.sqrt(np.sum((value * jump) ** 2, axis=-1, keepdims=True))
        jump = value * np.maximum(jump * (1 - 2 * value) + average, 0.0)
        return Approx(value, np.where(visible, noise, 0.0), jump, np.zeros(1))
