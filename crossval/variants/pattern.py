"""Say in words where and how an output deviates, when no variant explains it."""

# mypy: disable-error-code="no-any-return"
from __future__ import annotations

import numpy as np

from crossval.variants.context import Array, Context, widen

NEGLIGIBLE = 1e-5
"""Relative to the row's root mean square: smaller deviations are rounding."""


def describe(context: Context) -> str:
    """Return which tokens and features deviate from the specification, and whether by one factor."""
    recorded, expected = context.target, context.expected
    if context.visible is not None:
        recorded, expected = (np.where(context.visible, a, 0.0) for a in (recorded, expected))
    n_bad = int(np.count_nonzero(~np.isfinite(recorded)))
    if n_bad:
        return f"{n_bad} of {recorded.size} values are not finite"
    factor = _factor(recorded, expected)
    if factor is not None:
        return f"the output is {factor:.6g} times what it should be"
    tokens, features = _where(context, recorded, expected)
    words = [part for part in (_range("token", tokens), _range(_axis(context), features)) if part]
    return f"only {' and '.join(words)} deviate" if words else "all tokens and features deviate"


def _factor(recorded: Array, expected: Array) -> float | None:
    square = float(np.sum(expected * expected))
    if square == 0 or not np.isfinite(square):
        return None
    factor = float(np.sum(recorded * expected)) / square
    rest = float(np.linalg.norm(recorded - factor * expected))
    exact = rest <= NEGLIGIBLE * float(np.linalg.norm(recorded)) and abs(factor - 1) > 100 * NEGLIGIBLE
    return factor if exact else None


def _where(context: Context, recorded: Array, expected: Array) -> tuple[Array, Array]:
    """Return flags of the deviating tokens and features (for scores and attention weights: keys)."""
    recorded, expected = (np.moveaxis(widen(a), context.token_axis, 0) for a in (recorded, expected))
    if context.op.name not in ("kq", "kq_soft_max"):
        recorded, expected = (a.reshape(a.shape[0], -1) for a in (recorded, expected))
    axes = tuple(range(1, expected.ndim))
    size = np.sqrt(np.mean(expected * expected, axis=axes, keepdims=True))
    off = np.abs(recorded - expected) > NEGLIGIBLE * np.maximum(size, np.finfo(np.float64).tiny)
    return off.any(axis=axes), off.any(axis=tuple(range(off.ndim - 1)))


def _axis(context: Context) -> str:
    return "key" if context.op.name in ("kq", "kq_soft_max") else "feature"


def _range(noun: str, flags: Array) -> str:
    """Return ``tokens 3-5`` for a strict subset; nothing when all or none deviate."""
    at = np.flatnonzero(flags)
    if at.size in (0, flags.size):
        return ""
    if at.size == 1:
        return f"{noun} {at[0]}"
    if at[-1] - at[0] + 1 == at.size:
        return f"{noun}s {at[0]}-{at[-1]}"
    return f"{at.size} of {flags.size} {noun}s (first {', '.join(map(str, at[:4]))})"
