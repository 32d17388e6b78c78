"""Healthy arithmetics: summation orders, precisions and forms of a formula that are all correct."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.floating[Any]]
LANES_HELD = 1 << 18
"""Accumulators held at a time."""
Dot = Callable[[Array, Array], Array]
"""``a (..., n)`` and ``b (..., m, n)`` -> ``(..., m)``: every row of ``a`` with every row of ``b``."""


def blas(a: Array, b: Array) -> Array:
    """Sum as the BLAS library does."""
    return a @ np.swapaxes(b, -1, -2)


def einsum(a: Array, b: Array) -> Array:
    """Sum as NumPy's own loops do."""
    product: Array = np.einsum("...an,...mn->...am", a, b)
    return product


def lanes(width: int) -> Dot:
    """Return a sum in ``width`` accumulators, one step after the other, then a halving tree."""

    def dot(a: Array, b: Array) -> Array:
        n, step = a.shape[-1], max(1, LANES_HELD // (b.size // b.shape[-1] * width))
        if a.shape[-2] > step:
            parts = [dot(a[..., at : at + step, :], b) for at in range(0, a.shape[-2], step)]
            return np.concatenate(parts, axis=-2)
        pad = -n % width
        if pad:
            a, b = (np.concatenate([x, np.zeros((*x.shape[:-1], pad), x.dtype)], -1) for x in (a, b))
        total = np.zeros(
            (*np.broadcast_shapes(a.shape[:-2], b.shape[:-2]), a.shape[-2], b.shape[-2], width), a.dtype
        )
        for start in range(0, n, width):
            total += a[..., :, None, start : start + width] * b[..., None, :, start : start + width]
        while total.shape[-1] > 1:
            half = total.shape[-1] // 2
            total = total[..., :half] + total[..., half:]
        result: Array = total[..., 0]
        return result

    return dot


def wide(a: Array, b: Array) -> Array:
    """Sum in float64 and round once."""
    product: Array = (a.astype(np.float64) @ np.swapaxes(b, -1, -2).astype(np.float64)).astype(a.dtype)
    return product


@dataclass(frozen=True)
class Style:
    """One correct way to compute."""

    name: str
    dtype: type[np.float32] | type[np.float64] = np.float32
    dot: Dot = blas
    weights: Literal["integer", "weights", "activations", "both"] = "integer"
    """What is dequantised before a BitLinear multiplies; ``integer``: nothing."""
    quantiser: Literal["product", "float64", "divide", "fused", "reciprocal"] = "product"
    norm: Literal["divide", "rsqrt", "sequential", "float64"] = "divide"
    rope: Literal["table", "recurrence", "angles"] = "table"
    softmax: Literal["max", "float64", "exp2"] = "max"
    residual: Literal["plain", "fused"] = "plain"
    """``fused``: the projection's last product and the addition share one rounding."""
    k16: bool = False
    v16: bool = False
    q16: bool = False
    p16: bool = False
    """What is rounded to binary16 on the way into a product."""
    split: int | None = None
    """Longest batch; a longer prompt is fed in pieces."""


PLAIN = Style("float32")
STYLES: tuple[Style, ...] = (
    PLAIN,
    replace(PLAIN, name="float32, NumPy's loops", dot=einsum),
    *(replace(PLAIN, name=f"float32, {width} lanes", dot=lanes(width)) for width in (4, 8, 16, 32)),
    replace(PLAIN, name="float32, sums in float64", dot=wide, norm="float64", softmax="float64"),
    Style("float64", dtype=np.float64),
    replace(PLAIN, name="dequantised weights", weights="weights"),
    replace(PLAIN, name="dequantised activations", weights="activations", dot=lanes(8)),
    replace(PLAIN, name="both dequantised", weights="both"),
    replace(PLAIN, name="F16 KV", k16=True, v16=True),
    replace(PLAIN, name="F16 KV, Q and weights", k16=True, v16=True, q16=True, p16=True, dot=lanes(8)),
    replace(PLAIN, name="F16 K only", k16=True),
    replace(PLAIN, name="F16 V only", v16=True, dot=einsum),
    replace(PLAIN, name="float64 with F16 KV", dtype=np.float64, k16=True, v16=True),
    replace(PLAIN, name="quantiser in float64", quantiser="float64"),
    replace(PLAIN, name="quantiser fused", quantiser="fused"),
    replace(PLAIN, name="quantiser divides by the step", quantiser="divide"),
    replace(PLAIN, name="quantiser times the reciprocal", quantiser="reciprocal", norm="rsqrt"),
    replace(PLAIN, name="norm by rsqrt", norm="rsqrt"),
    replace(PLAIN, name="norm summed in sequence", norm="sequential"),
    replace(PLAIN, name="RoPE by recurrence", rope="recurrence"),
    replace(PLAIN, name="RoPE from float32 angles", rope="angles"),
    replace(PLAIN, name="softmax in float64 without the maximum", softmax="float64"),
    replace(PLAIN, name="softmax by exp2", softmax="exp2"),
    replace(PLAIN, name="fused residual", residual="fused"),
    replace(PLAIN, name="prompt in pieces", split=16),
    replace(PLAIN, name="prompt in pieces, F16 KV", split=7, k16=True, v16=True),
)
