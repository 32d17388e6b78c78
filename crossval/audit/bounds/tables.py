"""Rounding of the embedding and of the LM head: rows of a table, and products with all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from crossval.audit.bounds import binary16
from crossval.audit.bounds.approx import Approx, exact, random_sum
from crossval.audit.bounds.arithmetic import SECOND_ORDER, TINY, Arithmetic, Array, Reading, U
from crossval.audit.bounds.rule import Approxes, Arrays, Rule, in_parts
from crossval.formats import F32, Format
from crossval.model.kinds import HEAD_CHUNK_ROWS, Embedding, FloatArray, Head, Kind


def _embedding(kind: Embedding, inputs: Arrays, expected: FloatArray, a: Arithmetic) -> FloatArray:
    # F16 widened is exact, unless the engine's own format has fewer digits
    changed: FloatArray = np.abs(a.format.round(expected) - expected)
    return changed


def _embedding_inputs(kind: Embedding, inputs: Arrays, expected: FloatArray, form: Format) -> FloatArray:
    return np.zeros_like(expected)  # token ids


def _carry_embedding(kind: Embedding, inputs: Approxes, weights: Sequence[Any], a: Arithmetic) -> Approx:
    return exact(kind.compute(inputs[0].value, *weights))


def _head_readings(kind: Head, n_inputs: int, a: Arithmetic, n_tokens: int, n_rows: int) -> tuple[Reading, ...]:
    narrow, plain = Reading("input in F16", ("f16",)), Reading("no F16", (None,))
    if a.is_main:
        lanes = Reading("input in F16, sums in F16", ("f16",), "binary16 lanes")
        return (lanes if a.numerics.binary16_sums and n_rows == 1 else narrow,)
    # bitnet.cpp of March 2026 rounds the input only when it multiplies one row (docs/numerics.md)
    if a.known:
        return (narrow if n_rows == 1 else plain,)
    return (plain,) if a.low else (narrow, plain)


def _head(kind: Head, inputs: Arrays, expected: FloatArray, weights: Sequence[Any], a: Arithmetic) -> FloatArray:
    return head_bound(inputs[0], row_norms(weights[0]), a, expected)


def _carry_head(kind: Head, inputs: Approxes, weights: Sequence[Any], a: Arithmetic) -> Approx:
    x, table = inputs[0], weights[0]
    value = kind.compute(x.value, table)
    squares = _times_squares(np.concatenate([x.value**2, x.noise**2 + x.jump**2]), table)
    length, carried = np.sqrt(squares[: len(value)]), squares[len(value) :]
    own = random_sum(x.value.shape[-1], length, value, a)
    if a.sums == "binary16 lanes":
        own = own + binary16.likely(x.value.shape[-1] // binary16.BLOCK, length + np.abs(value))
    return Approx(value, np.sqrt(carried + own * own) + TINY, np.zeros_like(value), x.shared)


def head_bound(
    x: FloatArray, norms: FloatArray, arithmetic: Arithmetic, expected: FloatArray | None = None
) -> FloatArray:
    """Return the bound of the logits ``(rows, vocab_size)`` for inputs ``x`` and the norms of the table's rows.

    Cauchy-Schwarz: ``sum |x_i w_i| <= |x| |w|``, one number per row of the vocabulary. An engine that computes in
    a 16-bit format has its table in that format, too, and rounds ``expected`` to it.
    """
    largest: FloatArray = np.linalg.norm(x, axis=-1)[:, None] * norms
    table = arithmetic.format.unit_roundoff if arithmetic.low else 0.0
    if arithmetic.recorded is not F32:
        table = arithmetic.recorded.unit_roundoff  # of the input
    allowed: FloatArray = largest * ((arithmetic.sum_steps(x.shape[-1]) * U + table) * SECOND_ORDER) + TINY
    # with a table whose rows are no multiple of 4 main multiplies every input alone
    alone = arithmetic.is_main and norms.size % 4 and arithmetic.numerics.binary16_sums
    if arithmetic.sums == "binary16 lanes" or alone:
        allowed = allowed + binary16.worst(x.shape[-1] // binary16.BLOCK, largest)
    return allowed if expected is None else allowed + arithmetic.stored(expected)


def row_norms(table: Array) -> FloatArray:
    """Return the Euclidean norm of every row of a large table, ``(rows,)``."""
    norms = np.empty(table.shape[0])
    for start in range(0, table.shape[0], HEAD_CHUNK_ROWS):
        rows = table[start : start + HEAD_CHUNK_ROWS].astype(np.float32)
        norms[start : start + HEAD_CHUNK_ROWS] = np.sqrt(np.einsum("ij,ij->i", rows, rows))
    return norms


def _times_squares(x: FloatArray, table: Array) -> FloatArray:
    """Multiply with the squares of a large table's rows, some rows at a time."""
    starts = range(0, table.shape[0], HEAD_CHUNK_ROWS)
    parts = [x @ (table[s : s + HEAD_CHUNK_ROWS].astype(np.float64) ** 2).T for s in starts]
    return np.concatenate(parts, axis=-1)


RULES: Mapping[type[Kind], Rule] = {
    Embedding: Rule(in_parts(_embedding, _embedding, _embedding_inputs), _carry_embedding),
    Head: Rule(_head, _carry_head, _head_readings),
}
