"""How far a correct engine may be from the specification in one operation, given that engine's own inputs.

Every bound is derived from the operation: which values are rounded to binary32 (``U`` each), how long a sum is,
where a value is rounded to binary16. First-order terms are summed; ``SECOND_ORDER`` covers the rest. Where the
family of an engine is known (bitnet.cpp's), its reduction shapes give short sums and its inputs are exactly what
was recorded; any other engine may sum in any order and carry more digits than it recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from crossval.ops import FloatArray, Op
from crossval.runners.base import Numerics

U = 2.0**-24
"""Largest relative error of one rounding to binary32."""
U16 = 2.0**-11
"""The same for binary16."""
TINY = 2.0**-149
"""Smallest binary32 above zero: what underflow may lose."""
SECOND_ORDER = 1.02

NORMS = frozenset({"attn_norm", "attn_sub_norm", "ffn_norm", "ffn_sub_norm", "result_norm"})
ADDITIONS = frozenset({"ffn_inp", "l_out"})
BITLINEARS = frozenset({"q", "k", "v", "attn_o_out", "ffn_gate", "ffn_up", "ffn_down"})

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Arithmetic:
    """What is known about how an engine rounds, beyond being binary32."""

    numerics: Numerics
    n_heads: int
    """A single head takes another code path in bitnet.cpp."""

    @property
    def known(self) -> bool:
        """Whether the engine states that it rounds as bitnet.cpp's family does."""
        return self.numerics.simd_width is not None and self.numerics.fused_quantizer is not None

    def sum_steps(self, n: int) -> float:
        """Roundings that one term of a sum of ``n`` may pass through."""
        width = self.numerics.simd_width
        # bitnet.cpp: one accumulator of W lanes and a tree at worst (llamafile sgemm); four in ggml_vec_dot_f16
        return n / width + np.log2(width) + 3 if width else float(n)


@dataclass(frozen=True)
class Reading:
    """One allowed choice of which inputs of an operation are rounded to binary16 first."""

    name: str
    rounded: tuple[bool, ...]
    """For each array input."""


def readings(op: Op, arithmetic: Arithmetic, n_tokens: int, n_rows: int) -> tuple[Reading, ...]:
    """Return the allowed readings of an operation: one where the engine's family is known.

    bitnet.cpp: Q and K in binary16 (a single head in a batch: K only), V in binary16, attention weights only in
    passes of one token, the head's input only when it multiplies one row (docs/numerics.md).
    """
    single = n_tokens == 1
    if op.name == "kq":
        both, k_only = Reading("q and k in F16", (True, True)), Reading("k in F16", (False, True))
        if arithmetic.known:
            return (k_only if arithmetic.n_heads == 1 and not single else both,)
        return (both, k_only, Reading("no F16", (False, False)))
    if op.name == "kqv_out":
        v_only, both = Reading("v in F16", (False, True)), Reading("weights and v in F16", (True, True))
        if arithmetic.known:
            return (both if single else v_only,)
        return (v_only, both, Reading("no F16", (False, False)))
    if op.name == "result_output":
        rounded, plain = Reading("input in F16", (True,)), Reading("no F16", (False,))
        if arithmetic.known:
            return (rounded if n_rows == 1 else plain,)
        return (rounded, plain)
    return (Reading("", (False,) * len(op.inputs)),)


def to_f16(x: Array) -> FloatArray:
    """Round to binary16 and widen again."""
    with np.errstate(over="ignore", invalid="ignore"):
        return x.astype(np.float32).astype(np.float16).astype(np.float64)


def bound(
    op: Op, inputs: Sequence[Array], expected: FloatArray, weights: Sequence[Any], arithmetic: Arithmetic
) -> FloatArray:
    """Return the largest allowed ``|recorded - expected|``, elementwise, for every op but BitLinear and the head.

    ``inputs`` are the arrays as the reading has them, float64; ``expected`` is the op's output on them.
    """
    size = np.abs(expected)
    if op.name == "inp_embd":
        return np.zeros_like(size)  # F16 widened: exact
    if op.name in NORMS:
        n = inputs[0].shape[-1]
        # half of: square, their sum, mean, + eps; then sqrt, reciprocal, product, product with the weight
        steps = 7.0 + (0.0 if arithmetic.known else n / 2)  # known: the sum is in binary64
        return steps * U * SECOND_ORDER * size + TINY
    special = _SPECIAL.get(op.name)
    if special is not None:
        return special(op, inputs, expected, weights, arithmetic) * SECOND_ORDER + TINY
    # One rounding: additions, products, the square of ReLU. An engine that carries more digits than it recorded
    # may be off by the rounding of its recorded inputs too.
    if not arithmetic.known:
        size = size + (np.abs(inputs[0]) + np.abs(inputs[1]) if op.name in ADDITIONS else 2 * size)
    return U * SECOND_ORDER * size + TINY


def _rope(op: Op, inputs: Sequence[Array], expected: FloatArray, _w: Any, _a: Arithmetic) -> FloatArray:
    x, positions = inputs
    half = x.shape[-1] // 2
    # bitnet.cpp multiplies the angle up in binary32, one frequency after the other: three roundings a step (the
    # ratio, twice, and the product); an engine with a table of frequencies has fewer
    frequency = op.function.keywords["base"] ** (-np.arange(half) / half)  # type: ignore[attr-defined]
    angle_error = positions[:, None, None] * frequency * (3 * np.arange(half) + 4) * U
    pair = np.abs(x[..., :half]) + np.abs(x[..., half:])
    allowed: FloatArray = pair * (angle_error + 4 * U)  # cos or sin, two products, one addition
    return np.concatenate([allowed, allowed], axis=-1)


def _scores(op: Op, inputs: Sequence[Array], expected: FloatArray, _w: Any, a: Arithmetic) -> FloatArray:
    q, k = inputs
    terms = op.function(np.abs(q), np.abs(k))
    return a.sum_steps(q.shape[-1]) * U * terms


def _softmax(op: Op, inputs: Sequence[Array], expected: FloatArray, _w: Any, a: Arithmetic) -> FloatArray:
    scores, positions = inputs
    scale = op.function.keywords["scale"]  # type: ignore[attr-defined]
    visible = np.arange(scores.shape[-1]) <= positions[:, None]
    scaled = np.where(visible, np.abs(scores) * scale, 0.0)
    # the scale (two roundings), the product, the difference to the maximum: absolute errors of the exponent
    argument = 4 * U * (scaled + scaled.max(axis=-1, keepdims=True))
    n = scores.shape[-1]
    summed = argument.max(axis=-1, keepdims=True) + (8 if a.known else 4 + n) * U
    # a polynomial exponential is within two units in the last place; then reciprocal and product
    allowed: FloatArray = expected * (argument + summed + 8 * U)
    return np.where(visible, allowed + 2.0**-126, 0.0)  # masked: an exact zero; below 2^-126 engines may flush


def _attend(op: Op, inputs: Sequence[Array], expected: FloatArray, _w: Any, a: Arithmetic) -> FloatArray:
    weights, v = inputs
    terms = op.function(np.abs(weights), np.abs(v))
    return a.sum_steps(weights.shape[-1]) * U * terms


def head_bound(x: FloatArray, norms: FloatArray, arithmetic: Arithmetic) -> FloatArray:
    """Return the bound of the logits ``(rows, vocab_size)`` for inputs ``x`` and the norms of the table's rows.

    Cauchy-Schwarz: ``sum |x_i w_i| <= |x| |w|``, one number per row of the vocabulary.
    """
    allowed: FloatArray = np.linalg.norm(x, axis=-1)[:, None] * norms
    return allowed * (arithmetic.sum_steps(x.shape[-1]) * U * SECOND_ORDER) + TINY


def row_norms(table: Array, chunk_rows: int = 4096) -> FloatArray:
    """Return the Euclidean norm of every row of a large table, ``(rows,)``."""
    norms = np.empty(table.shape[0])
    for start in range(0, table.shape[0], chunk_rows):
        rows = table[start : start + chunk_rows].astype(np.float32)
        norms[start : start + chunk_rows] = np.sqrt(np.einsum("ij,ij->i", rows, rows))
    return norms


_SPECIAL: dict[str, Callable[[Op, Sequence[Array], FloatArray, Any, Arithmetic], FloatArray]] = {
    "q_rope": _rope,
    "k_rope": _rope,
    "kq": _scores,
    "kq_soft_max": _softmax,
    "kqv_out": _attend,
}
