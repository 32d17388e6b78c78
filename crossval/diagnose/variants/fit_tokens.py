"""Tokens that hold, or were computed from, the values of others: any map, found by comparison (family 11)."""

# mypy: disable-error-code="no-any-return"
from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from crossval.diagnose.variants.context import Array, Context, Inapplicable
from crossval.diagnose.variants.estimate import STRICT, Estimate, is_off, sources
from crossval.diagnose.variants.places import listed
from crossval.diagnose.variants.variant import Variant, on
from crossval.model import taps
from crossval.model.kinds import widen
from crossval.model.taps import BITLINEARS

MINE = frozenset({*taps.LAYER_TAPS, *taps.INPUT_TAPS, *taps.HEAD_TAPS}) - BITLINEARS
PAIRED = on("q_rope", "k_rope", "kq_soft_max", "ffn_out", "ffn_inp", "l_out")
"""Operations in which a token's wrong input can be told from a token's wrong output."""
MOST_PAIRS = 4096
"""Pairs of tokens for which an operation is computed."""
ROUGHLY = 2e-3
MOST_LISTED = 8


def _back(context: Context, by_token: Array) -> Array:
    """Bring ``(n_rows, values)`` into the shape of the output."""
    shape = np.moveaxis(context.target, context.token_axis, 0).shape
    return np.moveaxis(by_token.reshape(shape), 0, context.token_axis)


def label(found: Array, verb: str) -> str:
    """Return a map of tokens in words."""
    own = np.arange(found.size)
    wrong = np.flatnonzero(found != own)
    shifts = np.unique((found - own)[wrong])
    if shifts.size == 1 and wrong.size > 1:
        how = "before" if shifts[0] < 0 else "after"
        return f"tokens {listed(wrong, MOST_LISTED)} {verb} of the token {abs(shifts[0])} {how}"
    return f"tokens {listed(wrong, MOST_LISTED)} {verb} of tokens {listed(found[wrong], MOST_LISTED)}"


# --- results of other tokens ----------------------------------------------------------------------------------


def _orders(context: Context) -> Iterator[Estimate]:
    """Find for each token the token whose right result it holds."""
    n = context.n_rows
    if n < 2:
        return
    target, right = context.target_by_token, context.by_token(context.expected)
    limit = ROUGHLY if any(context.rounded) else STRICT
    off = is_off(target, right, limit)
    if not off.any():
        return
    found = np.where(off, _sources(context, off, target, right, limit), np.arange(n))
    if (found < 0).any():
        return
    yield Estimate(label(found, "hold the results"), found)


def _sources(context: Context, off: Array, target: Array, right: Array, limit: float) -> Array:
    """Return for each token that is off the token whose result it holds; -1: none."""
    if context.visible is None:
        return sources(target, right, limit)
    found = np.full(off.size, -1)
    if off.sum() * off.size <= MOST_PAIRS:
        scores = context.expected.transpose(1, 0, 2)
        for token in np.flatnonzero(off):  # what a token has of later keys is masked, whoever's it is
            pool = (scores * context.visible[token]).reshape(off.size, -1)
            found[token] = sources(target[token : token + 1], pool, limit)[0]
    return found


def _reordered(context: Context, fit: Estimate) -> Array:
    by_token = np.moveaxis(context.expected, context.token_axis, 0)
    if fit.value.size != context.n_rows:
        raise Inapplicable
    return np.moveaxis(by_token[fit.value], 0, context.token_axis)


# --- inputs of other tokens -----------------------------------------------------------------------------------


def _with_rows(context: Context, index: int, rows: Array) -> Array:
    """Compute the output with the rows of one input exchanged."""
    if rows.size != context.n_rows:
        raise Inapplicable
    changed = np.take(context.inputs[index], rows, axis=1 if context.op.name == "kq_soft_max" else 0)
    return context.op.function(*[changed if i == index else x for i, x in enumerate(context.inputs)])


def _input_orders(context: Context) -> Iterator[Estimate]:
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
            yield Estimate(label(found, f"read the {tap}"), (index, found))


def _read(context: Context, fit: Estimate) -> Array:
    return _with_rows(context, *fit.value)


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


def _stale(context: Context) -> Iterator[Estimate]:
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
    yield Estimate(
        f"positions {words} of passes before, in tokens {listed(wrong[:MOST_LISTED])}", (off, pool[found])
    )


def _held(context: Context, fit: Estimate) -> Array:
    off, rows = fit.value
    right = context.by_token(context.expected)
    return _back(context, np.where(off[:, None], rows, right))


FITTED = (
    Variant(
        "{}",
        15,
        MINE,
        "{}",
        _reordered,
        _orders,
        group="tokens hold another's result",
        shown="tokens *a* hold the results of tokens *b*",
        shown_sentence="tokens hold the results of others, found by looking each up among the right ones",
    ),
    Variant(
        "{}",
        11,
        PAIRED,
        "{}",
        _read,
        _input_orders,
        group="tokens read another's input",
        shown="tokens *a* read the *input* of tokens *b*",
        shown_sentence="one input was that of other tokens, found by trying each",
    ),
    Variant(
        "{}",
        11,
        MINE,
        "{}",
        _held,
        _stale,
        group="results of earlier passes",
        shown="tokens *a* still hold the results of positions *b*",
        shown_sentence="the tap was not written: it holds what it held for tokens of earlier passes",
    ),
)
