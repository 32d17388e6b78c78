"""Permuted output rows: each recorded row is looked up among those that the product should give."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from crossval.diagnose.variants.context import Array, Context, Inapplicable
from crossval.diagnose.variants.distance import LINEAR_FLOOR
from crossval.diagnose.variants.estimate import Fit, fitted
from crossval.diagnose.variants.places import listed
from crossval.model.kinds import IntArray
from crossval.model.taps import BITLINEARS

MOST_LISTED = 16
"""Groups no larger than this are named with their complete order."""


def looked_up(recorded: Array, expected: Array) -> IntArray:
    """Return for each recorded vector the index of the equal one among the expected; -1: none, or several.

    Both ``(n, values)``; equal up to the differences of float32 sums.
    """
    size = np.linalg.norm(expected, axis=-1)
    allowed = 2 * LINEAR_FLOOR * size
    order = np.argsort(size)
    lengths = size[order]
    wanted = np.linalg.norm(recorded, axis=-1)
    first = np.searchsorted(lengths, wanted * (1 - 4 * LINEAR_FLOOR))
    last = np.searchsorted(lengths, wanted * (1 + 4 * LINEAR_FLOOR), side="right")
    found = np.full(recorded.shape[0], -1)
    for i, (a, b) in enumerate(zip(first, last, strict=True)):
        near = order[a:b]
        hits = near[np.linalg.norm(expected[near] - recorded[i], axis=-1) <= allowed[near]]
        if i in hits:
            found[i] = i
        elif hits.size and (np.abs(expected[hits] - expected[hits[0]]) <= allowed[hits[0]]).all():
            found[i] = hits[0] if hits.size == 1 else -1
    return found


def _row_orders(context: Context) -> Iterator[Fit]:
    whole = context.sampled(None)
    if not np.isfinite(whole.target).all():
        raise Inapplicable
    recorded, expected = whole.target.T, whole.expected.T  # (features, n_rows)
    n = recorded.shape[0]
    if context.n_rows == 1:  # one token: sums of other rows are often equal, so only orders that are known
        least = LINEAR_FLOOR * np.linalg.norm(recorded)
        yield from (fit for order, fit in _known_orders(n) if np.linalg.norm(expected[order] - recorded) <= least)
        return
    source = looked_up(recorded, expected)
    if np.count_nonzero(source >= 0) < 0.9 * n:
        raise Inapplicable
    shift = _shift(source)
    if shift is not None:
        yield shift
        return
    for group in (g for g in range(2, n // 2 + 1) if n % g == 0):
        inner = _inner(source, group)
        if inner is not None:
            yield _in_groups(n, inner)
            return
    if (source >= 0).all() and np.unique(source).size == n:
        moved = np.flatnonzero(source != np.arange(n))
        if moved.size < n // 2:
            name = f"{moved.size} output rows exchanged"
            said = f"{moved.size} output rows ({listed(moved)}) hold the results of each other"
            yield _fit(name, said, source)
        else:
            yield _in_groups(n, source)


def _inner(source: IntArray, group: int) -> IntArray | None:
    """Return the order within groups when it is the same in all of them."""
    inside = source - (np.arange(source.size) // group) * group
    table = np.where(source >= 0, inside, -1).reshape(-1, group)
    inner = table.max(axis=0)
    known = (table == inner) | (source.reshape(-1, group) < 0)
    if not known.all() or inner.min() < 0 or inner.max() >= group or np.array_equal(inner, np.arange(group)):
        return None
    return inner


def _shift(source: IntArray) -> Fit | None:
    """Return the constant distance between where rows are and where they belong; None: there is none."""
    n = source.size
    at = np.arange(n)
    steps = np.unique((source - at)[source >= 0] % n)
    if steps.size > 1 or steps[0] == 0:
        return None
    step = int(steps[0]) if steps[0] <= n // 2 else int(steps[0]) - n
    said = f"output row i holds the result of row i{step:+d} (counted around the end)"
    return _fit(f"output rows shifted by {step:+d}", said, (at + step) % n)


def _in_groups(n: int, inner: IntArray) -> Fit:
    """Return the same order in every group of rows; the group may be all of them."""
    how, group, at = _words(inner), inner.size, np.arange(n)
    order = at // group * group + np.tile(inner, n // group)
    where = "in the output or in the matrix"
    if group == n:
        return _fit(f"output rows {how}", f"the rows are in another order, {where}: {how}", order)
    said = f"the rows of every group of {group} are in another order, {where}: {how}"
    return _fit(f"output rows in groups of {group}: {how}", said, order)


def _words(order: IntArray) -> str:
    n, at = order.size, np.arange(order.size)
    if np.array_equal(order, at[::-1]):
        return "in reverse"
    for a in (a for a in range(2, n // 2 + 1) if n % a == 0):
        if np.array_equal(order, at.reshape(a, n // a).T.reshape(-1)):
            return f"transposed as {a} x {n // a}"
    step = int(order[0])
    if np.array_equal(order, (at + step) % n):
        return "halves exchanged" if 2 * step == n else f"rotated by {step}"
    return f"order {listed(order.tolist(), MOST_LISTED)}" if n <= MOST_LISTED else "in another order"


def _known_orders(n: int) -> Iterator[tuple[IntArray, Fit]]:
    """Yield the orders that are known, in groups of every size: reversed, transposed, halves exchanged."""
    at = np.arange(n)
    for group in (g for g in range(2, n + 1) if n % g == 0):
        own = at[:group]
        inners = [own[::-1]]
        inners += [own.reshape(a, -1).T.reshape(-1) for a in range(2, group // 2 + 1) if group % a == 0]
        if group % 2 == 0:
            inners.append(np.roll(own, group // 2))
        for inner in {inner.tobytes(): inner for inner in inners}.values():
            yield at // group * group + np.tile(inner, n // group), _in_groups(n, inner)


def _fit(name: str, sentence: str, order: IntArray) -> Fit:
    def formula(context: Context) -> Array:
        if order.size != context.recorded[0].size:
            raise Inapplicable
        needed, inverse = np.unique(order[context.looked_at], return_inverse=True)
        return context.sampled(needed).expected[:, inverse]

    return Fit(name, formula, sentence)


FITTED = (
    fitted(
        "{}",
        "{0.sentence}",
        _row_orders,
        group="output rows in another order",
        family=10,
        ops=BITLINEARS,
        shown="output rows in groups of *n*: *order*; output rows shifted by *n*; *n* output rows exchanged",
        shown_sentence="any order of the output rows, found by looking each up among the right ones",
    ),
)
"""Tried when nothing simpler explains an operation."""
