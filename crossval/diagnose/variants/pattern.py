"""Describe where and how an output deviates, when no variant explains it."""

from __future__ import annotations

import numpy as np

from crossval.diagnose.variants.context import Array, Context
from crossval.model.kinds import widen

NEGLIGIBLE = 1e-5
"""Relative to the row's root mean square: smaller deviations are rounding."""
MOST_FACTORS = 4
"""Maximum number of factors listed."""

_HEADS = ("q", "q_rope", "k", "k_rope", "v", "kqv_out")
"""Outputs whose features belong to heads."""


def describe(context: Context) -> str:
    """Return which positions, heads and features deviate from the specification, and by which factors.

    Positions are those of the sequence, features those within their head where there are heads.
    """
    recorded, expected = context.masked(context.target), context.masked(context.expected)
    bad = ~np.isfinite(recorded)
    if bad.any():
        others = tuple(i for i in range(bad.ndim) if i != context.token_axis)
        tokens = np.asarray(bad.any(axis=others))
        at = _range("position", tokens, context.positions)
        return f"{np.count_nonzero(bad)} of {recorded.size} values are not finite" + (f", {at}" if at else "")
    ours, right = (_by_head(context, a) for a in (recorded, expected))
    return _factors(context, ours, right) or _places(context, ours, right)


def _by_head(context: Context, array: Array) -> Array:
    """Return ``(n_tokens, n_heads, values)``; one head where there are none."""
    array = np.moveaxis(widen(array), context.token_axis, 0)
    if (
        array.ndim == 3
    ):  # of scores and attention weights the head is the first axis, of queries and keys the second
        return array
    n_heads = context.config.n_kv_heads if context.op.name in ("k", "k_rope", "v") else context.config.n_heads
    by_head = context.op.name in _HEADS and context.features is None
    return array.reshape(array.shape[0], n_heads if by_head else 1, -1)


# --- factors --------------------------------------------------------------------------------------------------


def _factors(context: Context, recorded: Array, expected: Array) -> str | None:
    """Return the factor of the whole output, of its tokens or of its heads; None when there is none."""
    whole = _factor(recorded.reshape(1, -1), expected.reshape(1, -1))
    if whole is not None and not _is_one(whole[0]):
        return f"the output is {whole[0]:.6g} times what it should be"
    n_tokens, n_heads = recorded.shape[:2]
    tokens = _factor(recorded.reshape(n_tokens, -1), expected.reshape(n_tokens, -1))
    if n_tokens > 1 and tokens is not None and not all(map(_is_one, tokens)):
        return f"tokens are multiplied: {_listed('position', tokens, context.positions)}"
    by_head = (np.moveaxis(a, 1, 0).reshape(n_heads, -1) for a in (recorded, expected))
    heads = _factor(*by_head)
    if n_heads > 1 and heads is not None and not all(map(_is_one, heads)):
        return f"heads are multiplied: {_listed('head', heads, np.arange(n_heads))}"
    return None


def _factor(recorded: Array, expected: Array) -> Array | None:
    """Return for each row by which factor all of it is multiplied; None when one is not, or is 0 everywhere."""
    square = np.sum(expected * expected, axis=-1)
    if not (square > 0).all() or not np.isfinite(square).all():
        return None
    factor = np.sum(recorded * expected, axis=-1) / square
    rest = np.linalg.norm(recorded - factor[:, None] * expected, axis=-1)
    return factor if (rest <= NEGLIGIBLE * np.linalg.norm(expected, axis=-1)).all() else None


def _is_one(factor: float) -> bool:
    return abs(factor - 1) <= 100 * NEGLIGIBLE


def _listed(noun: str, factors: Array, names: Array) -> str:
    """Return the factors that are not 1, with where they are; ranges of one factor together."""
    parts = []
    found = [round(float(factor), 9) for factor in factors]
    off = [i for i, factor in enumerate(found) if not _is_one(factor)]
    values = sorted({float(f"{found[i]:.6g}") for i in off})
    for value in values[:MOST_FACTORS]:
        flags = np.array([i in off and float(f"{found[i]:.6g}") == value for i in range(len(found))])
        parts.append(f"by {value:.6g} at {_range(noun, flags, names) or f'every {noun}'}")
    more = len(values) - MOST_FACTORS
    return "; ".join([*parts, *([f"by {more} more factors elsewhere"] if more > 0 else [])])


# --- places ---------------------------------------------------------------------------------------------------


def _places(context: Context, recorded: Array, expected: Array) -> str:
    """Return which positions, heads and features (of scores: keys) deviate."""
    size = np.sqrt(np.mean(expected * expected, axis=(1, 2), keepdims=True))
    off = np.abs(recorded - expected) > NEGLIGIBLE * np.maximum(size, np.finfo(np.float64).tiny)
    if not off.any():
        return f"no value deviates by more than {NEGLIGIBLE:g} of its token's size"
    axis = "key" if context.op.name in ("kq", "kq_soft_max") else "feature"
    words = [
        _range("position", off.any(axis=(1, 2)), context.positions),
        _range("head", off.any(axis=(0, 2)), np.arange(off.shape[1])),
        _range(axis, off.any(axis=(0, 1)), np.arange(off.shape[2])),
    ]
    words = [word for word in words if word]
    return f"only {', '.join(words)} deviate" if words else "all tokens and features deviate"


def _range(noun: str, flags: Array, names: Array) -> str:
    """Return ``positions 3-5`` for a strict subset; nothing when all or none are flagged."""
    at = np.flatnonzero(flags)
    if at.size in (0, flags.size):
        return ""
    found = [int(names[i]) for i in at]
    if len(found) == 1:
        return f"{noun} {found[0]}"
    if found[-1] - found[0] + 1 == len(found):
        return f"{noun}s {found[0]}-{found[-1]}"
    return f"{len(found)} of {flags.size} {noun}s (first {', '.join(map(str, found[:4]))})"
