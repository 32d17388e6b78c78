"""A BitLinear inside a segment: its input has an error, which matters where it reaches across a rounding tie."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from crossval.audit.bounds import integers
from crossval.audit.bounds.approx import Approx, Flips, Ties, random_sum
from crossval.audit.bounds.arithmetic import TINY, Arithmetic, U
from crossval.model.kinds import BitLinear, TernaryMatrix, accumulate
from crossval.model.op import Op


def propagate_bitlinear(
    op: Op, x: Approx, rows: Sequence[int], weight: TernaryMatrix, arithmetic: Arithmetic, flips: Flips
) -> tuple[Approx, Ties]:
    """Compute a BitLinear with its error, and the activations near a tie.

    ``x`` ``(n_rows, ...)`` covers the ``rows`` of the pass; ``flips`` go to the other side of their tie.
    """
    tap = op.inputs[0]
    n_rows = x.value.shape[0]
    flat = x.value.reshape(n_rows, -1)
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
    assert isinstance(op.kind, BitLinear)
    if op.kind.n_heads is not None:
        value, allowed = (array.reshape(n_rows, op.kind.n_heads, -1) for array in (value, allowed))
    return Approx(value, allowed, np.zeros_like(value), x.shared + of_scale[:, 0]), ties
