"""Tokens that hold the results, or read the inputs, of others: any map, found by comparison (families 11, 15)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Literal

import numpy as np

from crossval.diagnose.variants.context import Array, Context, Inapplicable
from crossval.diagnose.variants.estimate import ROUGHLY, STRICT, Fit, fitted, is_off, sources
from crossval.diagnose.variants.places import listed
from crossval.diagnose.variants.rows import looked_up
from crossval.diagnose.variants.variant import EVERY_OP, on
from crossval.model.kinds import widen
from crossval.model.taps import BITLINEARS

PER_TOKEN = EVERY_OP - {"kq", "kq_soft_max"}
"""Operations in which a token's place decides what it sees."""
NO_PRODUCTS = EVERY_OP - BITLINEARS
PAIRED = on("q_rope", "k_rope", "kq_soft_max", "ffn_out", "ffn_inp", "l_out")
"""Operations in which a token's wrong input can be distinguished from a wrong output."""
MOST_PAIRS = 4096
"""Maximum number of token pairs for which an operation is computed."""
MOST_LISTED = 8

# --- results of other tokens ----------------------------------------------------------------------------------

How = Literal["first", "last", "reverse"]
# fmt: off
SAID: dict[How, tuple[str, str]] = {
    "first": ("tokens hold the first of their {}",
              "every token holds the result of the first token of its group of {}"),
    "last": ("tokens hold the last of their {}",
             "every token holds the result of the last token of its group of {}"),
    "reverse": ("tokens in reverse within groups of {}",
                "the results of every {} tokens are stored in reverse order"),
}
# fmt: on


def _order(how: How, group: int, n: int) -> Array:
    """Return whose result each of n tokens holds, where that is decided within groups of tokens."""
    at = np.arange(n)
    start = at - at % group
    if how == "first":
        return start
    if how == "last":
        return np.minimum(start + group, n) - 1
    return np.where(start + group <= n, 2 * start + group - 1 - at, at)


def _token_orders(context: Context) -> Iterator[Fit]:
    """Find which token's result each token holds, where that follows a rule."""
    if not context.whole_pass or context.n_rows < 2:
        raise Inapplicable
    source = looked_up(context.target_by_token, context.by_token(context.expected))
    n, at = context.n_rows, np.arange(context.n_rows)
    if (source < 0).any() or np.array_equal(source, at):
        raise Inapplicable
    for group in range(2, n + 1):
        for how, (name, said) in SAID.items():
            if np.array_equal(_order(how, group, n), source) and (how != "reverse" or group < n):
                yield Fit(name.format(group), partial(_in_groups, how, group), said.format(group))
                return
    moved = np.flatnonzero(source != at)
    words = f"tokens {listed(moved)} hold the results of tokens {listed(source[moved])}"
    yield Fit(words, partial(_reordered, source), words)


def _in_groups(how: How, group: int, context: Context) -> Array:
    return _reordered(_order(how, group, context.n_rows), context)


def _reordered(order: Array, context: Context) -> Array:
    if not context.whole_pass or order.size != context.n_rows:
        raise Inapplicable
    return np.take(context.expected, order, axis=context.token_axis)


def label(found: Array, verb: str) -> str:
    """Describe a map of tokens."""
    own = np.arange(found.size)
    wrong = np.flatnonzero(found != own)
    shifts = np.unique((found - own)[wrong])
    if shifts.size == 1 and wrong.size > 1:
        how = "before" if shifts[0] < 0 else "after"
        return f"tokens {listed(wrong, MOST_LISTED)} {verb} of the token {abs(shifts[0])} {how}"
    return f"tokens {listed(wrong, MOST_LISTED)} {verb} of tokens {listed(found[wrong], MOST_LISTED)}"


def _orders(context: Context) -> Iterator[Fit]:
    """Find for each token the token whose correct result it holds."""
    n = context.n_rows
    if n < 2:
        return
    target, right = context.target_by_token, context.by_token(context.expected)
    limit = ROUGHLY if any(context.rounded) else STRICT
    off = is_off(target, right, limit)
    if not off.any():
        return
    found = np.where(off, _sources(context, off, target, right, limit), np.arange(n))
    if (found >= 0).all():
        name = label(found, "hold the results")
        yield Fit(name, partial(_holding, found), name)


def _holding(order: Array, context: Context) -> Array:
    if order.size != context.n_rows:
        raise Inapplicable
    return np.take(context.expected, order, axis=context.token_axis)


def _sources(context: Context, off: Array, target: Array, right: Array, limit: float) -> Array:
    """Return for each token that is off the token whose result it holds; -1: none."""
    if context.visible is None:
        return sources(target, right, limit)
    found = np.full(off.size, -1)
    if off.sum() * off.size <= MOST_PAIRS:
        scores = context.expected.transpose(1, 0, 2)
        for token in np.flatnonzero(off):  # what a token has of later keys is masked
            pool = (scores * context.visible[token]).reshape(off.size, -1)
            found[token] = sources(target[token : token + 1], pool, limit)[0]
    return found


# --- inputs of other tokens -----------------------------------------------------------------------------------


def _with_rows(context: Context, index: int, rows: Array) -> Array:
    """Compute the output with the rows of one input exchanged."""
    if rows.size != context.n_rows:
        raise Inapplicable
    inputs = list(context.inputs)
    inputs[index] = np.take(inputs[index], rows, axis=1 if context.op.name == "kq_soft_max" else 0)
    return context.op.function(*inputs)


def _input_orders(context: Context) -> Iterator[Fit]:
    """Find for each token the token whose values were read as one of the inputs."""
    n = context.n_rows
    if n < 2 or n * n > MOST_PAIRS:
        return
    target, right = context.target_by_token, context.by_token(context.expected)
    off = is_off(target, right)
    if not off.any() or off.sum() * n > MOST_PAIRS:
        return
    for index, array in enumerate(context.inputs):
        if array.dtype.kind != "f":
            continue
        found = np.arange(n)
        for shift in range(1, n):  # token t with the input of token t + shift
            rows = (np.arange(n) + shift) % n
            computed = context.by_token(_with_rows(context, index, rows))
            fits = off & ~is_off(target, computed) & (found == np.arange(n))
            found = np.where(fits, rows, found)
        if not off[found == np.arange(n)].any():
            tap = context.op.inputs[index].split(".")[-1]
            name = label(found, f"read the {tap}")
            yield Fit(name, partial(_with_rows, index=index, rows=found), name)


# --- rows of the passes before --------------------------------------------------------------------------------


def _earlier(context: Context) -> tuple[Array, list[int]]:
    """Return the rows of this tap in all passes before, and their positions."""
    rows: list[Array] = []
    positions: list[int] = []
    start = 0
    for taken in context.previous:
        found = taken.get(context.op.output)
        if found is None or found.rows is not None:
            raise Inapplicable
        array = widen(found.array)
        rows.append(array.reshape(array.shape[0], -1))
        positions += range(start, start + array.shape[0])
        start += array.shape[0]
    if not rows or any(part.shape[1] != rows[0].shape[1] for part in rows):
        raise Inapplicable
    return np.concatenate(rows), positions


def _stale(context: Context) -> Iterator[Fit]:
    """Find tokens that hold what this tap held for an earlier position."""
    if context.token_axis or context.is_linear or context.features is not None:
        return
    pool, positions = _earlier(context)
    target = context.target_by_token
    if pool.shape[1] != target.shape[1]:
        return
    off = is_off(target, context.by_token(context.expected))
    found = np.where(off, sources(target, pool, 1e-7), -1)
    if not off.any() or (found[off] < 0).any():
        return
    wrong = np.flatnonzero(off)
    places = [positions[i] for i in found[off]]
    words = listed(places) if wrong.size <= MOST_LISTED else f"{listed(places[:MOST_LISTED])}, …"
    name = f"positions {words} of passes before, in tokens {listed(wrong[:MOST_LISTED])}"
    yield Fit(name, lambda c: _with_rows_of(c, off, pool[found]), name)


def _with_rows_of(context: Context, off: Array, rows: Array) -> Array:
    """Return the correct output, with the given rows for the tokens that are off."""
    by_token = np.where(off[:, None], rows, context.by_token(context.expected))
    shape = np.moveaxis(context.target, context.token_axis, 0).shape
    return np.moveaxis(by_token.reshape(shape), 0, context.token_axis)


# fmt: off
FITTED = (
    fitted("{}", "{}", _orders, group="tokens hold another's result", family=15, ops=NO_PRODUCTS,
        shown="tokens *a* hold the results of tokens *b*",
        shown_sentence="tokens hold the results of others, found by looking each up among the right ones"),
    fitted("{}", "{}", _input_orders, group="tokens read another's input", family=11, ops=PAIRED,
        shown="tokens *a* read the *input* of tokens *b*",
        shown_sentence="one input was that of other tokens, found by trying each"),
    fitted("{}", "{}", _stale, group="results of earlier passes", family=11, ops=NO_PRODUCTS,
        shown="tokens *a* still hold the results of positions *b*",
        shown_sentence="the tap was not written: it holds what it held for tokens of earlier passes"),
)
# fmt: on
LOOKED_UP = (
    fitted(
        "{}",
        "{0.sentence}",
        _token_orders,
        group="tokens hold another's result",
        family=15,
        ops=PER_TOKEN,
        shown="tokens hold the first of their *n*; tokens *a* hold the results of tokens *b*",
        shown_sentence="tokens hold the results of other tokens, found by looking each up among the right ones",
    ),
)
"""Tried before all other fits of tokens, for every operation."""
