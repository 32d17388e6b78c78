"""How rounding errors travel through several operations whose results an engine did not record.

A *segment* is a run of operations between recorded tensors. The specification computes it in float64, and beside
every value an elementwise bound on how far a correct engine's value may be from it, to first order: what the
inputs may be off by, carried through the operation, plus the operation's own roundings.

Two things keep these bounds near the rounding level, whatever the length of a segment. A quantiser and a rounding
to binary16 *reset* the error: the codes are equal unless a value lies so near a tie that its error reaches across.
And an error that all values of a token share as one factor (the reciprocal root of a norm, the step size of a
quantiser) is carried apart, because the next norm or quantiser divides it out again.

Errors come in three kinds. *Noise*: roundings of different elements are independent and point either way, so in
sums they add as squares; a bound is ``SIGMAS`` standard deviations. (A worst case carried through every dot
product would grow by a factor of forty in each attention.)
The few roundings of one element may all point one way: they are added up. *Jumps*: a value that may lie on the
other side of a binary16 tie moves by a whole step. Jumps of different values add as squares, too, but what one of
them moves it moves together, so that they do not average out in a norm; ``JUMPS`` steps are allowed for each,
because a few may all point one way. *Shared*: see above.

Sums are bounded as they are likely to round, too: a sum of ``n`` terms passes through
partial sums of about ``norm(terms) * sqrt(k / n)``, each rounded by at most ``U`` of itself with errors of either
sign, which adds up to a standard deviation of ``U * norm(terms) * sqrt(n / 6)``; of terms of one sign to
``U * sum * sqrt(n) / 3``. ``SIGMAS`` times that is allowed (N. Higham, T. Mary, "A new approach to probabilistic
rounding error analysis", SIAM J. Sci. Comput. 41, 2019: in float32 the signs behave as if they were independent).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from crossval.audit import bitlinear, bounds
from crossval.audit.bounds import TINY, Arithmetic, U
from crossval.formats import F32, FORMATS, Dtype
from crossval.model.ops import HEAD_CHUNK_ROWS, FloatArray, Op, accumulate, rms_norm

SIGMAS = 8.0
RANDOM_SIGNS = SIGMAS / math.sqrt(6.0)
"""Times ``U * sqrt(n)`` and the norm of the terms: a sum of terms of either sign."""
ONE_SIGN = SIGMAS / 3.0
"""Times ``U * sqrt(n)`` and the sum: terms of one sign."""
JUMPS = 2.0
"""Steps of binary16 that a value near a tie counts for: two jumps of one size and sign are twice one."""

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Approx:
    """Values and how far a correct engine's may be from them. Axis 0 counts tokens, but for scores."""

    value: Array
    """float64; token ids and positions: integers."""
    noise: FloatArray
    """Independent errors, elementwise; shaped as ``value``."""
    jump: FloatArray
    """Errors that the elements of a token may have together; shaped as ``value``."""
    shared: FloatArray
    """Relative difference that all values of a token have in common, ``(n_tokens,)``; of scores zero."""

    @property
    def error(self) -> FloatArray:
        """Largest difference, elementwise, but for what is shared."""
        found: FloatArray = self.noise + self.jump
        return found

    @property
    def total(self) -> FloatArray:
        """Largest difference, elementwise."""
        return self.error + self.common

    @property
    def common(self) -> FloatArray:
        """The shared error, elementwise."""
        if not self.shared.any():
            return np.zeros_like(self.noise)
        with np.errstate(over="ignore", invalid="ignore"):
            found: FloatArray = np.abs(self.value) * self.shared.reshape(-1, *[1] * (self.value.ndim - 1))
        return found

    def rows(self, index: Sequence[int] | npt.NDArray[np.intp], axis: int) -> Approx:
        """Return some of the tokens."""
        value, noise, jump = (np.take(array, index, axis=axis) for array in (self.value, self.noise, self.jump))
        return Approx(value, noise, jump, self.shared if axis else np.take(self.shared, index))


@dataclass(frozen=True)
class Ties:
    """The activations of a quantised tensor that a correct engine may round to either side."""

    rows: npt.NDArray[np.intp]
    """Row of the pass of each, ``(n_ties,)``."""
    features: npt.NDArray[np.intp]
    nearness: FloatArray
    """Distance to the tie over the largest that is possible: 0 on the tie, 1 just within reach."""


Flips = Mapping[tuple[str, int], frozenset[int]]
"""(quantised tap, row of the pass) -> features that are rounded to the other side of their tie."""


def exact(array: Array) -> Approx:
    """Wrap values that an engine has exactly as recorded; floats are widened to float64."""
    wide = array.astype(np.float64, copy=False) if array.dtype.kind == "f" else array
    nothing = np.zeros(array.shape)
    return Approx(wide, nothing, nothing, np.zeros(array.shape[:1]))


def recorded(array: Array, arithmetic: Arithmetic) -> Approx:
    """Wrap recorded values: an engine of unknown arithmetic may have carried more digits than it recorded.

    One that computes in a 16-bit format had what it recorded.
    """
    found, form = exact(array), arithmetic.recorded
    if array.dtype.kind != "f" or (form is F32 and (arithmetic.known or arithmetic.low)):
        return found
    return replace(found, noise=form.unit_roundoff * np.abs(found.value) + (0.0 if form is F32 else form.tiny))


def round_to(dtype: Dtype | None, x: Approx) -> Approx:
    """Round to a 16-bit format: equal, unless the error reaches across a tie. None: leave it."""
    if dtype is None:
        return x
    rounded, total = FORMATS[dtype].round, x.total
    value = rounded(x.value)
    step = np.maximum(np.abs(rounded(x.value + total) - value), np.abs(rounded(x.value - total) - value))
    return Approx(value, np.zeros_like(value), JUMPS * step, np.zeros_like(x.shared))


def random_sum(n: int, length: Array, result: Array, arithmetic: Arithmetic) -> FloatArray:
    """Return the likely error of sums of ``n`` terms of either sign; ``length`` is the norm of the terms."""
    n = max(1, math.ceil(arithmetic.sum_steps(n)))
    allowed: FloatArray = RANDOM_SIGNS * math.sqrt(n) * U * (length + np.abs(result))
    return allowed


# --- operations -----------------------------------------------------------------------------------------------


def propagate(op: Op, inputs: Sequence[Approx], weights: Sequence[Any], arithmetic: Arithmetic) -> Approx:
    """Compute an operation other than BitLinear with its error; inputs are rounded to binary16 already.

    Raises:
        KeyError: an operation without a rule.
    """
    rule = _RULES[op.name]
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        found = rule(op, inputs, weights, arithmetic)
        if not arithmetic.low:
            return found
        # the roundings of a 16-bit format are more than those of binary32, which are in there too
        values = [x.value for x in inputs]
        if op.name == "result_output":
            own = bounds.head_bound(values[0], bounds.row_norms(weights[0]), arithmetic, found.value)
        else:
            own = bounds.bound(op, values, found.value, weights, arithmetic)
        return replace(found, noise=np.hypot(found.noise, own))


def propagate_bitlinear(
    op: Op, x: Approx, rows: Sequence[int], weights: Sequence[Any], arithmetic: Arithmetic, flips: Flips
) -> tuple[Approx, Ties]:
    """Compute a BitLinear with its error, and the activations near a tie.

    ``x`` ``(n_rows, ...)`` covers the ``rows`` of the pass; ``flips`` go to the other side of their tie.
    """
    weight = weights[0]
    tap = op.inputs[0]
    n_rows = x.value.shape[0]
    flat = x.value.reshape(n_rows, -1)
    codes, scale, scaled = bitlinear.quantize(flat, arithmetic)
    codes = codes.astype(np.float64)
    magnitude, error = np.abs(flat), x.error.reshape(n_rows, -1)
    absmax = np.maximum(magnitude.max(axis=-1, keepdims=True), np.finfo(np.float64).tiny)
    # how far the largest magnitude may be off: whatever may be the largest in the engine
    reach = np.max(magnitude + error, axis=-1, keepdims=True)
    of_scale = np.max(np.where(magnitude + error >= absmax, error, 0.0), axis=-1, keepdims=True)
    of_scale = np.maximum(of_scale, reach - absmax) / absmax
    window = np.abs(scaled) * (4 * U + of_scale) + error * scale
    distance = np.abs(scaled - np.floor(scaled) - 0.5)
    if arithmetic.low:  # scale and scaled values may be rounded to the format
        window = window + 2 * arithmetic.format.unit_roundoff * np.abs(scaled)
    at, features = np.nonzero(distance <= window)
    ties = Ties(np.asarray(rows, np.intp)[at], features, distance[at, features] / window[at, features])
    for (flipped, row), wanted in flips.items():
        if flipped == tap and row in rows:
            i, js = rows.index(row), list(wanted)
            codes[i, js] += np.where(codes[i, js] > scaled[i, js], -1.0, 1.0)
    sums = accumulate(np.clip(codes, -128, 127).astype(np.int8), weight).astype(np.float64)
    value = sums / scale * weight.scale
    allowed = bitlinear.RESCALE_STEPS * U * np.abs(value) + TINY
    if not arithmetic.known:
        # sums of binary32 products: of codes, or of what they stand for
        length = np.sqrt(np.sum(codes * codes, axis=-1, keepdims=True))
        likely = random_sum(codes.shape[-1], length, sums, arithmetic)
        allowed = allowed + np.minimum(likely, bitlinear.HALF_UNIT) / scale * weight.scale
    if arithmetic.low:
        form = arithmetic.format
        allowed = allowed + bitlinear.RESCALES * form.unit_roundoff * np.abs(value) + form.tiny
    shape = (n_rows, -1) if op.output.endswith(_FLAT) else (n_rows, *_heads(op), -1)
    value, allowed = value.reshape(shape), allowed.reshape(shape)
    return Approx(value, allowed, np.zeros_like(value), x.shared + of_scale[:, 0]), ties


_FLAT = ("attn_o_out", "ffn_gate", "ffn_up", "ffn_down")


def _heads(op: Op) -> tuple[int, ...]:
    return (op.parameter("n_heads"),)


def _embed(op: Op, inputs: Sequence[Approx], weights: Sequence[Any], a: Arithmetic) -> Approx:
    return exact(op.function(inputs[0].value, *weights))


def _norm(op: Op, inputs: Sequence[Approx], weights: Sequence[Any], a: Arithmetic) -> Approx:
    x, weight = inputs[0], np.asarray(weights[0], np.float64)
    eps = op.parameter("eps")
    n = x.value.shape[-1]
    value = rms_norm(x.value, weight, eps=eps)
    square = np.mean(x.value * x.value, axis=-1) + eps
    of_square = np.sqrt(np.sum((x.value * x.noise) ** 2, axis=-1)) / n
    of_square += np.mean(np.abs(x.value) * x.jump + x.error**2, axis=-1)
    rounding = (4.0 + (0.0 if a.known else ONE_SIGN / 2 * math.sqrt(n))) * U
    shared = x.shared * eps / square + of_square / square + rounding
    gain = np.abs(weight) / np.sqrt(square)[..., None]
    return Approx(value, x.noise * gain + 3 * U * np.abs(value) + TINY, x.jump * gain, shared)


def _rope(op: Op, inputs: Sequence[Approx], weights: Sequence[Any], a: Arithmetic) -> Approx:
    x, positions = inputs
    value = op.function(x.value, positions.value)
    half = x.value.shape[-1] // 2
    base = op.parameter("base")
    angle = positions.value[:, None, None] * base ** (-np.arange(half) / half)
    cos, sin = np.abs(np.cos(angle)), np.abs(np.sin(angle))
    (n1, n2), (j1, j2) = ((e[..., :half], e[..., half:]) for e in (x.noise, x.jump))
    noise = np.concatenate([n1 * cos + n2 * sin, n1 * sin + n2 * cos], axis=-1)
    jump = np.concatenate([j1 * cos + j2 * sin, j1 * sin + j2 * cos], axis=-1)
    own = bounds.bound(op, [x.value, positions.value], value, (), a)
    return Approx(value, noise + own, jump, x.shared)


def _scores(op: Op, inputs: Sequence[Approx], weights: Sequence[Any], a: Arithmetic) -> Approx:
    q, k = inputs
    dot = op.function
    value = dot(q.value, k.value)
    carried = dot(q.value**2 + q.noise**2, k.noise**2) + dot(q.noise**2, k.value**2)
    length = np.sqrt(dot(q.value**2, k.value**2))
    own = random_sum(q.value.shape[-1], length, value, a)
    jump = np.sqrt(dot(q.value**2 + q.jump**2, k.jump**2) + dot(q.jump**2, k.value**2))
    jump += np.abs(value) * (q.shared[:, None] + k.shared)
    return Approx(value, np.sqrt(carried + own * own) + TINY, jump, np.zeros(1))


def _softmax(op: Op, inputs: Sequence[Approx], weights: Sequence[Any], a: Arithmetic) -> Approx:
    scores, positions = inputs
    scale = op.parameter("scale")
    value = op.function(scores.value, positions.value)
    visible = np.arange(value.shape[-1]) <= positions.value[:, None]
    size, noise, jump = (
        np.where(visible, x * scale, 0.0) for x in (np.abs(scores.value), scores.noise, scores.jump)
    )
    noise = noise + 4 * U * (size + size.max(axis=-1, keepdims=True))
    # a key's weight moves by its own argument and, the other way, by the average of all: a single key by nothing
    average = np.sqrt(np.sum((value * noise) ** 2, axis=-1, keepdims=True))
    rounding = (16 + ONE_SIGN * math.sqrt(value.shape[-1])) * U
    noise = value * (np.maximum(noise * (1 - 2 * value) + average, 0.0) + rounding) + 2.0**-126
    average = np.sqrt(np.sum((value * jump) ** 2, axis=-1, keepdims=True))
    jump = value * np.maximum(jump * (1 - 2 * value) + average, 0.0)
    return Approx(value, np.where(visible, noise, 0.0), jump, np.zeros(1))


def _attend(op: Op, inputs: Sequence[Approx], weights: Sequence[Any], a: Arithmetic) -> Approx:
    p, v = inputs
    attend = op.function
    value = attend(p.value, v.value)
    carried = attend(p.value**2 + p.noise**2, v.noise**2) + attend(p.noise**2, v.value**2)
    length = np.sqrt(attend(p.value**2, v.value**2))
    own = random_sum(p.value.shape[-1], length, value, a)
    jump = np.sqrt(attend(p.value**2 + p.jump**2, v.jump**2 + v.common**2) + attend(p.jump**2, v.value**2))
    return Approx(value, np.sqrt(carried + own * own) + TINY, jump, np.zeros(value.shape[:1]))


def _act(op: Op, inputs: Sequence[Approx], weights: Sequence[Any], a: Arithmetic) -> Approx:
    x = inputs[0]
    value = op.function(x.value)
    noise, jump = ((2 * np.maximum(x.value, 0.0) + e) * e for e in (x.noise, x.jump))
    return Approx(value, noise + _own(value, a), jump, 2 * x.shared)


def _multiply(op: Op, inputs: Sequence[Approx], weights: Sequence[Any], a: Arithmetic) -> Approx:
    x, y = inputs
    value = op.function(x.value, y.value)
    noise = np.abs(x.value) * y.noise + np.abs(y.value) * x.noise + x.noise * y.noise
    jump = np.abs(x.value) * y.jump + np.abs(y.value) * x.jump + x.jump * y.jump
    return Approx(value, noise + _own(value, a), jump, x.shared + y.shared)


def _add(op: Op, inputs: Sequence[Approx], weights: Sequence[Any], a: Arithmetic) -> Approx:
    x, y = inputs
    value = op.function(x.value, y.value)
    noise = x.noise + y.noise + _own(value, a)
    return Approx(value, noise, x.jump + x.common + y.jump + y.common, np.zeros(value.shape[:1]))


def _head(op: Op, inputs: Sequence[Approx], weights: Sequence[Any], a: Arithmetic) -> Approx:
    x, table = inputs[0], weights[0]
    value = op.function(x.value, table)
    squares = _times_squares(np.concatenate([x.value**2, x.noise**2 + x.jump**2]), table)
    length, carried = np.sqrt(squares[: len(value)]), squares[len(value) :]
    own = random_sum(x.value.shape[-1], length, value, a)
    return Approx(value, np.sqrt(carried + own * own) + TINY, np.zeros_like(value), x.shared)


def _times_squares(x: FloatArray, table: Array) -> FloatArray:
    """Multiply with the squares of a large table's rows, some rows at a time."""
    starts = range(0, table.shape[0], HEAD_CHUNK_ROWS)
    parts = [x @ (table[s : s + HEAD_CHUNK_ROWS].astype(np.float64) ** 2).T for s in starts]
    return np.concatenate(parts, axis=-1)


def _own(value: FloatArray, a: Arithmetic) -> FloatArray:
    """Return the rounding of an elementwise result; of three where the engine may work in other steps."""
    allowed: FloatArray = (1.0 if a.known else 3.0) * U * np.abs(value) + TINY
    return allowed


_RULES: dict[str, Callable[[Op, Sequence[Approx], Sequence[Any], Arithmetic], Approx]] = {
    "inp_embd": _embed,
    "q_rope": _rope,
    "k_rope": _rope,
    "kq": _scores,
    "kq_soft_max": _softmax,
    "kqv_out": _attend,
    "ffn_act": _act,
    "ffn_out": _multiply,
    "result_output": _head,
    **dict.fromkeys(bounds.NORMS, _norm),
    **dict.fromkeys(bounds.ADDITIONS, _add),
}
