"""Dot products added in binary16 that an engine does not state: the order of bitnet.cpp's main (family 12)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from crossval.diagnose.variants.context import Array, Context, Inapplicable
from crossval.diagnose.variants.variant import Variant, on
from crossval.formats import to_f16
from crossval.model.kinds import widen

BLOCK, LANES = 128, 32


def in_lanes(x: Array, y: Array) -> Array:
    """Multiply vectors of binary16 along the last axis: 4 accumulators of 32 lanes, the rest in binary64.

    Products of two binary16 values are exact in binary64, and so is their sum with an accumulator wherever a
    rounding to binary16 can depend on it.
    """
    x, y = np.broadcast_arrays(x, y)
    n, shape = x.shape[-1] // BLOCK * BLOCK, (*x.shape[:-1], BLOCK // LANES, LANES)
    sums = np.zeros(shape)
    for at in range(0, n, BLOCK):
        product = x[..., at : at + BLOCK] * y[..., at : at + BLOCK]
        sums = _narrow(sums + product.reshape(shape))
    joined = _narrow(_narrow(sums[..., 0, :] + sums[..., 2, :]) + _narrow(sums[..., 1, :] + sums[..., 3, :]))
    while joined.shape[-1] > 1:
        half = joined.shape[-1] // 2
        joined = _narrow(joined[..., :half] + joined[..., half:])
    rest: Array = np.sum(x[..., n:] * y[..., n:], axis=-1)
    return joined[..., 0] + rest


def _narrow(x: Array) -> Array:
    return x.astype(np.float16).astype(np.float64)


def _scores(context: Context) -> Array:
    q, k = (to_f16(widen(array)) for array in context.raw)
    if q.shape[-1] < BLOCK:
        raise Inapplicable
    k = np.repeat(k, q.shape[1] // k.shape[1], axis=1)
    return in_lanes(q.transpose(1, 0, 2)[:, :, None], k.transpose(1, 0, 2)[:, None])


def _attended(context: Context) -> Array:
    p, v = (to_f16(widen(array)) for array in context.raw)
    empty = -len(v) % BLOCK
    v = np.repeat(np.pad(v, ((0, empty), (0, 0), (0, 0))), p.shape[0] // v.shape[1], axis=1)
    p = np.pad(p, ((0, 0), (0, 0), (0, empty)))
    merged = in_lanes(p[:, :, None], v.transpose(1, 2, 0)[:, None])
    return merged.transpose(1, 0, 2).reshape(p.shape[1], -1)


def _logits(context: Context) -> Array:
    x = to_f16(widen(context.raw[0]))
    if x.shape[-1] < BLOCK:
        raise Inapplicable
    table = context.vector
    chunks = context.feature_chunks(table.shape[0])
    return np.concatenate([in_lanes(x[:, None], to_f16(widen(table[at]))[None]) for at in chunks], axis=-1)


SUMS: Mapping[str, Callable[[Context], Array]] = {
    "kq": _scores,
    "kqv_out": _attended,
    "result_output": _logits,
}


def _one_row(context: Context) -> Array:
    if context.n_rows > 1:  # batches are added in binary32
        raise Inapplicable
    return SUMS[context.op.name](context)


VARIANTS = (
    Variant(
        "sums in binary16",
        "products of binary16 are added in binary16 (4 accumulators of 32 lanes), which the engine does not state",
        _one_row,
        family=12,
        ops=on(*SUMS),
    ),
)
