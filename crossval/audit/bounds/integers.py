"""BitLinear in the integer domain: given equal int8 inputs the accumulator is exact, so equality is the test.

From the recorded float input the int8 codes are recomputed, from them the exact integer sums; the recorded
output is divided by its scales and must land on those integers. An engine that rounds its activations slightly
differently may put a value that lies within a few roundings of a tie on the other side; such flips are accepted
only when they explain every integer of the token exactly. An engine of unknown arithmetic may have multiplied with
dequantised weights, so that its sums are binary32 sums: near the integer, not on it, but nearer than to any other.

An engine that computes in a 16-bit format had exactly the input it recorded, but rounds its output, so integers
can no longer be read from it; and it may round its scale, its scaled values or its dequantised activations to that
format, too. Each of these *recipes* gives definite codes, hence a definite output, which the few roundings after
the sum bound: the format costs tightness of the output, not knowledge of the codes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt

from crossval.audit.bounds.arithmetic import SECOND_ORDER, TINY, Arithmetic, U
from crossval.formats import F32, FORMATS, Format, to_f32
from crossval.model.kinds import FloatArray, TernaryMatrix, accumulate, quantize_activations

TIE_DISTANCE = 127 * 4 * U
"""Scaled activations reach 127 and pass at most four roundings (scale twice, product, sum)."""
RESCALE_STEPS = 5.0
"""Roundings of the rescale: the integer's conversion, two scales, two products."""
HALF_UNIT = 0.49
"""Most that a binary32 sum may be off, in units of the integer: beyond it another integer is nearer."""
MOST_FLIPS = 24
"""Candidates for a flip in one token; more than this are not searched (0.15 are expected among 2560 values)."""


@dataclass(frozen=True)
class BitLinearCheck:
    """``expected`` and ``bound`` ``(n_tokens, rows)`` with explained flips already granted."""

    expected: FloatArray
    bound: FloatArray
    flips: int
    multiplied: FloatArray | None = None
    """Of a 16-bit engine: what the signs are multiplied with, ``(n_tokens, cols)``, without the flips."""
    scale: FloatArray | None = None
    """And what that is divided by, ``(n_tokens, 1)``."""


def check(
    x: npt.NDArray[np.float32],
    recorded: npt.NDArray[np.floating[Any]],
    weight: TernaryMatrix,
    arithmetic: Arithmetic,
    added: FloatArray,
) -> BitLinearCheck:
    """Compare a recorded product ``(n_tokens, rows)`` with the exact one of its recorded input.

    ``x``: float32 ``(n_tokens, cols)``, as the engine had it. ``added``: what else ``recorded`` may be off by,
    because it is what is left of something that was rounded.
    """
    if arithmetic.low:
        return _check_low(x, recorded, weight, arithmetic, added)
    codes, scale, scaled = quantize(x, arithmetic)
    if arithmetic.lost is not F32:  # the integers are no longer there to be read, the codes are
        recipe = _Recipe(codes.astype(np.float64), scale, scaled, None, False, ONE_RESCALE)
        with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
            wide, signs = recorded.astype(np.float64), weight.signs.astype(np.float64)
            return _by_recipe(recipe, wide, signs, weight.scale, arithmetic.lost, added)
    sums = accumulate(codes, weight).astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        found = recorded.astype(np.float64) * scale / weight.scale
        off = np.rint(found - sums)
    flips = 0
    for token in np.flatnonzero((off != 0).any(axis=-1)):
        moved = _explain(off[token], codes[token], scaled[token], weight)
        if not moved and not arithmetic.known:
            moved = _explain_halves_away(off[token], codes[token], scaled[token], weight)
        if moved:
            sums[token] += off[token]
            flips += moved
    expected = sums / scale * weight.scale
    bound = RESCALE_STEPS * U * SECOND_ORDER * np.abs(expected) + TINY + added
    if not arithmetic.known:
        magnitudes = np.abs(codes.astype(np.float64)).sum(axis=-1, keepdims=True)
        bound += np.minimum(codes.shape[-1] * U * magnitudes, HALF_UNIT) / scale * weight.scale
        few = FORMATS[arithmetic.numerics.accumulate or "f32"]
        if few is not F32:
            bound += codes.shape[-1] * few.unit_roundoff * magnitudes / scale * weight.scale
    return BitLinearCheck(expected, bound, flips)


def quantize(
    x: npt.NDArray[np.floating[Any]], arithmetic: Arithmetic
) -> tuple[npt.NDArray[np.int8], FloatArray, FloatArray]:
    """Return codes, scale per token (last axis 1) and the scaled values before rounding.

    Known families: bitnet.cpp ``quantize_row_i8_s``, the scale rounded to binary32 and the product too, unless
    compiled into one fused step. Main since July 2026 has no least magnitude (an all-zero row has scale 0, here 1)
    and rounds halves away from zero.
    """
    wide = x.astype(np.float64)
    if arithmetic.is_main:
        return _quantize_main(wide)
    if not arithmetic.known:
        codes, scale = quantize_activations(wide)
        return codes, scale, wide * scale
    absmax = np.abs(wide).max(axis=-1, keepdims=True)
    scale = (127.0 / np.maximum(absmax, 1e-5)).astype(np.float32).astype(np.float64)
    product = wide * scale  # two binary32 factors: exact in binary64
    if not arithmetic.numerics.fused_quantizer:
        product = product.astype(np.float32).astype(np.float64)
    with np.errstate(invalid="ignore"):
        return np.clip(np.rint(product), -128, 127).astype(np.int8), scale, product


def _quantize_main(x: FloatArray) -> tuple[npt.NDArray[np.int8], FloatArray, FloatArray]:
    absmax = np.abs(x).max(axis=-1, keepdims=True)
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        scale = np.where(absmax == 0, 1.0, to_f32(127.0 / absmax))
        product = to_f32(x * scale)
        return np.clip(half_away(product), -128, 127).astype(np.int8), scale, product


def half_away(x: FloatArray) -> FloatArray:
    """Round to the nearest integer, halves away from zero."""
    return np.trunc(x + np.copysign(0.5, x))


def _explain(off: FloatArray, codes: npt.NDArray[np.int8], scaled: FloatArray, weight: TernaryMatrix) -> int:
    """Return how many activations near a tie, moved to its other side, give exactly these integers; 0: none do."""
    if not np.isfinite(off).all():
        return 0
    fraction = scaled - np.floor(scaled)
    near = np.flatnonzero(np.abs(fraction - 0.5) <= TIE_DISTANCE)
    if not 0 < near.size <= MOST_FLIPS:
        return 0
    other_side = np.where(codes[near] > scaled[near], -1.0, 1.0)
    columns = weight.signs[:, near].astype(np.float64) * other_side
    moved = np.rint(np.linalg.lstsq(columns, off, rcond=None)[0])
    if ((moved == 0) | (moved == 1)).all() and np.array_equal(columns @ moved, off):
        return int(moved.sum())
    return 0


def _explain_halves_away(
    off: FloatArray, codes: npt.NDArray[np.int8], scaled: FloatArray, weight: TernaryMatrix
) -> int:
    """Return the same for an engine that rounds every half away from zero, however many there are."""
    away = np.clip(half_away(scaled), -128, 127)
    moved = away - codes
    at = np.flatnonzero(moved)
    if not at.size or not np.isfinite(off).all():
        return 0
    left = off - weight.signs[:, at].astype(np.float64) @ moved[at]
    if not left.any():
        return int(at.size)
    more = _explain(left, away.astype(np.int8), scaled, weight)
    return int(at.size) + more if more else 0


# --- 16-bit formats -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Recipe:
    """One way from a recorded activation to what is multiplied with the signs."""

    codes: FloatArray
    """``(n_tokens, cols)``, integers."""
    scale: FloatArray
    scaled: FloatArray
    """Before rounding to integers."""
    dequantised: Format | None
    """Activations are brought back to their size in this format before they are multiplied; None: they are not."""
    exact_ties: bool
    """Whether ``scaled`` is what the engine had to the last bit, so that nothing can fall the other way."""
    steps: float
    """Roundings to the format after the sum."""

    def of(self, tokens: slice) -> _Recipe:
        """Return the same for some of the tokens."""
        return replace(self, codes=self.codes[tokens], scale=self.scale[tokens], scaled=self.scaled[tokens])

    def values(self, token: slice | int, codes: FloatArray) -> FloatArray:
        """Return what is multiplied, in units of the codes."""
        scale = self.scale[token]
        return codes if self.dequantised is None else self.dequantised.round(codes / scale) * scale


ONE_RESCALE = 1.0
"""Roundings after a sum in binary32 whose result was only stored in the format."""
RESCALES = 4.0
"""Roundings after the sum where nothing is in binary32: the sum, the weight's scale, two products."""
FUSED_RESCALES = 2.0
"""The same where the scale is in binary32: at most the sum, if that leaves the kernel, and the result."""
MOST_ENUMERATED = 8
"""Activations near a tie in one token whose combinations are all tried; of more, only the nearest to a tie."""


def _scalings(x: FloatArray, form: Format) -> Iterator[tuple[FloatArray, FloatArray, bool]]:
    """Yield scale, scaled values and whether these are what the engine had to the last bit, for each way to them.

    The scale is ``127 / max|x|``, the same as PyTorch computes it (the reciprocal times 127, both rounded), or its
    reciprocal, which is divided by; it and the scaled values are rounded to the format or kept in binary32 (or
    with more digits: where values of few digits meet a tie exactly, the two differ).
    """
    absmax = np.maximum(np.abs(x).max(axis=-1, keepdims=True), 1e-5)
    plain = 127.0 / absmax
    single = to_f32(plain)
    yield single, to_f32(x * single), False
    yield plain, x * plain, False
    for scale in (form.round(plain), form.round(form.round(1.0 / absmax) * 127.0)):
        yield scale, x * scale, True
        yield scale, form.round(x * scale), True
    step = form.round(absmax / 127.0)
    yield 1.0 / step, x / step, True
    yield 1.0 / step, form.round(x / step), True


def _recipes(x: FloatArray, form: Format) -> Iterator[_Recipe]:
    """Yield every recipe of this format, the one without its roundings first.

    After each scaling halves go to even or away from zero; then integers are multiplied, or activations
    dequantised into the format first. A scale that is too large for the format explains nothing: it is NaN, and
    nothing is near what follows from it.
    """
    packed = []
    for found, scaled, exact in _scalings(x, form):
        scale = np.where(np.isfinite(found), found, np.nan)
        even, away = (np.clip(codes, -128, 127) for codes in (np.rint(scaled), half_away(scaled)))
        for codes in (even,) if np.array_equal(even, away, equal_nan=True) else (even, away):
            packed.append(_Recipe(codes, scale, scaled, None, exact, RESCALES if exact else FUSED_RESCALES))
            yield packed[-1]
    yield from (replace(recipe, dequantised=form, steps=RESCALES) for recipe in packed)


def _check_low(
    x: npt.NDArray[np.float32],
    recorded: npt.NDArray[np.floating[Any]],
    weight: TernaryMatrix,
    arithmetic: Arithmetic,
    added: FloatArray,
) -> BitLinearCheck:
    """Try the recipes of the engine's format; return the first that fits, else the first."""
    form, given = arithmetic.format, [x.astype(np.float64)]
    if not form.holds(x):  # more digits: as it is, or rounded first
        given.append(form.round(given[0]))
    signs, wide = weight.signs.astype(np.float64), recorded.astype(np.float64)
    added = np.broadcast_to(added, wide.shape)

    def tried(recipe: _Recipe, tokens: slice) -> tuple[BitLinearCheck, npt.NDArray[np.bool_]]:
        found = _by_recipe(recipe.of(tokens), wide[tokens], signs, weight.scale, form, added[tokens])
        return found, np.abs(wide[tokens] - found.expected) <= found.bound

    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        recipes = (recipe for values in given for recipe in _recipes(values, form))
        first, fits = tried(next(recipes), slice(None))
        if fits.all():
            return first
        token = int(fits.sum(axis=-1).argmin())
        for recipe in recipes:
            if tried(recipe, slice(token, token + 1))[1].all():  # else it does not fit as a whole
                found, fits = tried(recipe, slice(None))
                if fits.all():
                    return found
    return first


def _by_recipe(
    recipe: _Recipe, recorded: FloatArray, signs: FloatArray, weight_scale: float, form: Format, added: FloatArray
) -> BitLinearCheck:
    everything = recipe.values(slice(None), recipe.codes)
    sums = everything @ signs.T
    unit = weight_scale / recipe.scale  # of the output, for one of a sum
    # the sum in binary32 of what is no integer, or of dequantised weights; then what is subnormal on the way
    fixed = np.minimum(everything.shape[-1] * U * np.abs(everything).sum(axis=-1, keepdims=True), HALF_UNIT) * unit
    fixed = fixed + form.tiny * (1 + weight_scale + unit) + added
    relative = (recipe.steps * form.unit_roundoff + RESCALE_STEPS * U) * SECOND_ORDER
    flips = 0
    if not recipe.exact_ties:
        beyond = np.abs(recorded - sums * unit) > relative * np.abs(sums * unit) + fixed
        for token in np.flatnonzero(beyond.any(axis=-1)):
            allowed = fixed[token] / unit[token]
            moved = _explain_rounded(recorded[token] / unit[token], int(token), recipe, signs, relative, allowed)
            if moved is not None:
                flips, sums[token] = flips + moved[0], moved[1]
    expected = sums * unit
    bound = relative * np.abs(expected) + fixed
    return BitLinearCheck(expected, bound, flips, everything, recipe.scale)


def _explain_rounded(
    found: FloatArray, token: int, recipe: _Recipe, signs: FloatArray, relative: float, fixed: FloatArray
) -> tuple[int, FloatArray] | None:
    """Return how many activations near a tie, moved to its other side, bring all sums of a token within bounds.

    ``found``: the recorded output in units of the sums, which are returned as they then are; None: no choice does.
    """
    scaled, codes = recipe.scaled[token], recipe.codes[token]
    distance = np.abs(scaled - np.floor(scaled) - 0.5)
    near = np.argsort(distance, kind="stable")[:MOST_ENUMERATED]
    near = near[distance[near] <= TIE_DISTANCE]
    if near.size == 0:
        return None
    other = codes.copy()
    other[near] += np.where(codes[near] > scaled[near], -1.0, 1.0)
    values, others = recipe.values(token, codes), recipe.values(token, other)
    columns = signs[:, near] * (others - values)[near]
    choices = np.array(list(product((0.0, 1.0), repeat=near.size)))[1:]
    sums = signs @ values + choices @ columns.T  # (choices, rows)
    fits = (np.abs(found - sums) <= relative * np.abs(sums) + fixed).all(axis=-1)
    if not fits.any():
        return None
    best = np.flatnonzero(fits)[np.argmin(choices[fits].sum(axis=-1))]
    return int(choices[best].sum()), sums[best]


# --- recorded with fewer digits than computed -----------------------------------------------------------------


def check_recorded(
    x: npt.NDArray[np.float32], weight: TernaryMatrix, arithmetic: Arithmetic, form: Format, added: FloatArray
) -> BitLinearCheck:
    """Return expected product and bound where the input is known to ``form`` only: codes near a tie may be others.

    An input off by ``u``, over a largest value off by ``u``, is scaled to within ``2u`` of it; as far as that
    reaches over ties, a code may be off by as many, all in the worst direction.
    """
    codes, scale, scaled = quantize(x, arithmetic)
    u = form.unit_roundoff
    with np.errstate(invalid="ignore"):
        reach = (2 * u * np.abs(scaled) + form.tiny * scale) * SECOND_ORDER + TIE_DISTANCE
        moves = np.maximum(np.rint(scaled + reach) - np.rint(scaled), np.rint(scaled) - np.rint(scaled - reach))
    expected = accumulate(codes, weight) / scale * weight.scale
    worst = moves @ np.abs(weight.signs.T).astype(np.float64) / scale * weight.scale
    bound = worst + (2 * u + RESCALE_STEPS * U) * SECOND_ORDER * np.abs(expected) + form.tiny
    sums = np.abs(codes.astype(np.float64)).sum(axis=-1, keepdims=True)
    bound = bound + np.minimum(codes.shape[-1] * U * sums, HALF_UNIT) / scale * weight.scale
    return BitLinearCheck(expected, bound + added, 0)
