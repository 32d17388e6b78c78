"""Heads in the wrong place: any map from query heads to KV heads, any order of heads, by comparison (family 9)."""

# mypy: disable-error-code="no-any-return"
from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from crossval.diagnose.variants.context import Array, Context
from crossval.diagnose.variants.estimate import STRICT, Estimate, is_off, listed, sources
from crossval.diagnose.variants.variant import Variant, on
from crossval.model.kinds import rope

READS_KV = on("kq", "kqv_out")
BY_HEAD = on("q_rope", "k_rope", "kq", "kq_soft_max", "kqv_out")
ROUGHLY = 2e-3
"""Relative distance at which heads are taken for the same before it is known what an engine rounds to binary16."""
MOST_ROWS = 8
"""Tokens by which heads are compared; the output found is verified on all."""


def _some_rows(context: Context) -> Array:
    """Choose tokens late in the pass: they see most keys."""
    return np.arange(max(0, context.n_rows - MOST_ROWS), context.n_rows)


def by_head(context: Context, output: Array) -> Array:
    """Return ``(heads, n_rows, values)`` of an output; scores of later tokens are zeroed."""
    if context.visible is not None:
        output = np.where(context.visible, output, 0.0)
    if context.op.name in ("kq", "kq_soft_max"):
        return output
    if context.op.name == "kqv_out":
        output = output.reshape(context.n_rows, context.config.n_heads, -1)
    return output.transpose(1, 0, 2)


def _attended(context: Context, query_heads: Array, kv_heads: Array, rows: Array | slice = slice(None)) -> Array:
    """Return ``(heads, rows, values)``: query (or weight) head ``query_heads[h]`` with KV head ``kv_heads[h]``."""
    first, cells = context.inputs
    per_head = cells[:, kv_heads].transpose(1, 0, 2)
    if context.op.name == "kq":
        scores = first[rows][:, query_heads].transpose(1, 0, 2) @ per_head.transpose(0, 2, 1)
        visible = context.visible
        return scores if visible is None else np.where(visible[rows], scores, 0.0)
    return first[query_heads][:, rows] @ per_head


def _shaped(context: Context, heads: Array) -> Array:
    """Bring ``(heads, n_rows, values)`` into the shape of the output."""
    if context.op.name in ("kq", "kq_soft_max"):
        return heads
    rows = heads.transpose(1, 0, 2)
    return rows.reshape(context.target.shape)


# --- KV heads -------------------------------------------------------------------------------------------------


def _maps(context: Context) -> Iterator[Estimate]:
    """Find for each query head the KV head it read."""
    n, n_kv = context.config.n_heads, context.config.n_kv_heads
    if n_kv == 1:
        return
    rows = _some_rows(context)
    target = by_head(context, context.target)[:, rows]
    heads = np.arange(n)
    distance = np.stack(
        [
            np.linalg.norm((_attended(context, heads, np.full(n, j), rows) - target).reshape(n, -1), axis=-1)
            for j in range(n_kv)
        ]
    )
    found = np.where(np.isfinite(distance), distance, np.inf).argmin(axis=0)
    right = heads // (n // n_kv)
    if np.array_equal(found, right):
        return
    yield Estimate(f"{listed(found)} instead of {listed(right)}", found)


def _with_map(context: Context, fit: Estimate) -> Array:
    return _shaped(context, _attended(context, np.arange(context.config.n_heads), fit.value))


# --- order of heads -------------------------------------------------------------------------------------------


def _orders(context: Context) -> Iterator[Estimate]:
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
        yield Estimate(listed(found), found)


def _reordered(context: Context, fit: Estimate) -> Array:
    return _shaped(context, by_head(context, context.expected)[fit.value])


def _query_orders(context: Context) -> Iterator[Estimate]:
    """Find for each head the query head (or head of attention weights) it read, with its own KV head."""
    n, repeat = context.config.n_heads, context.config.n_heads // context.config.n_kv_heads
    if n == 1:
        return
    rows, heads = _some_rows(context), np.arange(n)
    target = by_head(context, context.target)[:, rows].reshape(n, -1)
    found = np.empty(n, int)
    for h in heads:
        pool = _attended(context, heads, np.full(n, h // repeat), rows).reshape(n, -1)
        found[h] = sources(target[h : h + 1], pool, ROUGHLY)[0]
    same_group = np.array_equal(found // repeat, heads // repeat)  # then the output's heads are in that order
    if (found < 0).any() or np.array_equal(found, heads) or same_group:
        return
    yield Estimate(listed(found), found)


def _with_queries(context: Context, fit: Estimate) -> Array:
    n, repeat = context.config.n_heads, context.config.n_heads // context.config.n_kv_heads
    return _shaped(context, _attended(context, fit.value, np.arange(n) // repeat))


# --- other head sizes -----------------------------------------------------------------------------------------


def _head_sizes(context: Context) -> Iterator[int]:
    """Yield other even sizes of heads that the tensor could be divided into."""
    x = context.inputs[0]
    total, own = x.shape[1] * x.shape[2], x.shape[2]
    return (size for size in range(2, total, 2) if total % size == 0 and size != own)


def _rotated_as(context: Context, head_dim: int) -> Array:
    x = context.inputs[0]
    split = x.reshape(x.shape[0], -1, head_dim)
    return rope(split, context.positions, base=context.config.rope_base).reshape(x.shape)


FITTED = (
    Variant(
        "query heads use KV heads {}",
        9,
        READS_KV,
        "query heads 0, 1, … read the KV heads {}",
        _with_map,
        _maps,
    ),
    Variant(
        "heads hold those of heads {}",
        9,
        BY_HEAD,
        "heads 0, 1, … of the output hold the results of heads {}",
        _reordered,
        _orders,
    ),
    Variant(
        "query heads read as {}",
        9,
        READS_KV,
        "heads 0, 1, … read the queries (or attention weights) of heads {}, with their own KV heads",
        _with_queries,
        _query_orders,
    ),
    Variant(
        "rotated as heads of {}",
        8,
        on("q_rope", "k_rope"),
        "the tensor is divided into heads of {} values for the rotation, with the frequencies of that size",
        _rotated_as,
        _head_sizes,
    ),
)
