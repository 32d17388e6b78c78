"""The specification's formulas in NumPy float64, and the kinds of operations that they define.

A *kind* is a formula with its hyper-parameters as fields. How far rounding may change its result is in
``crossval.audit.bounds``, which has one rule per kind; ways to get it wrong are in
``crossval.diagnose.variants``.

What is exact and what is not, by the model's definition: the only rounding is the int8 activation quantiser
inside BitLinear. Everything else is real arithmetic, carried in float64: no float16 anywhere (the KV state
keeps float64), RoPE with the exact frequencies ``base^(-2i/head_dim)``. Weights are the numbers in the file.

Sources: "The Era of 1-bit LLMs" (arXiv 2402.17764) and "BitNet b1.58 2B4T Technical Report" (arXiv 2504.12285)
for BitLinear and squared ReLU; RMSNorm arXiv 1910.07467 eq. 4; RoPE arXiv 2104.09864 eq. 34; grouped-query
attention arXiv 2305.13245; SiLU arXiv 1702.03118. Shares no code with any engine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from crossval.formats import Format

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

HEAD_CHUNK_ROWS = 4096
"""Vocabulary rows of the LM head widened to float64 at a time (4096 x 2560 x 8 bytes = 84 MB)."""

RopePairing = Literal["halves", "adjacent"]
"""Which elements of a head RoPE rotates together: ``(i, i + head_dim/2)`` (NeoX), or ``(2i, 2i + 1)``."""


@dataclass(frozen=True)
class TernaryMatrix:
    """A BitLinear weight: ``signs`` float32 ``(rows, cols)`` of -1, 0, +1, times one ``scale``."""

    signs: npt.NDArray[np.float32]
    scale: float
    factor: float = 1.0
    """Part of ``scale`` that the file has in a tensor of its own (``.scale``): engines apply it separately."""

    def dequantised(self, form: Format) -> TernaryMatrix:
        """Return the matrix with weights brought back to their size in a format: each is ``scale * sign``."""
        return TernaryMatrix(self.signs, float(form.round(np.asarray([self.scale]))[0]))


Weight = npt.NDArray[np.floating[Any]] | TernaryMatrix
"""A norm vector ``(n,)``, an embedding or head table ``(vocab_size, dim)``, or a ternary matrix."""


# --- formulas -------------------------------------------------------------------------------------------------


def embed(token_ids: IntArray, table: npt.NDArray[np.floating[Any]]) -> FloatArray:
    """Look up the embedding row of each token: ``(n_tokens, dim)``."""
    return table[token_ids].astype(np.float64)


def rms_norm(x: FloatArray, weight: FloatArray, *, eps: float) -> FloatArray:
    """Divide each row by its root mean square and scale: ``x / sqrt(mean(x^2) + eps) * weight``."""
    mean_square: FloatArray = np.mean(x * x, axis=-1, keepdims=True)
    return x / np.sqrt(mean_square + eps) * weight


def quantize_activations(x: FloatArray) -> tuple[npt.NDArray[np.int8], FloatArray]:
    """Quantise each token row to int8 by its largest magnitude.

    ``scale = 127 / max(max|x|, 1e-5)``, ``code = clip(round_half_even(x * scale), -128, 127)``.

    Returns:
        codes int8, shaped as ``x``; scale float64, last axis 1. A row with NaN has a NaN scale.
    """
    absmax: FloatArray = np.max(np.abs(x), axis=-1, keepdims=True)
    scale = 127.0 / np.maximum(absmax, 1e-5)
    with np.errstate(invalid="ignore"):  # a NaN has no code; it propagates through the scale
        codes = np.clip(np.rint(x * scale), -128, 127).astype(np.int8)
    return codes, scale


def accumulate(codes: npt.NDArray[np.int8], weight: TernaryMatrix) -> npt.NDArray[np.int32]:
    """Return the exact integer sums ``codes @ signs.T``, ``(n_tokens, rows)``.

    Computed by a floating-point matrix product, which is exact in any order of summation: every partial sum is
    an integer of at most ``128 * cols``, and float32 holds all integers to 2^24 (cols < 131072), float64 to 2^53.
    """
    exact = np.float32 if 128 * codes.shape[-1] < 2**24 else np.float64
    product: npt.NDArray[np.floating[Any]] = codes.astype(exact) @ weight.signs.T.astype(exact, copy=False)
    return product.astype(np.int32)


def bitlinear(
    x: FloatArray, weight: TernaryMatrix, bias: FloatArray | None = None, *, n_heads: int | None = None
) -> FloatArray:
    """Multiply by a ternary matrix in int8: quantise, accumulate, rescale; add the bias, if there is one.

    Returns:
        ``(n_tokens, rows)``; with ``n_heads`` split into heads: ``(n_tokens, n_heads, head_dim)``.
    """
    codes, scale = quantize_activations(x)
    y = accumulate(codes, weight) / scale * weight.scale
    if bias is not None:
        y = y + bias
    return y if n_heads is None else y.reshape(y.shape[0], n_heads, -1)


def split_pairs(x: npt.NDArray[Any], pairing: RopePairing) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Return the first and the second element of every pair that RoPE rotates: last axis ``head_dim/2``."""
    half = x.shape[-1] // 2
    return (x[..., :half], x[..., half:]) if pairing == "halves" else (x[..., ::2], x[..., 1::2])


def join_pairs(first: FloatArray, second: FloatArray, pairing: RopePairing) -> FloatArray:
    """Undo ``split_pairs``."""
    if pairing == "halves":
        return np.concatenate([first, second], axis=-1)
    return np.stack([first, second], axis=-1).reshape(*first.shape[:-1], -1)


def rope_frequencies(
    head_dim: int, factors: FloatArray | None = None, *, base: float, scale: float = 1.0
) -> FloatArray:
    """Return the angle per position of every pair: ``base^(-2i/head_dim) / factors[i] * scale``.

    ``factors`` are the divisors that Llama 3.1 brought (``rope_freqs.weight``), ``scale`` is 1 / the factor of
    linear position interpolation (arXiv 2306.15595).
    """
    half = head_dim // 2
    frequency = base ** (-np.arange(half, dtype=np.float64) / half) * scale
    return frequency if factors is None else frequency / factors


def rope(
    x: FloatArray,
    positions: IntArray,
    factors: FloatArray | None = None,
    *,
    base: float,
    pairing: RopePairing = "halves",
    scale: float = 1.0,
) -> FloatArray:
    """Rotate pair ``i`` of every head by ``position * rope_frequencies[i]``."""
    frequency = rope_frequencies(x.shape[-1], factors, base=base, scale=scale)
    angle = positions[:, None, None] * frequency  # (n_tokens, 1, half): the same for all heads
    cos, sin = np.cos(angle), np.sin(angle)
    first, second = split_pairs(x, pairing)
    return join_pairs(first * cos - second * sin, first * sin + second * cos, pairing)


def attention_scores(q: FloatArray, k: FloatArray) -> FloatArray:
    """Return every query times every key, unscaled and unmasked: ``(n_heads, n_tokens, n_kv)``.

    ``q`` ``(n_tokens, n_heads, head_dim)``, ``k`` ``(n_kv, n_kv_heads, head_dim)``.
    """
    scores: FloatArray = q.transpose(1, 0, 2) @ _per_query_head(k, q.shape[1]).transpose(0, 2, 1)
    return scores


def visible_keys(n_kv: int, positions: IntArray) -> npt.NDArray[np.bool_]:
    """Return the causal mask ``(n_tokens, n_kv)``: keys at or before each token's own position."""
    return np.arange(n_kv) <= positions[:, None]


def causal_softmax(scores: FloatArray, positions: IntArray, *, scale: float) -> FloatArray:
    """Turn scores into attention weights over the visible keys; a token always sees itself."""
    visible = visible_keys(scores.shape[-1], positions)
    scaled = np.where(visible, scores * scale, -np.inf)
    weights: FloatArray = np.exp(scaled - scaled.max(axis=-1, keepdims=True))
    total: FloatArray = weights.sum(axis=-1, keepdims=True)
    return weights / total


def attend(weights: FloatArray, v: FloatArray) -> FloatArray:
    """Sum the values by attention weight and merge the heads: ``(n_tokens, n_heads * head_dim)``."""
    per_head: FloatArray = weights @ _per_query_head(v, weights.shape[0])
    merged: FloatArray = per_head.transpose(1, 0, 2).reshape(weights.shape[1], -1)
    return merged


def _per_query_head(kv: FloatArray, n_heads: int) -> FloatArray:
    """Give query head ``h`` its key/value head ``h // (n_heads / n_kv_heads)``: ``(n_heads, n_kv, head_dim)``."""
    n_kv_heads = kv.shape[1]
    per_head: FloatArray = np.repeat(kv, n_heads // n_kv_heads, axis=1).transpose(1, 0, 2)
    return per_head


def squared_relu(gate: FloatArray) -> FloatArray:
    """Return ``max(gate, 0)^2``."""
    positive = np.maximum(gate, 0.0)
    return positive * positive


def sigmoid(x: FloatArray) -> FloatArray:
    """Return ``1 / (1 + exp(-x))`` without overflow."""
    small = np.exp(-np.abs(x))
    return np.where(x >= 0, 1.0, small) / (1.0 + small)


def silu(gate: FloatArray) -> FloatArray:
    """Return ``gate / (1 + exp(-gate))``."""
    return gate * sigmoid(gate)


def multiply(a: FloatArray, b: FloatArray) -> FloatArray:
    """Return the elementwise product."""
    return a * b


def add(a: FloatArray, b: FloatArray) -> FloatArray:
    """Return the elementwise sum (a residual connection)."""
    return a + b


def head(x: FloatArray, table: npt.NDArray[np.floating[Any]]) -> FloatArray:
    """Multiply by every row of the LM head's table: logits ``(n_tokens, vocab_size)``."""
    starts = range(0, table.shape[0], HEAD_CHUNK_ROWS)
    return np.concatenate([x @ table[s : s + HEAD_CHUNK_ROWS].astype(np.float64).T for s in starts], axis=-1)


# --- kinds ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """A formula of inputs, then weights; its hyper-parameters are the fields, named as the formula's keywords.

    Every formula works row by row: a token's result depends only on that token's inputs and the KV state.
    """

    formula: ClassVar[Callable[..., FloatArray]]
    unmasked: ClassVar[bool] = False
    """Whether the result has entries for keys after a token, which are causally masked: these are ignored."""

    def compute(self, *arrays: Any) -> FloatArray:
        """Return the formula's result, float64; floating-point inputs must be float64 already."""
        return type(self).formula(*arrays, **vars(self))


@dataclass(frozen=True)
class Embedding(Kind):
    """Rows of a table by token id."""

    formula = staticmethod(embed)


@dataclass(frozen=True)
class RmsNorm(Kind):
    """Root mean square norm."""

    formula = staticmethod(rms_norm)
    eps: float


@dataclass(frozen=True)
class BitLinear(Kind):
    """Product with a ternary matrix over int8 activations, and a bias where its weights name one."""

    formula = staticmethod(bitlinear)
    n_heads: int | None = None
    """None if the result is not split into heads."""


@dataclass(frozen=True)
class Rope(Kind):
    """Rotary position embedding."""

    formula = staticmethod(rope)
    base: float
    pairing: RopePairing = "halves"
    scale: float = 1.0


@dataclass(frozen=True)
class AttentionScores(Kind):
    """Queries times keys."""

    formula = staticmethod(attention_scores)
    unmasked = True


@dataclass(frozen=True)
class Softmax(Kind):
    """Causal softmax of scaled scores."""

    formula = staticmethod(causal_softmax)
    scale: float


@dataclass(frozen=True)
class Attend(Kind):
    """Attention weights times values."""

    formula = staticmethod(attend)


@dataclass(frozen=True)
class SquaredRelu(Kind):
    """Activation of BitNet b1.58 2B-4T."""

    formula = staticmethod(squared_relu)


@dataclass(frozen=True)
class Silu(Kind):
    """Activation of Llama-like models."""

    formula = staticmethod(silu)


@dataclass(frozen=True)
class Multiply(Kind):
    """Elementwise product."""

    formula = staticmethod(multiply)


@dataclass(frozen=True)
class Add(Kind):
    """Elementwise sum."""

    formula = staticmethod(add)


@dataclass(frozen=True)
class Head(Kind):
    """Product with the table of the vocabulary: logits."""

    formula = staticmethod(head)


KINDS: frozenset[type[Kind]] = frozenset(Kind.__subclasses__())
"""All kinds."""
ACTIVATIONS: dict[str, Kind] = {"relu_squared": SquaredRelu(), "silu": Silu()}
"""Keyed by ``SpecConfig.activation``."""


def widen(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return floating-point arrays as float64; token ids and positions as they are."""
    return array.astype(np.float64, copy=False) if array.dtype.kind == "f" else array
