"""Attention as three operations, and flash attention in its three forms."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from bitnet_py.arithmetic import Arithmetic
from tests.support.numpy_main.kernels import (
    F16,
    F32,
    INFINITY,
    dot,
    expf,
    exponentials,
    f16,
    f32,
    fused,
    tiled,
)


def by_operations(
    q: F32, keys: F16, values: F16, positions: npt.NDArray[np.int64], scale: np.float32, arithmetic: Arithmetic
) -> dict[str, F32]:
    """Scores, softmax and weighted sum.

    ``q (n, heads, d)``, cells ``(n_kv, kv_heads, d)`` with n_kv a multiple of 256; ``scale`` of the scores.
    """
    n, n_heads, d = q.shape
    group = n_heads // keys.shape[1]
    k = np.repeat(keys, group, 1).transpose(1, 0, 2)
    v = np.repeat(values, group, 1).transpose(1, 2, 0)
    q16 = f16(q).transpose(1, 0, 2)
    score = tiled if n > 1 and d % arithmetic.simd_width == 0 else dot
    kq = score(k[:, None], q16[:, :, None], arithmetic)
    masked = np.arange(len(keys)) > positions[:, None]
    with np.errstate(all="ignore"):
        w = kq * scale
        w = w + np.where(masked, -INFINITY, np.float32(0))
        e, total = exponentials(w, w.max(-1), arithmetic.simd_width)
        p = e * (1 / total).astype(np.float32)[..., None]
    weigh = tiled if n > 1 and d % 4 == 0 else dot
    kqv = weigh(v[:, None], f16(p)[:, :, None], arithmetic)
    return {"kq": kq, "kq_soft_max": p, "kqv_out": kqv.transpose(1, 0, 2).reshape(n, -1)}


def weigh(a: F16, factor: F32, v: F16, weight: F32, arithmetic: Arithmetic) -> F16:
    """One cell of flash attention, ``(heads, d)``: scale what was summed, add values; kept in binary16."""
    whole = a.shape[-1] // 128 * 128 if arithmetic.half_sums else 0
    low, high = np.split(a, [whole], -1)
    v_low, v_high = np.split(v, [whole], -1)
    factor, weight = factor[:, None], weight[:, None]
    low, high = f16(f32(low) * f32(f16(factor))), f16(f32(high) * factor)
    return np.concatenate(
        [fused(v_low, f16(weight), low, np.float16), f16(fused(v_high, weight, f32(high)))], axis=-1
    )


def _in_order(scores: F32, values: F16, arithmetic: Arithmetic) -> tuple[F32, F32, F32]:
    """Go through the cells ``(heads, n)``, ``(heads, n, d)`` one by one: maximum, sum, weighted sum."""
    n_heads, n, d = values.shape
    top, total = np.full(n_heads, -INFINITY), np.zeros(n_heads, np.float32)
    a = np.zeros((n_heads, d), np.float16)
    one = np.float32(1)
    for cell in range(n):
        s = scores[:, cell]
        with np.errstate(invalid="ignore"):
            is_new = s > top
            factor = np.where(is_new, expf(top - s), one)
            weight = np.where(is_new, one, expf(s - top))
        top = np.where(is_new, s, top)
        a = weigh(a, factor, values[:, cell], weight, arithmetic)
        total = fused(total, factor, weight)
    return top, total, f32(a)


def _joined(scores: F32, values: F16, n_kv: int, arithmetic: Arithmetic) -> tuple[F32, F32]:
    """The same with the cells divided among threads; returns sum and weighted sum."""
    n_heads, n, d = values.shape
    size = -(-n_kv // arithmetic.attention_threads)
    top, total, a = np.full(n_heads, -INFINITY), np.zeros(n_heads, np.float32), np.zeros((n_heads, d), np.float32)
    for at in range(0, n, size):
        part_top, part_total, part = _in_order(scores[:, at : at + size], values[:, at : at + size], arithmetic)
        highest = np.maximum(top, part_top)
        old, new = expf(top - highest), expf(part_top - highest)
        a, total = fused(a, old[:, None], part * new[:, None]), fused(total, old, part_total * new)
        top = highest
    return total, a


def _by_tiles(
    q: F32, keys: F16, values: F16, positions: npt.NDArray[np.int64], scale: np.float32, width: int
) -> F32:
    """Queries ``(n, d)`` of one head by tiles of 64 cells, in binary32."""
    n, d = q.shape
    top, total, a = np.full(n, -INFINITY), np.zeros(n, np.float32), np.zeros((n, d), np.float32)
    for at in range(0, int(positions[-1]) + 1, 64):
        k, v = f32(keys[at : at + 64]), f32(values[at : at + 64])
        kq = np.zeros((n, 64), np.float32)
        for i in range(d):
            kq = fused(k[:, i], q[:, i, None], kq)
        kq = kq * scale + np.where(at + np.arange(64) > positions[:, None], -INFINITY, np.float32(0))
        highest = np.maximum(top, kq.max(-1))
        factor = np.where(highest > top, expf(top - highest), np.float32(1))
        a, total, top = a * factor[:, None], total * factor, highest
        e, added = exponentials(kq, top, width)  # a tile that a query does not see adds zeros
        total = (total.astype(np.float64) + added).astype(np.float32)
        for cell in range(64):
            a = fused(v[cell], e[:, cell, None], a)
    return a * (np.float32(1) / total)[:, None]


def flash(
    q: F32, keys: F16, values: F16, positions: npt.NDArray[np.int64], scale: np.float32, arithmetic: Arithmetic
) -> F32:
    """Flash attention: arguments as ``by_operations``; returns ``(n, heads * d)``."""
    n, n_heads, d = q.shape
    out = np.empty_like(q)
    k, v = (np.repeat(cells, n_heads // cells.shape[1], 1).transpose(1, 0, 2) for cells in (keys, values))
    if n >= 64 and d % arithmetic.simd_width == 0:
        for h in range(n_heads):
            out[:, h] = _by_tiles(q[:, h], k[h], v[h], positions, scale, arithmetic.simd_width)
        return out.reshape(n, -1)
    for t in range(n):
        seen = int(positions[t]) + 1
        scores = dot(k[:, :seen], f16(q[t])[:, None], arithmetic) * scale
        if n == 1 and len(keys) >= 512:
            total, a = _joined(scores, v[:, :seen], len(keys), arithmetic)
        else:
            _, total, a = _in_order(scores, v[:, :seen], arithmetic)
        out[t] = a * (np.float32(1) / total)[:, None]
    return out.reshape(n, -1)
