"""Scale, mask and softmax of attention scores done wrong (family 9)."""

# mypy: disable-error-code="no-any-return"
from __future__ import annotations

from collections.abc import Callable

import numpy as np

from crossval.diagnose.variants.context import Array, Context, Inapplicable
from crossval.diagnose.variants.variant import Variant, on

SOFTMAX = on("kq_soft_max")


def right_scale(context: Context) -> float:
    """Return what scores are multiplied by."""
    return float(1.0 / np.sqrt(context.config.head_dim))


def own_mask(context: Context, offset: int = 0) -> Array:
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
        if factor(c) == right_scale(c):
            raise Inapplicable
        return softmax(c.inputs[0], own_mask(c), scale=factor(c))

    return function


def _over_axis(axis: int) -> Callable[[Context], Array]:
    """Softmax over heads or queries; where a key is visible to nobody the weights are zero."""

    def function(c: Context) -> Array:
        if c.inputs[0].shape[axis] == 1:
            raise Inapplicable
        visible = np.broadcast_to(own_mask(c), c.inputs[0].shape)
        weights = softmax(c.inputs[0], visible, scale=right_scale(c), axis=axis)
        return np.where(visible, np.nan_to_num(weights), 0.0)

    return function


def _masked(visible: Callable[[Context], Array]) -> Callable[[Context], Array]:
    def function(c: Context) -> Array:
        seen = visible(c)
        if np.array_equal(seen, own_mask(c)):
            raise Inapplicable
        return softmax(c.inputs[0], seen, scale=right_scale(c))

    return function


def _blind(fill: Callable[[Context, Array], Array]) -> Callable[[Context], Array]:
    """A token does not see itself; ``fill`` says what the first one, which then sees nothing, gets."""

    def function(c: Context) -> Array:
        seen = own_mask(c, -1)
        weights = softmax(c.inputs[0], seen, scale=right_scale(c))
        if seen.any(axis=-1).all():
            return weights
        return np.where(seen.any(axis=-1, keepdims=True), weights, fill(c, seen))

    return function


def _late_mask(context: Context) -> Array:
    everything = np.ones_like(own_mask(context))
    if np.array_equal(everything, own_mask(context)):
        raise Inapplicable
    return np.where(own_mask(context), softmax(context.inputs[0], everything, scale=right_scale(context)), 0.0)


def _unnormed(context: Context) -> Array:
    masked = np.where(own_mask(context), context.inputs[0] * right_scale(context), -np.inf)
    weights: Array = np.exp(masked - masked.max(axis=-1, keepdims=True))
    return weights


def _off_by_one_softmax(context: Context) -> Array:
    masked = np.where(own_mask(context), context.inputs[0] * right_scale(context), -np.inf)
    largest = np.maximum(masked.max(axis=-1, keepdims=True), 0.0)
    weights = np.exp(masked - largest)
    normed: Array = weights / (weights.sum(axis=-1, keepdims=True) + np.exp(-largest))
    return normed


def _sigmoid(context: Context) -> Array:
    with np.errstate(over="ignore"):
        return np.where(own_mask(context), 1.0 / (1.0 + np.exp(-context.inputs[0] * right_scale(context))), 0.0)


_BLIND = "mask off by one: a token does not see itself"

VARIANTS = (
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
        _masked(lambda c: np.ones_like(own_mask(c))),
    ),
    Variant(
        "mask off by one: a token sees the next",
        9,
        SOFTMAX,
        "the causal mask lets every token see the one after it",
        _masked(lambda c: own_mask(c, 1)),
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
        lambda c: np.where(own_mask(c), c.inputs[0] * right_scale(c), 0.0),
    ),
    Variant(
        "uniform weights",
        9,
        SOFTMAX,
        "every visible key gets the same weight",
        lambda c: softmax(np.zeros_like(c.inputs[0]), own_mask(c), scale=1.0),
    ),
)
