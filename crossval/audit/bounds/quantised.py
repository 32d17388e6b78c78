"""Inputs of the LM head that engines of the llama.cpp family quantise, as the type of its table demands.

``q8_0`` (tables of Q8_0, Q4_0, Q5_0): of 32 values, ``m`` is the largest magnitude; codes
``rint(fl(x fl(127 / m)))``, whose step is ``m / 127`` in binary16. ``q8_k`` (Q6_K, Q3_K, TQ1_0, TQ2_0): of 256
values, ``m`` is the one of largest magnitude; codes ``rint(fl(x f))`` of at most 127 with ``f = fl(-127 / m)``,
whose step is ``fl(1 / f)``; ``q8_k_fused``: the same with ``x f`` not rounded (gcc builds).

Sources: llama.cpp ``quantize_row_q8_0`` (AVX2) and ``quantize_row_q8_K_ref``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np
import numpy.typing as npt

from crossval.formats import to_f16, to_f32

FloatArray = npt.NDArray[np.float64]
Quantiser = Literal["q8_0", "q8_k", "q8_k_fused"]

_LEVELS = 127.0
BLOCK_OF: Mapping[str, int] = {"q8_0": 32, "q8_k": 256, "q8_k_fused": 256}


def q8_0(x: npt.NDArray[np.floating]) -> FloatArray:
    """Return rows ``(n_tokens, n)`` as their codes times steps."""
    blocks = _blocks(x, "q8_0")
    largest = np.abs(blocks).max(axis=-1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        codes = np.rint(to_f32(blocks * to_f32(_LEVELS / largest)))
        found = np.where(largest == 0, 0.0, codes * to_f16(to_f32(largest / _LEVELS)))
    return found.reshape(x.shape)


def q8_k(x: npt.NDArray[np.floating]) -> FloatArray:
    """Return rows ``(n_tokens, n)`` as their codes times steps."""
    return _q8_k(x, to_f32)


def q8_k_fused(x: npt.NDArray[np.floating]) -> FloatArray:
    """Return rows ``(n_tokens, n)`` as their codes times steps."""
    return _q8_k(x, lambda product: product)


def _q8_k(x: npt.NDArray[np.floating], rounded: Callable[[FloatArray], FloatArray]) -> FloatArray:
    blocks = _blocks(x, "q8_k")
    at = np.abs(blocks).argmax(axis=-1, keepdims=True)
    largest = np.take_along_axis(blocks, at, axis=-1)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        factor = to_f32(-_LEVELS / largest)
        codes = np.minimum(np.rint(rounded(blocks * factor)), _LEVELS)
        found = np.where(largest == 0, 0.0, codes * to_f32(1.0 / factor))
    return found.reshape(x.shape)


def _blocks(x: npt.NDArray[np.floating], name: str) -> FloatArray:
    return np.asarray(x, np.float64).reshape(len(x), -1, BLOCK_OF[name])


QUANTISERS: Mapping[str, Callable[[npt.NDArray[np.floating]], FloatArray]] = {
    "q8_0": q8_0,
    "q8_k": q8_k,
    "q8_k_fused": q8_k_fused,
}


def moved(x: FloatArray, error: FloatArray, name: str) -> FloatArray:
    """Return how far the quantised values may move when every value may be off by ``error``.

    A block's largest value moves its step, and with it all of its values; a code moves by as many as lie between
    its ends. Steps of binary16 may come out as a neighbour.
    """
    blocks, off = _blocks(x, name), _blocks(error, name)
    largest = np.abs(blocks).max(axis=-1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        step = np.where(largest == 0, 0.0, largest / _LEVELS)
        relative = np.nan_to_num(off.max(axis=-1, keepdims=True) / largest, nan=0.0, posinf=1.0)
        scaled = np.nan_to_num(np.abs(blocks) / step, nan=0.0)
        reach = np.nan_to_num(off / step, nan=0.0) + scaled * relative
        codes = np.rint(scaled + reach) - np.rint(scaled - reach)
    neighbour = np.where(relative > 0, 2.0**-10 if name == "q8_0" else 2.0**-22, 0.0)
    found: FloatArray = (step * codes + np.abs(blocks) * (relative + neighbour)).reshape(x.shape)
    return found
