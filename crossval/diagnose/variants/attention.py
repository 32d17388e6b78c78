"""Attention scores and the weighted sum of values done wrong (family 9)."""

# mypy: disable-error-code="no-any-return"
from __future__ import annotations

from collections.abc import Callable

import numpy as np

from crossval.diagnose.variants.cache import SCOPES, cells_in
from crossval.diagnose.variants.context import Array, Context, Inapplicable
from crossval.diagnose.variants.variant import Variant, on
from crossval.model.kinds import rope, widen

KQ = on("kq")
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
        group="wrong kv head",
    ),
    Variant(
        "kv head off by one",
        9,
        HEADS,
        "query heads read the kv head after theirs",
        _mapped(lambda h, n, n_kv: (h // (n // n_kv) + 1) % n_kv),
        group="wrong kv head",
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


def _q_rotated_again(context: Context) -> Array:
    turned = rope(widen(context.raw[0]), context.positions, base=context.config.rope_base)
    return context.op.function(context.round(0, turned), context.inputs[1])


def _cells_rotated(context: Context, scope: str) -> Array:
    """Rotate once more what goes into the cache: V, or K a second time."""
    cells = widen(context.raw[1])
    turned = context.round(1, rope(cells, np.arange(cells.shape[0]), base=context.config.rope_base))
    return context.op.function(context.inputs[0], cells_in(context, turned, context.inputs[1], scope))


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
    Variant("q rotated again", 8, KQ, "queries are rotated a second time", _q_rotated_again),
    Variant("k rotated again", 8, KQ, "keys are rotated a second time", _cells_rotated, lambda c: SCOPES),
    Variant(
        "RoPE applied to V",
        8,
        KQV,
        "values are rotated on their way into the cache; only queries and keys should be",
        _cells_rotated,
        lambda c: SCOPES,
    ),
    Variant("V read as K", 11, KQ, "values are read where keys should be", _cells_of("v")),
    Variant("K read as V", 11, KQV, "rotated keys are read where values should be", _cells_of("k_rope")),
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

VARIANTS = (*_HEADS, *_SCORES, *_SUM)
