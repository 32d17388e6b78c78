"""Scores, softmax and weighted sum done wrong (family 9)."""

# mypy: disable-error-code="no-any-return"
from __future__ import annotations

from collections.abc import Callable

import numpy as np

from crossval.variants.context import Array, Context, Inapplicable
from crossval.variants.variant import Variant, on

KQ = on("kq")
SOFTMAX = on("kq_soft_max")
KQV = on("kqv_out")
HEADS = KQ | KQV

# --- heads ----------------------------------------------------------------------------------------------------


def attend(context: Context, heads: Array) -> Array:
    """Compute the scores or the weighted sum with query head h reading the given kv head."""
    first, cells = context.inputs
    per_head = cells[:, heads]  # (n_kv, n_heads, head_dim)
    if context.op.name == "kq":
        scores: Array = first.transpose(1, 0, 2) @ per_head.transpose(1, 2, 0)
        return scores
    merged: Array = (first @ per_head.transpose(1, 0, 2)).transpose(1, 0, 2).reshape(first.shape[1], -1)
    return merged


def _mapped(function: Callable[[Array, int, int], Array]) -> Callable[[Context], Array]:
    """Return a variant with another map from query heads to kv heads; not one where it is the right map."""

    def variant(c: Context) -> Array:
        n, n_kv = c.config.n_heads, c.config.n_kv_heads
        heads = function(np.arange(n), n, n_kv)
        if np.array_equal(heads, np.arange(n) // (n // n_kv)):
            raise Inapplicable
        return attend(c, heads)

    return variant


def _unexpanded(context: Context) -> Array:
    n, n_kv = context.config.n_heads, context.config.n_kv_heads
    if n == n_kv:
        raise Inapplicable
    output = attend(context, np.minimum(np.arange(n), n_kv - 1))
    if context.op.name == "kq":
        output[n_kv:] = 0.0
    else:
        output[:, n_kv * context.config.head_dim :] = 0.0
    return output


_HEADS = (
    Variant(
        "GQA heads tiled",
        9,
        HEADS,
        "query head h reads kv head h mod n_kv_heads (tiled) instead of h / (n_heads / n_kv_heads) (repeated)",
        _mapped(lambda h, n, n_kv: h % n_kv),
    ),
    Variant(
        "all heads read kv head 0", 9, HEADS, "every query head reads kv head 0", _mapped(lambda h, n, n_kv: h * 0)
    ),
    Variant(
        "kv heads in reverse",
        9,
        HEADS,
        "kv heads are read in reverse order",
        _mapped(lambda h, n, n_kv: n_kv - 1 - h // (n // n_kv)),
    ),
    Variant(
        "kv head off by one",
        9,
        HEADS,
        "query heads read the kv head after theirs",
        _mapped(lambda h, n, n_kv: (h // (n // n_kv) + 1) % n_kv),
    ),
    Variant(
        "kv heads not expanded",
        9,
        HEADS,
        "only the first n_kv_heads query heads are computed, each with the kv head of its own number",
        _unexpanded,
    ),
)

# --- scores ---------------------------------------------------------------------------------------------------


def _q_unrotated(context: Context) -> Array:
    return context.op.function(context.round(0, context.tap(context.name("q"))), context.inputs[1])


def _k_unrotated(context: Context) -> Array:
    return context.op.function(context.inputs[0], context.round(1, context.cells("k")))


def _cells_of(tap: str) -> Callable[[Context], Array]:
    return lambda c: c.op.function(c.inputs[0], c.round(1, c.cells(tap)))


_SCORES = (
    Variant(
        "scaled here already",
        9,
        KQ,
        "scores are multiplied by 1/sqrt(head_dim) here already",
        lambda c: c.expected / np.sqrt(c.config.head_dim),
    ),
    Variant(
        "divided by head_dim here",
        9,
        KQ,
        "scores are divided by head_dim here",
        lambda c: c.expected / c.config.head_dim,
    ),
    Variant("q not rotated", 8, KQ, "queries are used as they were before RoPE", _q_unrotated),
    Variant("k not rotated", 8, KQ, "keys are stored as they were before RoPE", _k_unrotated),
    Variant("V read as K", 11, KQ, "values are read where keys should be", _cells_of("v")),
    Variant("K read as V", 11, KQV, "rotated keys are read where values should be", _cells_of("k_rope")),
    Variant("scores negated", 9, KQ, "scores have the wrong sign", lambda c: -c.expected),
)

# --- softmax --------------------------------------------------------------------------------------------------


def _scale(context: Context) -> float:
    return float(1.0 / np.sqrt(context.config.head_dim))


def _own_mask(context: Context, offset: int = 0) -> Array:
    """Return which keys each token sees, ``(n_rows, n_kv)``; ``offset`` 1 lets it see one of the future."""
    visible: Array = np.arange(context.target.shape[-1]) <= context.positions[:, None] + offset
    return visible


def softmax(scores: Array, visible: Array, *, scale: float, axis: int = -1) -> Array:
    """Return the softmax of the visible scores; where nothing is visible, NaN."""
    masked = np.where(visible, scores * scale, -np.inf)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        weights = np.exp(masked - masked.max(axis=axis, keepdims=True))
        normed: Array = weights / weights.sum(axis=axis, keepdims=True)
    return normed


def _scaled_by(factor: Callable[[Context], float]) -> Callable[[Context], Array]:
    def function(c: Context) -> Array:
        if factor(c) == _scale(c):
            raise Inapplicable
        return softmax(c.inputs[0], _own_mask(c), scale=factor(c))

    return function


def _over_axis(axis: int) -> Callable[[Context], Array]:
    """Softmax over heads or queries; where a key is visible to nobody the weights are zero."""

    def function(c: Context) -> Array:
        if c.inputs[0].shape[axis] == 1:
            raise Inapplicable
        visible = np.broadcast_to(_own_mask(c), c.inputs[0].shape)
        weights = softmax(c.inputs[0], visible, scale=_scale(c), axis=axis)
        return np.where(visible, np.nan_to_num(weights), 0.0)

    return function


def _masked(visible: Callable[[Context], Array]) -> Callable[[Context], Array]:
    def function(c: Context) -> Array:
        seen = visible(c)
        if np.array_equal(seen, _own_mask(c)):
            raise Inapplicable
        return softmax(c.inputs[0], seen, scale=_scale(c))

    return function


def _blind(fill: Callable[[Context, Array], Array]) -> Callable[[Context], Array]:
    """A token does not see itself; ``fill`` says what the first one, which then sees nothing, gets."""

    def function(c: Context) -> Array:
        seen = _own_mask(c, -1)
        weights = softmax(c.inputs[0], seen, scale=_scale(c))
        if seen.any(axis=-1).all():
            return weights
        return np.where(seen.any(axis=-1, keepdims=True), weights, fill(c, seen))

    return function


def _late_mask(context: Context) -> Array:
    everything = np.ones_like(_own_mask(context))
    if np.array_equal(everything, _own_mask(context)):
        raise Inapplicable
    return np.where(_own_mask(context), softmax(context.inputs[0], everything, scale=_scale(context)), 0.0)


def _unnormed(context: Context) -> Array:
    masked = np.where(_own_mask(context), context.inputs[0] * _scale(context), -np.inf)
    weights: Array = np.exp(masked - masked.max(axis=-1, keepdims=True))
    return weights


def _off_by_one_softmax(context: Context) -> Array:
    masked = np.where(_own_mask(context), context.inputs[0] * _scale(context), -np.inf)
    largest = np.maximum(masked.max(axis=-1, keepdims=True), 0.0)
    weights = np.exp(masked - largest)
    normed: Array = weights / (weights.sum(axis=-1, keepdims=True) + np.exp(-largest))
    return normed


def _sigmoid(context: Context) -> Array:
    with np.errstate(over="ignore"):
        return np.where(_own_mask(context), 1.0 / (1.0 + np.exp(-context.inputs[0] * _scale(context))), 0.0)


_BLIND = "mask off by one: a token does not see itself"

_SOFTMAX = (
    Variant("no scale", 9, SOFTMAX, "scores are not multiplied by 1/sqrt(head_dim)", _scaled_by(lambda c: 1.0)),
    Variant(
        "scale 1/head_dim",
        9,
        SOFTMAX,
        "scores are divided by head_dim (scaled twice) instead of by its root",
        _scaled_by(lambda c: 1.0 / c.config.head_dim),
    ),
    Variant(
        "scale sqrt(head_dim)",
        9,
        SOFTMAX,
        "scores are multiplied by sqrt(head_dim) instead of divided",
        _scaled_by(lambda c: float(np.sqrt(c.config.head_dim))),
    ),
    Variant(
        "scale 1/sqrt(dim)",
        9,
        SOFTMAX,
        "scores are divided by the root of dim instead of head_dim",
        _scaled_by(lambda c: float(1.0 / np.sqrt(c.config.dim))),
    ),
    Variant(
        "scale 1/sqrt(n_heads)",
        9,
        SOFTMAX,
        "scores are divided by the root of n_heads instead of head_dim",
        _scaled_by(lambda c: float(1.0 / np.sqrt(c.config.n_heads))),
    ),
    Variant(
        "base 2 instead of e",
        9,
        SOFTMAX,
        "powers of 2 instead of e (a factor log2(e) is missing)",
        _scaled_by(lambda c: float(np.log(2.0) / np.sqrt(c.config.head_dim))),
    ),
    Variant("softmax over queries", 9, SOFTMAX, "normed over the queries instead of the keys", _over_axis(1)),
    Variant("softmax over heads", 9, SOFTMAX, "normed over the heads instead of the keys", _over_axis(0)),
    Variant(
        "mask missing",
        9,
        SOFTMAX,
        "no causal mask: tokens see the future",
        _masked(lambda c: np.ones_like(_own_mask(c))),
    ),
    Variant(
        "mask off by one: a token sees the next",
        9,
        SOFTMAX,
        "the causal mask lets every token see the one after it",
        _masked(lambda c: _own_mask(c, 1)),
    ),
    Variant(
        "mask off by one: a token does not see itself (NaN)",
        9,
        SOFTMAX,
        "the causal mask hides a token from itself; the first row, fully masked, is NaN",
        _blind(lambda c, seen: np.full(seen.shape, np.nan)),
        group=_BLIND,
    ),
    Variant(
        "mask off by one: a token does not see itself (first row uniform)",
        9,
        SOFTMAX,
        "the causal mask hides a token from itself; the first row, fully masked, is uniform",
        _blind(lambda c, seen: np.full(seen.shape, 1.0 / seen.shape[-1])),
        group=_BLIND,
    ),
    Variant(
        "mask off by one: a token does not see itself (first row zero)",
        9,
        SOFTMAX,
        "the causal mask hides a token from itself; the first row, fully masked, is zero",
        _blind(lambda c, seen: np.zeros(seen.shape)),
        group=_BLIND,
    ),
    Variant(
        "mask in reverse",
        9,
        SOFTMAX,
        "tokens see themselves and the future instead of the past",
        _masked(lambda c: np.arange(c.target.shape[-1]) >= c.positions[:, None]),
    ),
    Variant(
        "mask from the pass's own start",
        9,
        SOFTMAX,
        "the causal mask counts from the start of the pass instead of the sequence",
        _masked(lambda c: np.arange(c.target.shape[-1]) <= np.asarray(c.rows)[:, None]),
    ),
    Variant(
        "mask after the softmax",
        9,
        SOFTMAX,
        "masked weights are zeroed after norming, the rest is not normed again",
        _late_mask,
    ),
    Variant("not normed", 9, SOFTMAX, "exponentials are not divided by their sum", _unnormed),
    Variant(
        "one added to the sum",
        9,
        SOFTMAX,
        "the sum of exponentials has one more term of 1 (attention sink)",
        _off_by_one_softmax,
    ),
    Variant("sigmoid instead of softmax", 9, SOFTMAX, "every score goes through a sigmoid", _sigmoid),
    Variant(
        "softmax skipped",
        9,
        SOFTMAX,
        "scaled scores are used as weights",
        lambda c: np.where(_own_mask(c), c.inputs[0] * _scale(c), 0.0),
    ),
    Variant(
        "uniform weights",
        9,
        SOFTMAX,
        "every visible key gets the same weight",
        lambda c: softmax(np.zeros_like(c.inputs[0]), _own_mask(c), scale=1.0),
    ),
)

# --- weighted sum ---------------------------------------------------------------------------------------------


def _per_head(context: Context) -> Array:
    """Return the weighted sums before merging, ``(n_heads, n_rows, head_dim)``."""
    return context.expected.reshape(context.n_rows, context.config.n_heads, -1).transpose(1, 0, 2)


def _merged_wrongly(order: tuple[int, int, int]) -> Callable[[Context], Array]:
    return lambda c: np.ascontiguousarray(_per_head(c).transpose(order)).reshape(c.n_rows, -1)


def _transposed_v(context: Context) -> Array:
    v = context.inputs[1]
    strange = v.transpose(1, 2, 0).reshape(v.shape)
    if np.array_equal(strange, v):
        raise Inapplicable
    return context.op.function(context.inputs[0], strange)


def _transposed_weights(context: Context) -> Array:
    weights = context.inputs[0]
    if weights.shape[1] != weights.shape[2]:
        raise Inapplicable
    return context.op.function(weights.transpose(0, 2, 1), context.inputs[1])


def _mean_of_values(context: Context) -> Array:
    weights = context.inputs[0]
    uniform = _own_mask_of(context, weights.shape[-1])
    return context.op.function(np.broadcast_to(uniform, weights.shape), context.inputs[1])


def _own_mask_of(context: Context, n_kv: int) -> Array:
    seen = (np.arange(n_kv) <= context.positions[:, None]).astype(np.float64)
    normed: Array = seen / seen.sum(axis=-1, keepdims=True)
    return normed


def _argmax(context: Context) -> Array:
    weights = context.inputs[0]
    hard = (np.arange(weights.shape[-1]) == weights.argmax(axis=-1)[..., None]).astype(np.float64)
    return context.op.function(hard, context.inputs[1])


_SUM = (
    Variant(
        "heads merged as (head_dim, heads)",
        9,
        KQV,
        "heads are merged feature by feature instead of head by head",
        _merged_wrongly((1, 2, 0)),
    ),
    Variant(
        "heads merged without permuting",
        9,
        KQV,
        "the (heads, tokens, head_dim) array is read as (tokens, heads · head_dim)",
        _merged_wrongly((0, 1, 2)),
    ),
    Variant("V transposed", 9, KQV, "the cache of values is read as its transpose", _transposed_v),
    Variant(
        "attention weights transposed",
        9,
        KQV,
        "the attention weights are transposed (queries and keys swapped)",
        _transposed_weights,
    ),
    Variant(
        "attention weights ignored",
        9,
        KQV,
        "values are averaged; the attention weights are not used",
        _mean_of_values,
    ),
    Variant("only the strongest key", 9, KQV, "only the value of the largest attention weight is taken", _argmax),
    Variant(
        "unscaled by the sum",
        9,
        KQV,
        "the weighted sum is multiplied by the number of visible keys",
        lambda c: c.expected * (c.positions[:, None] + 1.0),
    ),
)

VARIANTS = (*_HEADS, *_SCORES, *_SOFTMAX, *_SUM)
