"""Rounding of the embedding and of the head: rows of a table, and products with all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from crossval.audit.bounds.approx import Approx, exact, random_sum
from crossval.audit.bounds.arithmetic import SECOND_ORDER, TINY, Arithmetic, Array, Reading, U
from crossval.audit.bounds.rule import PartsRule, Rule
from crossval.formats import F32, Format
from crossval.model.kinds import HEAD_CHUNK_ROWS, Embedding, FloatArray, Head


class EmbeddingRule(PartsRule[Embedding]):
    """A copy: F16 widened is exact, unless the engine's own format has fewer digits."""

    def single(self, kind: Embedding, inputs: Sequence[Array], expected: FloatArray, a: Arithmetic) -> FloatArray:
        """What the rounding of the table's rows changes."""
        changed: FloatArray = np.abs(a.format.round(expected) - expected)
        return changed

    low = single

    def input_error(
        self, kind: Embedding, inputs: Sequence[Array], expected: FloatArray, form: Format
    ) -> FloatArray:
        """Token ids are exact."""
        return np.zeros_like(expected)

    def propagate(
        self, kind: Embedding, inputs: Sequence[Approx], weights: Sequence[Any], a: Arithmetic
    ) -> Approx:
        """No error."""
        return exact(kind.compute(inputs[0].value, *weights))


class HeadRule(Rule[Head]):
    """The logits. bitnet.cpp rounds their input to binary16 when it multiplies one row only (docs/numerics.md)."""

    def readings(
        self, kind: Head, n_inputs: int, arithmetic: Arithmetic, n_tokens: int, n_rows: int
    ) -> tuple[Reading, ...]:
        """Return them: the input in binary16, or as it was recorded."""
        narrow, plain = Reading("input in F16", ("f16",)), Reading("no F16", (None,))
        if arithmetic.known:
            return (narrow if n_rows == 1 else plain,)
        return (plain,) if arithmetic.low else (narrow, plain)

    def bound(
        self, kind: Head, inputs: Sequence[Array], expected: FloatArray, weights: Sequence[Any], a: Arithmetic
    ) -> FloatArray:
        """``head_bound``, with the norms of the table's rows."""
        return head_bound(inputs[0], row_norms(weights[0]), a, expected)

    def propagate(self, kind: Head, inputs: Sequence[Approx], weights: Sequence[Any], a: Arithmetic) -> Approx:
        """Errors of the input times the table, as squares."""
        x, table = inputs[0], weights[0]
        value = kind.compute(x.value, table)
        squares = _times_squares(np.concatenate([x.value**2, x.noise**2 + x.jump**2]), table)
        length, carried = np.sqrt(squares[: len(value)]), squares[len(value) :]
        own = random_sum(x.value.shape[-1], length, value, a)
        return Approx(value, np.sqrt(carried + own * own) + TINY, np.zeros_like(value), x.shared)


def head_bound(
    x: FloatArray, norms: FloatArray, arithmetic: Arithmetic, expected: FloatArray | None = None
) -> FloatArray:
    """Return the bound of the logits ``(rows, vocab_size)`` for inputs ``x`` and the norms of the table's rows.

    Cauchy-Schwarz: ``sum |x_i w_i| <= |x| |w|``, one number per row of the vocabulary. An engine that computes in
    a 16-bit format has its table in that format, too, and rounds ``expected`` to it.
    """
    allowed: FloatArray = np.linalg.norm(x, axis=-1)[:, None] * norms
    table = arithmetic.format.unit_roundoff if arithmetic.low else 0.0
    if arithmetic.recorded is not F32:
        table = arithmetic.recorded.unit_roundoff  # of the input
    allowed = allowed * ((arithmetic.sum_steps(x.shape[-1]) * U + table) * SECOND_ORDER) + TINY
    return allowed if expected is None else allowed + arithmetic.stored(expected)


def row_norms(table: Array, chunk_rows: int = HEAD_CHUNK_ROWS) -> FloatArray:
    """Return the Euclidean norm of every row of a large table, ``(rows,)``."""
    norms = np.empty(table.shape[0])
    for start in range(0, table.shape[0], chunk_rows):
        rows = table[start : start + chunk_rows].astype(np.float32)
        norms[start : start + chunk_rows] = np.sqrt(np.einsum("ij,ij->i", rows, rows))
    return norms


def _times_squares(x: FloatArray, table: Array) -> FloatArray:
    """Multiply with the squares of a large table's rows, some rows at a time."""
    starts = range(0, table.shape[0], HEAD_CHUNK_ROWS)
    parts = [x @ (table[s : s + HEAD_CHUNK_ROWS].astype(np.float64) ** 2).T for s in starts]
    return np.concatenate(parts, axis=-1)
