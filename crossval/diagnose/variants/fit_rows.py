"""Outputs in another order: each recorded row or token is looked up among those that the operation should give."""

# mypy: disable-error-code="no-any-return"
from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from crossval.diagnose.variants.context import Array, Context, Inapplicable
from crossval.diagnose.variants.distance import LINEAR_FLOOR
from crossval.diagnose.variants.fit import Fit
from crossval.diagnose.variants.kernels import EVERY_OP
from crossval.diagnose.variants.places import listed
from crossval.diagnose.variants.variant import Variant
from crossval.model.kinds import IntArray
from crossval.model.taps import BITLINEARS

MOST_LISTED = 16
"""Groups no larger than this are named with their order in full."""


def looked_up(recorded: Array, expected: Array) -> IntArray:
    """Return for each recorded vector the index of the equal one among the expected; -1: none, or several.

    Both ``(n, values)``; equal within what float32 sums may differ by.
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


# --- output rows ----------------------------------------------------------------------------------------------


def _whole(context: Context) -> tuple[Array, Array]:
    """Return what was recorded and what is right, features first: ``(features, n_rows)``."""
    whole = context.sampled(None)
    if not np.isfinite(whole.target).all():
        raise Inapplicable
    return whole.target.T, whole.expected.T


def _row_orders(context: Context) -> Iterator[Fit]:
    recorded, expected = _whole(context)
    n = recorded.shape[0]
    if context.features is not None and n != context.recorded[0].size:
        raise Inapplicable
    if context.n_rows == 1:  # one token: sums of other rows are often equal, so only orders that are known
        for fit in _known_orders(n):
            moved = expected[fit.data]
            if np.linalg.norm(moved - recorded) <= LINEAR_FLOOR * np.linalg.norm(recorded):
                yield fit
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
            order = (np.arange(n) // group) * group + np.tile(inner, n // group)
            yield _order_fit(order, group, inner)
            return
    if (source >= 0).all() and np.unique(source).size == n:
        moved = np.flatnonzero(source != np.arange(n))
        if moved.size < n // 2:
            name = f"{moved.size} output rows exchanged"
            said = f"{moved.size} output rows ({listed(moved)}) hold the results of each other"
        else:
            name, said = _whole_order(source)
        yield Fit(name, said, source, "output rows in another order")


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
    n = source.size
    at = np.arange(n)
    steps = (source - at)[source >= 0] % n
    values, counts = np.unique(steps, return_counts=True)
    step = int(values[np.argmax(counts)])
    if step == 0 or counts.max() < steps.size:
        return None
    step = step if step <= n // 2 else step - n
    return Fit(
        f"output rows shifted by {step:+d}",
        f"output row i holds the result of row i{step:+d} (counted around the end)",
        (at + step) % n,
        "output rows in another order",
    )


def _order_fit(order: IntArray, group: int, inner: IntArray) -> Fit:
    how = _words(inner)
    return Fit(
        f"output rows in groups of {group}: {how}",
        f"the rows of every group of {group} are in another order, in the output or in the matrix: {how}",
        order,
        "output rows in another order",
    )


def _whole_order(source: IntArray) -> tuple[str, str]:
    how = _words(source)
    return f"output rows {how}", f"the rows are in another order, in the output or in the matrix: {how}"


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


def _known_orders(n: int) -> Iterator[Fit]:
    groups = [g for g in range(2, n + 1) if n % g == 0]
    at = np.arange(n)
    for group in groups:
        inners = {at[:group][::-1].tobytes(): at[:group][::-1]}
        for a in (a for a in range(2, group // 2 + 1) if group % a == 0):
            inner = at[:group].reshape(a, -1).T.reshape(-1)
            inners.setdefault(inner.tobytes(), inner)
        if group % 2 == 0:
            inner = np.roll(at[:group], group // 2)
            inners.setdefault(inner.tobytes(), inner)
        for inner in inners.values():
            order = (at // group) * group + np.tile(inner, n // group)
            if group == n:
                name, said = _whole_order(inner)
                yield Fit(name, said, order, "output rows in another order")
            else:
                yield _order_fit(order, group, inner)


def _in_order(context: Context, fit: Fit) -> Array:
    order: IntArray = fit.data
    if order.size != context.recorded[0].size:
        raise Inapplicable
    wanted = order if context.features is None else order[context.features]
    needed, inverse = np.unique(wanted, return_inverse=True)
    return context.sampled(needed).expected[:, inverse]


PER_TOKEN = EVERY_OP - {"kq", "kq_soft_max"}
"""There a token's place decides what it sees."""

# --- tokens ---------------------------------------------------------------------------------------------------


def _token_orders(context: Context) -> Iterator[Fit]:
    """Find which token's result each token holds, where that follows a rule."""
    if not context.whole_pass or context.n_rows < 2:
        raise Inapplicable
    source = looked_up(context.target_by_token, context.by_token(context.expected))
    n, at = context.n_rows, np.arange(context.n_rows)
    if (source < 0).any() or np.array_equal(source, at):
        raise Inapplicable
    for group in range(2, n + 1):
        start = at - at % group
        for which, order in (("first", start), ("last", np.minimum(start + group, n) - 1)):
            if np.array_equal(order, source):
                yield Fit(
                    f"tokens hold the {which} of their {group}",
                    f"every token holds the result of the {which} token of its group of {group}",
                    (f"{which}", group),
                    "tokens hold another's result",
                )
                return
        if group < n and np.array_equal(np.where(start + group <= n, 2 * start + group - 1 - at, at), source):
            yield Fit(
                f"tokens in reverse within groups of {group}",
                f"the results of every {group} tokens are stored in reverse order",
                ("reverse", group),
                "tokens hold another's result",
            )
            return
    moved = np.flatnonzero(source != at)
    yield Fit(
        f"tokens {listed(moved.tolist())} hold the results of tokens {listed(source[moved].tolist())}",
        f"tokens {listed(moved.tolist())} hold the results of tokens {listed(source[moved].tolist())}",
        source,
        "tokens hold another's result",
    )


def _of_tokens(context: Context, fit: Fit) -> Array:
    n, at = context.n_rows, np.arange(context.n_rows)
    if not context.whole_pass:
        raise Inapplicable
    if isinstance(fit.data, tuple):
        how, group = fit.data
        start = at - at % group
        order = {
            "first": start,
            "last": np.minimum(start + group, n) - 1,
            "reverse": np.where(start + group <= n, 2 * start + group - 1 - at, at),
        }[how]
    else:
        order = fit.data
    if order.size != n:
        raise Inapplicable
    return np.take(context.expected, order, axis=context.token_axis)


FITTED = (
    Variant(
        "{0.name}",
        10,
        BITLINEARS,
        "{0.sentence}",
        _in_order,
        _row_orders,
        group="{0.group}",
        shown="output rows in groups of *n*: *order*; output rows shifted by *n*; *n* output rows exchanged",
        shown_sentence="any order of the output rows, found by looking each up among the right ones",
    ),
    Variant(
        "{0.name}",
        15,
        PER_TOKEN,
        "{0.sentence}",
        _of_tokens,
        _token_orders,
        group="{0.group}",
        shown="tokens hold the first of their *n*; tokens *a* hold the results of tokens *b*",
        shown_sentence="tokens hold the results of other tokens, found by looking each up among the right ones",
    ),
)
"""Tried when nothing simpler explains an operation."""
