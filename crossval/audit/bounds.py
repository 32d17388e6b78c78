"""How far a correct engine may be from the specification in one operation, given that engine's own inputs.

Every bound is derived from the operation: which values are rounded to binary32 (``U`` each), how long a sum is,
where a value is rounded to binary16. First-order terms are summed; ``SECOND_ORDER`` covers the rest. Where the
family of an engine is known (bitnet.cpp's), its reduction shapes give short sums and its inputs are exactly what
was recorded; any other engine may sum in any order and carry more digits than it recorded.

An engine that computes in a 16-bit format, because it says so or because everything it recorded is in that format
(``crossval.audit.precision``), is held to its unit roundoff ``u`` wherever a tensor or an elementwise step is
rounded. Sums are not among these: every such engine carries them in binary32, and one that does not loses
``n u`` of a sum. What it recorded is what it had, so its inputs carry no error of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from crossval.formats import F16, F32, FORMATS, Dtype, Format
from crossval.model.ops import FloatArray, Op
from crossval.passes import Numerics

U = F32.unit_roundoff
"""Largest relative error of one rounding to binary32."""
U16 = F16.unit_roundoff
"""The same for binary16."""
TINY = F32.tiny
"""Smallest binary32 above zero: what underflow may lose."""
SECOND_ORDER = 1.02

NORMS = frozenset({"attn_norm", "attn_sub_norm", "ffn_norm", "ffn_sub_norm", "result_norm"})
ADDITIONS = frozenset({"ffn_inp", "l_out"})
BITLINEARS = frozenset({"q", "k", "v", "attn_o_out", "ffn_gate", "ffn_up", "ffn_down"})

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Arithmetic:
    """What is known about how an engine rounds."""

    numerics: Numerics
    n_heads: int
    """A single head takes another code path in bitnet.cpp."""
    recorded: Format = F32
    """What was recorded is in this format although the engine computes with more digits."""

    @property
    def known(self) -> bool:
        """Whether the engine states that it rounds as bitnet.cpp's family does, which is in binary32."""
        stated = self.numerics.simd_width is not None and self.numerics.fused_quantizer is not None
        return stated and not self.low

    @property
    def format(self) -> Format:
        """What tensors and elementwise steps are rounded to."""
        return FORMATS[self.numerics.compute_dtype or "f32"]

    @property
    def low(self) -> bool:
        """Whether that is a 16-bit format."""
        return self.format is not F32

    def sum_steps(self, n: int) -> float:
        """Roundings that one term of a sum of ``n`` may pass through."""
        width = self.numerics.simd_width
        # bitnet.cpp: one accumulator of W lanes and a tree at worst (llamafile sgemm); four in ggml_vec_dot_f16
        return n / width + np.log2(width) + 3 if width else float(n)

    def stored(self, exact: FloatArray) -> FloatArray | float:
        """Return what the rounding of a binary32 result to a 16-bit format may change; nothing in binary32."""
        form = self.format if self.low else self.recorded
        return 0.0 if form is F32 else form.unit_roundoff * np.abs(exact) + form.tiny

    def cached(self, op: Op, exact: FloatArray, recorded: Array) -> FloatArray | float:
        """Return what the stated format of keys and values may change of them, where they were recorded in it."""
        kv = FORMATS[self.numerics.kv_dtype or "f32"]
        if op.appends_to is None or kv is F32 or not kv.holds(recorded):
            return 0.0
        return kv.unit_roundoff * SECOND_ORDER * np.abs(exact) + kv.tiny


@dataclass(frozen=True)
class Reading:
    """One allowed choice of which inputs of an operation are rounded to a 16-bit format first."""

    name: str
    rounded: tuple[Dtype | None, ...]
    """For each array input: what to; None: it is read as it was recorded."""

    def apply(self, index: int, array: Array) -> Array:
        """Return an input as the operation reads it, float64; integers as they are."""
        return read_as(self.rounded[index], array)


def read_as(dtype: Dtype | None, array: Array) -> Array:
    """Return an array in float64, rounded to a format first unless that is None; integers as they are."""
    if dtype is not None:
        return FORMATS[dtype].round(array)
    return array.astype(np.float64, copy=False) if array.dtype.kind == "f" else array


def readings(op: Op, arithmetic: Arithmetic, n_tokens: int, n_rows: int) -> tuple[Reading, ...]:
    """Return the allowed readings of an operation: one where the engine's family is known.

    bitnet.cpp: Q and K in binary16 (a single head in a batch: K only), V in binary16, attention weights only in
    passes of one token, the head's input only when it multiplies one row (docs/numerics.md). An engine that states
    the format of its cache reads keys and values in that format and no other.
    """
    if op.name in ("kq", "kqv_out"):
        return _attention_readings(op.name == "kq", arithmetic, n_tokens == 1)
    if op.name == "result_output":
        rounded, plain = Reading("input in F16", ("f16",)), Reading("no F16", (None,))
        if arithmetic.known:
            return (rounded if n_rows == 1 else plain,)
        return (plain,) if arithmetic.low else (rounded, plain)
    return (Reading("", (None,) * len(op.inputs)),)


def _attention_readings(scores: bool, arithmetic: Arithmetic, single: bool) -> tuple[Reading, ...]:
    kv, plain = arithmetic.numerics.kv_dtype, Reading("no F16", (None, None))
    if kv == "f32" or (kv is None and arithmetic.low):  # a 16-bit engine's cache holds what was recorded
        return (plain,)
    cell: Dtype = kv or "f16"
    state = Reading(f"{'k' if scores else 'v'} in {cell.upper()}", (None, cell))
    both = Reading(f"{'q and k' if scores else 'weights and v'} in {cell.upper()}", (cell, cell))
    if arithmetic.known:
        with_both = single or arithmetic.n_heads > 1 if scores else single
        return (both if with_both else state,)
    found = (both, state) if scores else (state, both)
    return found if kv is not None else (*found, plain)


def bound(
    op: Op, inputs: Sequence[Array], expected: FloatArray, weights: Sequence[Any], arithmetic: Arithmetic
) -> FloatArray:
    """Return the largest allowed ``|recorded - expected|``, elementwise, for every op but BitLinear and the head.

    ``inputs`` are the arrays as the reading has them, float64; ``expected`` is the op's output on them.
    """
    allowed = _computed(op, inputs, expected, arithmetic)
    form = arithmetic.recorded
    if form is F32:
        return allowed
    rounded = form.unit_roundoff * np.abs(expected) + form.tiny
    return allowed + (input_error(op, inputs, expected, form) + rounded) * SECOND_ORDER


def _computed(op: Op, inputs: Sequence[Array], expected: FloatArray, arithmetic: Arithmetic) -> FloatArray:
    """Return the bound for inputs that the engine had as they were recorded."""
    size = np.abs(expected)
    if op.name == "inp_embd":  # F16 widened: exact, unless the engine's own format has fewer digits
        exact: FloatArray = np.abs(arithmetic.format.round(expected) - expected)
        return exact
    if arithmetic.low:
        return _low(op, inputs, expected, arithmetic)
    if op.name in NORMS:
        n = inputs[0].shape[-1]
        # half of: square, their sum, mean, + eps; then sqrt, reciprocal, product, product with the weight
        steps = 7.0 + (0.0 if arithmetic.known else n / 2)  # known: the sum is in binary64
        return steps * U * SECOND_ORDER * size + TINY
    special = _SPECIAL.get(op.name)
    if special is not None:
        return special(op, inputs, expected, None, arithmetic) * SECOND_ORDER + TINY
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
    frequency = op.parameter("base") ** (-np.arange(half) / half)
    angle_error = positions[:, None, None] * frequency * (3 * np.arange(half) + 4) * U
    pair = np.abs(x[..., :half]) + np.abs(x[..., half:])
    allowed: FloatArray = pair * (angle_error + 4 * U)  # cos or sin, two products, one addition
    return np.concatenate([allowed, allowed], axis=-1)


def _scores(op: Op, inputs: Sequence[Array], expected: FloatArray, _w: Any, a: Arithmetic) -> FloatArray:
    q, k = inputs
    terms = op.function(np.abs(q), np.abs(k))
    return (a.sum_steps(q.shape[-1]) + _carried(a)) * U * terms


def _softmax(op: Op, inputs: Sequence[Array], expected: FloatArray, _w: Any, a: Arithmetic) -> FloatArray:
    scores, positions = inputs
    scale = op.parameter("scale")
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
    return (a.sum_steps(weights.shape[-1]) + _carried(a)) * U * terms


def _carried(a: Arithmetic) -> float:
    """Return roundings of two factors and of their sum, where an engine may carry more digits than it records."""
    return 0.0 if a.known or a.low else 3.0


# --- 16-bit formats -------------------------------------------------------------------------------------------


def _low(op: Op, inputs: Sequence[Array], expected: FloatArray, a: Arithmetic) -> FloatArray:
    """Return the bound of one operation of an engine that computes in a 16-bit format."""
    u, tiny, size = a.format.unit_roundoff, a.format.tiny, np.abs(expected)
    if op.name in NORMS:
        return _low_norm(op, inputs[0], size, a)
    if op.name in ("q_rope", "k_rope"):
        return _low_rope(op, inputs, size, a)
    if op.name in ("kq", "kqv_out"):
        sums = (_scores if op.name == "kq" else _attend)(op, inputs, expected, None, a)
        allowed: FloatArray = (sums + u * size) * SECOND_ORDER + tiny
        return allowed
    if op.name == "kq_soft_max":
        return _low_softmax(op, inputs, expected, a)
    steps, fixed = one_rounding(a)  # additions, products, the square of ReLU
    return steps * size + fixed


def one_rounding(a: Arithmetic) -> tuple[float, float]:
    """Return what one rounding to the engine's format changes of a value that came through binary32.

    Returns:
        relative to the value, and added to that.
    """
    return a.format.unit_roundoff + 2 * U, a.format.tiny


def _low_norm(op: Op, x: Array, size: FloatArray, a: Arithmetic) -> FloatArray:
    u, tiny = a.format.unit_roundoff, a.format.tiny
    square = np.mean(x * x, axis=-1, keepdims=True) + op.parameter("eps")
    # half of: squares, mean, eps, its sum with the mean; then root, quotient, weight, product with the weight
    steps = 6.0 * u + x.shape[-1] / 2 * U
    # the same four, where they are subnormal, change the root by half of what they are off by
    steps = steps + 2 * tiny / square
    # a quotient below the normal numbers loses up to ``tiny``, times the weight
    with np.errstate(divide="ignore", invalid="ignore"):
        weight = np.nan_to_num(size * np.sqrt(square) / np.abs(x), posinf=0.0)
    allowed: FloatArray = steps * SECOND_ORDER * size + (1 + weight) * tiny
    return allowed


def _low_rope(op: Op, inputs: Sequence[Array], size: FloatArray, a: Arithmetic) -> FloatArray:
    x, positions = inputs
    u, tiny = a.format.unit_roundoff, a.format.tiny
    half = x.shape[-1] // 2
    frequency = op.parameter("base") ** (-np.arange(half) / half)
    angle = positions[:, None, None] * frequency
    first, second = np.abs(x[..., :half]), np.abs(x[..., half:])
    cos, sin = np.abs(np.cos(angle)), np.abs(np.sin(angle))
    # angles are carried in binary32, as in ``_rope``; cos and sin, both products and their sum are rounded
    either = (first + second) * angle * (3 * np.arange(half) + 4) * U + (first + second + 3) * tiny
    products = np.concatenate([first * cos + second * sin, first * sin + second * cos], axis=-1)
    allowed: FloatArray = (2 * u * products + u * size) * SECOND_ORDER + np.concatenate([either, either], axis=-1)
    return allowed


def _low_softmax(op: Op, inputs: Sequence[Array], expected: FloatArray, a: Arithmetic) -> FloatArray:
    scores, positions = inputs
    u, tiny, n = a.format.unit_roundoff, a.format.tiny, scores.shape[-1]
    visible = np.arange(n) <= positions[:, None]
    scaled = np.where(visible, scores * op.parameter("scale"), -np.inf)
    largest = scaled.max(axis=-1, keepdims=True)
    scaled = np.where(visible, scaled, largest)
    # absolute errors of the exponent: of the scale and the difference, in the difference; of both products
    argument = 2 * u * (largest - scaled) + u * (np.abs(scaled) + np.abs(largest)) + 3 * tiny
    summed = (expected * argument).sum(axis=-1, keepdims=True)
    # the exponential, the sum and the quotient are rounded; what underflows is lost whole
    allowed: FloatArray = expected * (np.expm1(argument + summed) + 3 * u + n * U)
    return np.where(visible, allowed * SECOND_ORDER + 2 * tiny + n * tiny * expected, 0.0)


# --- recorded with fewer digits than computed -----------------------------------------------------------------


def input_error(op: Op, inputs: Sequence[Array], expected: FloatArray, form: Format) -> FloatArray:
    """Return what one rounding of every input to a format may change of the output; first order."""
    u, size = form.unit_roundoff, np.abs(expected)
    if op.name == "inp_embd":
        return np.zeros_like(size)
    first, *others = (u * np.abs(x) + form.tiny for x in inputs if x.dtype.kind == "f")
    if op.name in ADDITIONS:
        changed: FloatArray = first + others[0]
    elif op.name in ("kq", "kqv_out", "ffn_out"):
        changed = op.function(first, np.abs(inputs[1])) + op.function(np.abs(inputs[0]), others[0])
    elif op.name == "ffn_act":
        changed = 2 * np.maximum(inputs[0], 0) * first + first**2
    elif op.name in ("q_rope", "k_rope"):
        half = first.shape[-1] // 2
        pair = first[..., :half] + first[..., half:]
        changed = np.concatenate([pair, pair], axis=-1)
    elif op.name == "kq_soft_max":
        seen = np.arange(first.shape[-1]) <= inputs[1][:, None]
        argument = np.where(seen, first * op.parameter("scale"), 0.0)
        changed = expected * np.expm1(argument + argument.max(axis=-1, keepdims=True))
    else:  # a norm: its input, and the root of the mean of their squares
        with np.errstate(divide="ignore", invalid="ignore"):
            weight = np.nan_to_num(size / np.abs(inputs[0]), posinf=0.0)
        changed = weight * first + u * size
    return changed


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
