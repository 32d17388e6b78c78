"""A BitLinear, by itself and inside a segment, where its input has an error that may reach across a rounding tie.

A bias is no part of the integers: it is subtracted from what was recorded, and its own roundings are allowed for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from crossval.audit.bounds import blocks, floats, integers
from crossval.audit.bounds.approx import Approx, Flips, Ties, random_sum
from crossval.audit.bounds.arithmetic import SECOND_ORDER, TINY, Arithmetic, U
from crossval.formats import F32, Format
from crossval.model.kinds import BitLinear, FloatArray, TernaryMatrix, accumulate
from crossval.model.op import Op


def check_bitlinear(
    x: npt.NDArray[np.float32],
    recorded: npt.NDArray[np.float32],
    weights: Sequence[Any],
    arithmetic: Arithmetic,
    form: Format = F32,
) -> integers.BitLinearCheck:
    """Compare a recorded output ``(n_tokens, rows)`` with the one of its recorded input ``(n_tokens, cols)``.

    ``weights``: the matrix and the bias, if there is one. ``form``: in which the input was recorded.
    """
    weight, *biases = weights
    bias = biases[0] if biases else np.zeros(1)
    with np.errstate(invalid="ignore", over="ignore"):
        product = recorded - bias if biases else recorded
        added = _after_product(product, weights, arithmetic)
        for lost in {form, arithmetic.lost} - {F32} if biases else ():
            added = added + lost.unit_roundoff * np.abs(recorded) + lost.tiny
        found = _check_product(x, product, weight, arithmetic, form, added)
    return replace(found, expected=found.expected + bias) if biases else found


def _after_product(product: npt.NDArray[Any], weights: Sequence[Any], arithmetic: Arithmetic) -> FloatArray:
    """Return what is rounded after a product: the one with another factor, the sum with a bias.

    In a 16-bit format, factor and bias are rounded to it, too.
    """
    weight, *biases = weights
    allowed = np.zeros((1, 1))
    u, low = arithmetic.format.unit_roundoff, arithmetic.low
    if weight.factor != 1:
        allowed = allowed + (2 * u + U if low else U) * np.abs(product)
    for bias in biases:
        allowed = allowed + ((u + U) * np.abs(product + bias) if low else U * np.abs(product + bias)) + TINY
        allowed = allowed + (u * np.abs(bias) + arithmetic.format.tiny if low else 0.0)
    found: FloatArray = allowed * SECOND_ORDER
    return found


def _check_product(
    x: npt.NDArray[np.float32],
    recorded: npt.NDArray[Any],
    weight: TernaryMatrix,
    arithmetic: Arithmetic,
    form: Format,
    added: FloatArray,
) -> integers.BitLinearCheck:
    if floats.is_float(arithmetic):
        return floats.check(x, recorded, weight, arithmetic, added)
    if form is not F32:
        return integers.check_recorded(x, weight, arithmetic, form, added)
    if not blocks.is_blocked(arithmetic, x.shape[1]):
        return integers.check(x, recorded, weight, arithmetic, added)
    quantized = blocks.quantize(x, arithmetic)
    expected, allowed = blocks.multiply(quantized, weight)
    allowed = allowed + arithmetic.stored(expected)
    return integers.BitLinearCheck(expected, allowed + added, 0, quantized.values, np.ones((len(x), 1)))


def propagate_bitlinear(
    op: Op, x: Approx, rows: Sequence[int], weights: Sequence[Any], arithmetic: Arithmetic, flips: Flips
) -> tuple[Approx, Ties]:
    """Compute a BitLinear with its error, and the activations near a tie.

    ``x`` ``(n_rows, ...)`` covers the ``rows`` of the pass; ``flips`` go to the other side of their tie.
    ``weights`` as in ``check_bitlinear``.
    """
    assert isinstance(op.kind, BitLinear)
    arithmetic = arithmetic.of(op)
    weight, *biases = weights
    product, ties = _carry_product(op, x, rows, weight, arithmetic, flips)
    product = replace(product, noise=product.noise + _after_product(product.value, weights, arithmetic))
    if biases:  # what the values of a product have in common is nothing that the sums have in common
        product = Approx(
            product.value + biases[0], product.noise, product.jump + product.common, np.zeros_like(product.shared)
        )
    if op.kind.n_heads is None:
        return product, ties
    heads = (len(product.value), op.kind.n_heads, -1)
    value, noise, jump = (array.reshape(heads) for array in (product.value, product.noise, product.jump))
    return Approx(value, noise, jump, product.shared), ties


def _carry_product(
    op: Op, x: Approx, rows: Sequence[int], weight: TernaryMatrix, arithmetic: Arithmetic, flips: Flips
) -> tuple[Approx, Ties]:
    tap = op.inputs[0]
    n_rows = x.value.shape[0]
    flat = x.value.reshape(n_rows, -1)
    if floats.is_float(arithmetic):
        whole = Approx(flat, x.noise.reshape(n_rows, -1), x.jump.reshape(n_rows, -1), x.shared)
        nowhere = np.zeros(0, np.intp)
        return floats.propagate(whole, weight, arithmetic), Ties(nowhere, nowhere, np.zeros(0))
    if blocks.is_blocked(arithmetic, flat.shape[1]):
        return _in_blocks(op, x, rows, weight, arithmetic, flips)
    codes, scale, scaled = integers.quantize(flat, arithmetic)
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
    allowed = integers.RESCALE_STEPS * U * np.abs(value) + TINY
    if not arithmetic.known:
        # sums of binary32 products: of codes, or of what they stand for
        length = np.sqrt(np.sum(codes * codes, axis=-1, keepdims=True))
        likely = random_sum(codes.shape[-1], length, sums, arithmetic)
        allowed = allowed + np.minimum(likely, integers.HALF_UNIT) / scale * weight.scale
    if arithmetic.low:
        form = arithmetic.format
        allowed = allowed + integers.RESCALES * form.unit_roundoff * np.abs(value) + form.tiny
    return Approx(value, allowed, np.zeros_like(value), x.shared + of_scale[:, 0]), ties


def _in_blocks(
    op: Op, x: Approx, rows: Sequence[int], weight: TernaryMatrix, arithmetic: Arithmetic, flips: Flips
) -> tuple[Approx, Ties]:
    """Compute the same where activations are quantised in blocks, whose steps have errors of their own."""
    n_rows, flat = x.value.shape[0], x.value.reshape(x.value.shape[0], -1)
    found = blocks.quantize(flat.astype(np.float32), arithmetic)
    magnitude = np.abs(flat).reshape(found.codes.shape)
    error = (x.error + x.common).reshape(found.codes.shape) + U * magnitude  # of the rounding to binary32 above
    absmax = np.maximum(magnitude.max(axis=-1, keepdims=True), np.finfo(np.float64).tiny)
    reach = np.max(magnitude + error, axis=-1, keepdims=True)
    of_step = np.max(np.where(magnitude + error >= absmax, error, 0.0), axis=-1, keepdims=True)
    of_step = np.maximum(of_step, reach - absmax) / absmax + 2 * U
    window = np.abs(found.scaled) * (4 * U + of_step) + error * (blocks.LEVELS / absmax)
    distance = np.abs(found.scaled - np.floor(found.scaled) - 0.5)
    window, distance = window.reshape(n_rows, -1), distance.reshape(n_rows, -1)
    at, features = np.nonzero(distance <= window)
    ties = Ties(np.asarray(rows, np.intp)[at], features, distance[at, features] / window[at, features])
    codes, scaled = found.codes.reshape(n_rows, -1).copy(), found.scaled.reshape(n_rows, -1)
    for (flipped, row), wanted in flips.items():
        if flipped == op.inputs[0] and row in rows:
            i, js = rows.index(row), list(wanted)
            codes[i, js] += np.where(codes[i, js] > scaled[i, js], -1.0, 1.0)
    found = replace(found, codes=codes.reshape(found.codes.shape))
    value, allowed = blocks.multiply(found, weight)
    # a step that is off moves all codes of its block together, each block by itself
    by_block = (found.codes * found.steps * of_step)[..., None, :] * np.eye(found.codes.shape[1])[:, :, None]
    moved = by_block.reshape(-1, flat.shape[1]) @ weight.signs.T.astype(np.float64) * weight.scale
    jump = np.abs(moved.reshape(n_rows, -1, weight.signs.shape[0])).sum(axis=1)
    return Approx(value, allowed, jump, np.zeros_like(x.shared)), ties
