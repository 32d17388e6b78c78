"""Rounding of the embedding and of the LM head: rows of a table, and products with all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from crossval.audit.bounds import binary16
from crossval.audit.bounds.approx import Approx, exact, random_sum
from crossval.audit.bounds.arithmetic import SECOND_ORDER, TINY, Arithmetic, Array, Reading, U
from crossval.audit.bounds.quantised import BLOCK_OF, Quantiser
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


QUANTISED: Mapping[str, Quantiser] = {
    **dict.fromkeys(("Q8_0", "Q4_0", "Q5_0"), "q8_0"),
    **dict.fromkeys(("Q6_K", "Q3_K", "TQ1_0", "TQ2_0"), "q8_k"),
}
"""Type of the LM head -> what the llama.cpp family quantises its input to."""
OFFSETS = {"Q6_K": 32.0, "TQ1_0": 1.0, "TQ2_0": 1.0}
"""What is added to the codes of a type before they are multiplied, and taken off their sums."""


def _head_readings(kind: Head, n_inputs: int, a: Arithmetic, n_tokens: int, n_rows: int) -> tuple[Reading, ...]:
    if a.head_table != "F16":
        return _readings_of_table(a)
    narrow, plain = Reading("input in F16", ("f16",)), Reading("no F16", (None,))
    if a.is_main:
        lanes = Reading("input in F16, sums in F16", ("f16",), "binary16 lanes")
        return (lanes if a.numerics.binary16_sums and n_rows == 1 else narrow,)
    # bitnet.cpp of March 2026 rounds the input only when it multiplies one row (docs/numerics.md)
    if a.known:
        return (narrow if n_rows == 1 else plain,)
    return (plain,) if a.low else (narrow, plain)


def _readings_of_table(a: Arithmetic) -> tuple[Reading, ...]:
    """Return how the input is read where the table is not of F16; of main it is not probed how Q8_K rounds."""
    plain, bfloat = Reading("as recorded", (None,)), Reading("input in BF16", ("bf16",))
    if a.low or a.head_table == "F32":
        return (plain,)
    if a.head_table == "BF16":
        return (bfloat,) if a.known else (bfloat, plain)
    if QUANTISED[a.head_table] == "q8_0":
        blocks: tuple[Reading, ...] = (Reading("input in Q8_0", ("q8_0",)),)
    else:
        separate, fused = Reading("input in Q8_K", ("q8_k",)), Reading("input in Q8_K, fused", ("q8_k_fused",))
        stated = a.known and (not a.is_main or a.numerics.quantizer_block is not None)
        blocks = ((fused if a.numerics.fused_quantizer else separate),) if stated else (separate, fused)
    return blocks if a.known else (*blocks, plain)


def _head(kind: Head, inputs: Arrays, expected: FloatArray, weights: Sequence[Any], a: Arithmetic) -> FloatArray:
    return head_bound(inputs[0], row_norms(weights[0], a.head_table), a, expected)


def _carry_head(kind: Head, inputs: Approxes, weights: Sequence[Any], a: Arithmetic) -> Approx:
    x, table = inputs[0], weights[0]
    value = kind.compute(x.value, table)
    squares = _times_squares(np.concatenate([x.value**2, x.noise**2 + x.jump**2]), table)
    length, carried = np.sqrt(squares[: len(value)]), squares[len(value) :]
    if a.head_table in OFFSETS:  # lanes hold offsets, too, before these are taken off
        length = np.linalg.norm(x.value, axis=-1)[:, None] * row_norms(table, a.head_table)
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
    if arithmetic.head_table in QUANTISED:
        table += 4 * U  # decoded values, product of two steps, integer sum in binary32, its product with the steps
    allowed: FloatArray = largest * ((_steps(x.shape[-1], arithmetic) * U + table) * SECOND_ORDER) + TINY
    if arithmetic.head_table == "BF16":
        allowed = allowed + x.shape[-1] * 2.0**-126  # AVX512-BF16 takes what is subnormal for zero
    # with a table whose rows are no multiple of 4 main multiplies every input alone
    alone = arithmetic.is_main and norms.size % 4 and arithmetic.numerics.binary16_sums
    alone = alone and arithmetic.head_table == "F16"
    if arithmetic.sums == "binary16 lanes" or alone:
        allowed = allowed + binary16.worst(x.shape[-1] // binary16.BLOCK, largest)
    return allowed if expected is None else allowed + arithmetic.stored(expected)


def _steps(n: int, a: Arithmetic) -> float:
    """Return the roundings a term of a logit may pass through: the integer sum of a block is one."""
    if not a.known or a.head_table not in QUANTISED:
        return a.sum_steps(n)
    return n / BLOCK_OF[QUANTISED[a.head_table]] + 3  # then eight lanes


def row_norms(table: Array, kind: str = "F16") -> FloatArray:
    """Return the Euclidean norm of every row of a large table of a type, ``(rows,)``.

    Where codes are multiplied with an offset, of the terms that are added: ``|w|`` and twice the offset's part.
    """
    norms = np.empty(table.shape[0])
    for start in range(0, table.shape[0], HEAD_CHUNK_ROWS):
        rows = table[start : start + HEAD_CHUNK_ROWS].astype(np.float32)
        norms[start : start + HEAD_CHUNK_ROWS] = np.sqrt(np.einsum("ij,ij->i", rows, rows))
    steps = getattr(table, "steps", None)
    return norms if steps is None or kind not in OFFSETS else norms + 2 * OFFSETS[kind] * steps


def _times_squares(x: FloatArray, table: Array) -> FloatArray:
    """Multiply with the squares of a large table's rows, some rows at a time."""
    starts = range(0, table.shape[0], HEAD_CHUNK_ROWS)
    parts = [x @ (table[s : s + HEAD_CHUNK_ROWS].astype(np.float64) ** 2).T for s in starts]
    return np.concatenate(parts, axis=-1)


RULES: Mapping[type[Kind], Rule] = {
    Embedding: Rule(in_parts(_embedding, _embedding, _embedding_inputs), _carry_embedding),
    Head: Rule(_head, _carry_head, _head_readings),
}
