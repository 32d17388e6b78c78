"""Attention scores and the weighted sum of values done wrong: heads, cells, merging (families 8, 9, 11)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np

from crossval.diagnose.variants.cache import READS_CACHE, SCOPES, cells_in
from crossval.diagnose.variants.context import Array, Context, Inapplicable
from crossval.diagnose.variants.estimate import ROUGHLY, STRICT, Fit, fitted, is_off, sources
from crossval.diagnose.variants.rope import rotated_heads
from crossval.diagnose.variants.variant import Variant, on
from crossval.model.kinds import widen

KQ = on("kq")
KQV = on("kqv_out")
BY_HEAD = on("q_rope", "k_rope", "kq", "kq_soft_max", "kqv_out")
MOST_ROWS = 8
"""Number of tokens on which heads are compared; the output found is verified on all."""

# --- heads ----------------------------------------------------------------------------------------------------


def by_head(context: Context, output: Array) -> Array:
    """Return ``(heads, n_rows, values)`` of an output; scores of later tokens are zeroed."""
    output = context.masked(output)
    if context.op.name in ("kq", "kq_soft_max"):
        return output
    if context.op.name == "kqv_out":
        output = output.reshape(context.n_rows, context.config.n_heads, -1)
    return output.transpose(1, 0, 2)


def _merged(context: Context, heads: Array) -> Array:
    """Reshape ``(heads, n_rows, values)`` to the shape of the output."""
    if context.op.name in ("kq", "kq_soft_max"):
        return heads
    return heads.transpose(1, 0, 2).reshape(context.target.shape)


def attended(context: Context, query_heads: Array, kv_heads: Array, rows: Array | slice = slice(None)) -> Array:
    """Return ``(heads, rows, values)``: query (or weight) head ``query_heads[h]`` with KV head ``kv_heads[h]``."""
    first, cells = context.inputs
    per_head = cells[:, kv_heads].transpose(1, 0, 2)  # (heads, n_kv, head_dim)
    if context.op.name == "kq":
        return first[rows][:, query_heads].transpose(1, 0, 2) @ per_head.transpose(0, 2, 1)
    return first[query_heads][:, rows] @ per_head


def _with_map(context: Context, kv_heads: Array) -> Array:
    """Compute scores or sums with query head h reading the KV head ``kv_heads[h]``."""
    return _merged(context, attended(context, np.arange(context.config.n_heads), kv_heads))


def _own_kv_heads(context: Context) -> Array:
    return np.arange(context.config.n_heads) // (context.config.n_heads // context.config.n_kv_heads)


def _mapped(function: Callable[[Array, int, int], Array]) -> Callable[[Context], Array]:
    """Return a variant with another map from query heads to KV heads; inapplicable if it is the correct map."""

    def variant(c: Context) -> Array:
        heads = function(np.arange(c.config.n_heads), c.config.n_heads, c.config.n_kv_heads)
        if np.array_equal(heads, _own_kv_heads(c)):
            raise Inapplicable
        return _with_map(c, heads)

    return variant


def _unexpanded(context: Context) -> Array:
    n, n_kv = context.config.n_heads, context.config.n_kv_heads
    if n == n_kv:
        raise Inapplicable
    heads = attended(context, np.arange(n), np.minimum(np.arange(n), n_kv - 1))
    heads[n_kv:] = 0.0
    return _merged(context, heads)


# --- scores ---------------------------------------------------------------------------------------------------


def _with_first(context: Context, first: Array) -> Array:
    """Compute with other queries (or weights)."""
    return context.op.function(context.round(0, first), context.inputs[1])


def _with_cells(context: Context, cells: Array) -> Array:
    """Compute with other cells of the cache."""
    return context.op.function(context.inputs[0], context.round(1, cells))


def _cells_rotated(context: Context, scope: str) -> Array:
    """Rotate what is stored in the cache: V, or K a second time."""
    cells = widen(context.raw[1])
    turned = context.round(1, rotated_heads(context, cells, np.arange(cells.shape[0])))
    return context.op.function(context.inputs[0], cells_in(context, turned, context.inputs[1], scope))


def _q_rotated_again(context: Context) -> Array:
    return _with_first(context, rotated_heads(context, widen(context.raw[0])))


def _cells_of(tap: str) -> Callable[[Context], Array]:
    return lambda c: _with_cells(c, c.cells(c.name(tap)))


# --- weighted sum ---------------------------------------------------------------------------------------------


def _merged_wrongly(order: tuple[int, int, int]) -> Callable[[Context], Array]:
    return lambda c: by_head(c, c.expected).transpose(order).reshape(c.n_rows, -1)


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
    seen = context.mask(weights.shape[-1]).astype(np.float64)
    uniform = np.broadcast_to(seen / seen.sum(axis=-1, keepdims=True), weights.shape)
    return context.op.function(uniform, context.inputs[1])


def _argmax(context: Context) -> Array:
    weights = context.inputs[0]
    hard = (np.arange(weights.shape[-1]) == weights.argmax(axis=-1)[..., None]).astype(np.float64)
    return context.op.function(hard, context.inputs[1])


gqa = partial(Variant, family=9, ops=READS_CACHE)
rotation = partial(Variant, family=8, ops=KQ)
weighted_sum = partial(Variant, family=9, ops=KQV)
# fmt: off
VARIANTS = (
    gqa("GQA heads tiled",
        "query head h reads kv head h mod n_kv_heads (tiled) instead of h / (n_heads / n_kv_heads) (repeated)",
        _mapped(lambda h, n, n_kv: h % n_kv)),
    gqa("all heads read kv head 0", "every query head reads kv head 0", _mapped(lambda h, n, n_kv: h * 0)),
    gqa("kv heads in reverse", "kv heads are read in reverse order",
        _mapped(lambda h, n, n_kv: n_kv - 1 - h // (n // n_kv)), group="wrong kv head"),
    gqa("kv head off by one", "query heads read the kv head after theirs",
        _mapped(lambda h, n, n_kv: (h // (n // n_kv) + 1) % n_kv), group="wrong kv head"),
    gqa("kv heads not expanded",
        "only the first n_kv_heads query heads are computed, each with the kv head of its own number",
        _unexpanded),
    Variant("scaled here already", "scores are multiplied by 1/sqrt(head_dim) here already",
        lambda c: c.expected / np.sqrt(c.config.head_dim), family=9, ops=KQ),
    Variant("divided by head_dim here", "scores are divided by head_dim here",
        lambda c: c.expected / c.config.head_dim, family=9, ops=KQ),
    rotation("q not rotated", "queries are used as they were before RoPE",
        lambda c: _with_first(c, c.tap(c.name("q")))),
    rotation("k not rotated", "keys are stored as they were before RoPE", _cells_of("k")),
    rotation("q rotated again", "queries are rotated a second time", _q_rotated_again),
    rotation("k rotated again", "keys are rotated a second time", _cells_rotated, lambda c: SCOPES),
    Variant("RoPE applied to V",
        "values are rotated on their way into the cache; only queries and keys should be", _cells_rotated,
        lambda c: SCOPES, family=8, ops=KQV),
    Variant("V read as K", "values are read where keys should be", _cells_of("v"), family=11, ops=KQ),
    Variant("K read as V", "rotated keys are read where values should be", _cells_of("k_rope"), family=11,
        ops=KQV),
    weighted_sum("heads merged as (head_dim, heads)",
        "heads are merged feature by feature instead of head by head", _merged_wrongly((1, 2, 0))),
    weighted_sum("heads merged without permuting",
        "the (heads, tokens, head_dim) array is read as (tokens, heads · head_dim)", _merged_wrongly((0, 1, 2))),
    weighted_sum("V transposed", "the cache of values is read as its transpose", _transposed_v),
    weighted_sum("attention weights transposed",
        "the attention weights are transposed (queries and keys swapped)", _transposed_weights),
    weighted_sum("attention weights ignored", "values are averaged; the attention weights are not used",
        _mean_of_values),
    weighted_sum("only the strongest key", "only the value of the largest attention weight is taken", _argmax),
    weighted_sum("unscaled by the sum", "the weighted sum is multiplied by the number of visible keys",
        lambda c: c.expected * (c.positions[:, None] + 1.0)),
)
# fmt: on

# --- fitted: any map, any order -------------------------------------------------------------------------------


def _some_rows(context: Context) -> Array:
    """Choose tokens late in the pass: they see most keys."""
    return np.arange(max(0, context.n_rows - MOST_ROWS), context.n_rows)


def _seen(context: Context, heads: Array, rows: Array) -> Array:
    """Return heads as vectors, ``(heads, rows · values)``; scores of later tokens are zeroed."""
    if context.visible is not None:
        heads = np.where(context.visible[rows], heads, 0.0)
    return heads.reshape(heads.shape[0], -1)


def listed(values: Array) -> str:
    """Return ``(0, 1, 0, 1)``."""
    return f"({', '.join(str(int(v)) for v in values)})"


def _maps(context: Context) -> Iterator[Fit]:
    """Find for each query head the KV head it read."""
    n, n_kv = context.config.n_heads, context.config.n_kv_heads
    if n_kv == 1:
        return
    rows, right = _some_rows(context), _own_kv_heads(context)
    target = by_head(context, context.target)[:, rows].reshape(n, -1)
    of_head = (_seen(context, attended(context, np.arange(n), np.full(n, j), rows), rows) for j in range(n_kv))
    distance = np.stack([np.linalg.norm(one - target, axis=-1) for one in of_head])
    found = np.where(np.isfinite(distance), distance, np.inf).argmin(axis=0)
    if not np.array_equal(found, right):
        yield Fit(f"{listed(found)} instead of {listed(right)}", lambda c: _with_map(c, found))


def _orders(context: Context) -> Iterator[Fit]:
    """Find for each head of the output the head whose result it holds."""
    target, right = (by_head(context, array) for array in (context.target, context.expected))
    n = target.shape[0]
    if n == 1:
        return
    flat, pool = target.reshape(n, -1), right.reshape(n, -1)
    limit = ROUGHLY if any(context.rounded) else STRICT
    off = is_off(flat, pool, limit)
    found = np.where(off, sources(flat, pool, limit), np.arange(n))
    if off.any() and (found >= 0).all():
        yield Fit(listed(found), lambda c: _merged(c, by_head(c, c.expected)[found]))


def _query_orders(context: Context) -> Iterator[Fit]:
    """Find for each head the query head (or head of attention weights) it read, with its own KV head."""
    n, own = context.config.n_heads, _own_kv_heads(context)
    if n == 1:
        return
    rows, heads = _some_rows(context), np.arange(n)
    target = by_head(context, context.target)[:, rows].reshape(n, -1)
    found = np.empty(n, int)
    for h in heads:
        pool = _seen(context, attended(context, heads, np.full(n, own[h]), rows), rows)
        found[h] = sources(target[h : h + 1], pool, ROUGHLY)[0]
    same_group = np.array_equal(own[found], own)  # then the output's heads are in that order
    if (found >= 0).all() and not np.array_equal(found, heads) and not same_group:
        yield Fit(listed(found), lambda c: _merged(c, attended(c, found, own)))


fitted_heads = partial(fitted, family=9, ops=READS_CACHE)
# fmt: off
FITTED = (
    fitted_heads("query heads use KV heads {}", "query heads 0, 1, … read the KV heads {}", _maps),
    fitted("heads hold those of heads {}", "heads 0, 1, … of the output hold the results of heads {}", _orders,
        family=9, ops=BY_HEAD),
    fitted_heads("query heads read as {}",
        "heads 0, 1, … read the queries (or attention weights) of heads {}, with their own KV heads",
        _query_orders),
)
# fmt: on
