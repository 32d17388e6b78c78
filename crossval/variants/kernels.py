"""Outputs that a kernel did not write, or wrote to the wrong place: any operation (families 11 and 15)."""

# mypy: disable-error-code="no-any-return"
from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from crossval import taps
from crossval.audit.bounds import BITLINEARS
from crossval.geometry import token_axis
from crossval.variants.context import Array, Context, Inapplicable, widen
from crossval.variants.variant import Variant

EVERY_OP = frozenset({*taps.LAYER_TAPS, *taps.INPUT_TAPS, *taps.HEAD_TAPS})

# --- tokens ---------------------------------------------------------------------------------------------------


def _by_token(context: Context) -> Array:
    """Return a copy of the right output with tokens in front."""
    return np.moveaxis(context.expected, context.token_axis, 0).copy()


def _back(context: Context, by_token: Array) -> Array:
    return np.moveaxis(by_token, 0, context.token_axis)


def _tail(context: Context) -> int:
    """Return how many tokens are left over after groups of four."""
    n = context.n_tokens % 4
    if n == 0 or context.n_tokens < 4 or not context.whole_pass:
        raise Inapplicable
    return n


def _tail_zero(context: Context) -> Array:
    n, out = _tail(context), _by_token(context)
    out[-n:] = 0.0
    return _back(context, out)


def _tail_before(context: Context) -> Array:
    n, out = _tail(context), _by_token(context)
    out[-n:] = out[-n - 1]
    return _back(context, out)


def _tail_first(context: Context) -> Array:
    n, out = _tail(context), _by_token(context)
    out[-n:] = out[:n].copy()
    return _back(context, out)


def _tail_shifted(context: Context) -> Array:
    n, out = _tail(context), _by_token(context)
    out[-n:] = out[-2 * n : -n].copy() if 2 * n <= out.shape[0] else out[0]
    return _back(context, out)


def _reordered(order: Callable[[int], Array]) -> Callable[[Context], Array]:
    def function(c: Context) -> Array:
        if not c.whole_pass or c.n_rows < 2:
            raise Inapplicable
        return _back(c, _by_token(c)[order(c.n_rows)])

    return function


def _zero_tokens(context: Context) -> Iterator[range]:
    """Find a run of tokens that were never written; read from what was recorded."""
    if not context.whole_pass:
        return
    found = np.moveaxis(widen(context.recorded), token_axis(context.op.output), 0)
    yield from _runs(~found.reshape(found.shape[0], -1).any(axis=-1))


def _tokens_zeroed(context: Context, tokens: range) -> Array:
    if context.n_tokens >= 4 and tokens == range(context.n_tokens - context.n_tokens % 4, context.n_tokens):
        raise Inapplicable  # has a name of its own
    out = _by_token(context)
    out[tokens.start : tokens.stop] = 0.0
    return _back(context, out)


_TOKENS = (
    Variant(
        "last n mod 4 tokens zero",
        11,
        EVERY_OP,
        "the tokens left over after groups of four were not written",
        _tail_zero,
    ),
    Variant(
        "last n mod 4 tokens hold the one before",
        11,
        EVERY_OP,
        "the tokens left over after groups of four hold the result of the token before them",
        _tail_before,
    ),
    Variant(
        "last n mod 4 tokens hold the first ones",
        11,
        EVERY_OP,
        "the tokens left over after groups of four hold the results of the first tokens",
        _tail_first,
    ),
    Variant(
        "last n mod 4 tokens hold those before",
        11,
        EVERY_OP,
        "the tokens left over after groups of four hold the results of as many tokens before them",
        _tail_shifted,
    ),
    Variant(
        "every token holds the one before",
        11,
        EVERY_OP,
        "every token holds the result of the token before",
        _reordered(lambda n: np.maximum(np.arange(n) - 1, 0)),
    ),
    Variant(
        "every token holds the one after",
        11,
        EVERY_OP,
        "every token holds the result of the token after",
        _reordered(lambda n: np.minimum(np.arange(n) + 1, n - 1)),
    ),
    Variant(
        "every token holds the first",
        11,
        EVERY_OP,
        "every token holds the first one's result",
        _reordered(lambda n: np.zeros(n, int)),
    ),
    Variant(
        "every token holds the last",
        11,
        EVERY_OP,
        "every token holds the last one's result",
        _reordered(lambda n: np.full(n, n - 1)),
    ),
    Variant(
        "tokens in reverse order",
        11,
        EVERY_OP,
        "results are stored in reverse order of the tokens",
        _reordered(lambda n: np.arange(n)[::-1]),
    ),
    Variant(
        "tokens {0.start} to {0.stop} (exclusive) zero",
        15,
        EVERY_OP,
        "the results of tokens {0.start} to {0.stop} (exclusive) were never written",
        _tokens_zeroed,
        _zero_tokens,
        group="tokens never written",
    ),
)

# --- features -------------------------------------------------------------------------------------------------


MOST_RUNS = 3


def _runs(flags: npt.ArrayLike) -> Iterator[range]:
    """Yield the longest runs of true flags and the one at the end, unless all are true (zeros occur by chance)."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], np.asarray(flags, np.bool_), [False]])))
    runs = [range(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True)]
    if len(runs) == 1 and len(runs[0]) == np.size(flags):
        return
    longest = sorted(runs, key=len, reverse=True)[:MOST_RUNS]
    yield from longest
    yield from (run for run in runs[-1:] if run.stop == np.size(flags) and run not in longest)


def _features_of(context: Context, array: Array) -> Array:
    """Return an array with its features in one last axis, tokens (and what else) in the first."""
    if context.op.name in ("kq", "kq_soft_max"):
        return array.transpose(1, 2, 0)  # heads are what threads divide
    return array.reshape(array.shape[0], -1)


def _zero_features(context: Context) -> Iterator[range]:
    """Find the slice of features that is zero in every token; read from what was recorded."""
    found = _features_of(context, widen(context.recorded))
    yield from _runs(~found.any(axis=tuple(range(found.ndim - 1))))


class _Stale(NamedTuple):
    """A slice of features that holds the pass before: which slice, and which of its tokens."""

    features: range
    end: str


def _stale_features(context: Context) -> Iterator[_Stale]:
    """Find the slices of features that still hold values of the pass before."""
    found = _features_of(context, widen(context.recorded))
    for end in ENDS:
        same = found == _features_of(context, _stale(context, end))
        for features in _runs(same.all(axis=tuple(range(found.ndim - 1)))):
            yield _Stale(features, end)


ENDS = ("first", "last")


def _stale(context: Context, end: str) -> Array:
    """Return what the pass before left for as many tokens: its first ones (same place in the buffer) or last."""
    before = context.previous[-1].get(context.op.output) if context.previous else None
    if before is None:
        raise Inapplicable
    axis, n = token_axis(context.op.output), context.recorded.shape[token_axis(context.op.output)]
    total = before.array.shape[axis]
    if total < n:
        raise Inapplicable
    rows = range(n) if end == "first" else range(total - n, total)
    taken = widen(np.take(before.array, rows, axis=axis))
    if taken.shape != context.recorded.shape:
        raise Inapplicable
    return taken


def _sliced(context: Context, features: range, content: Array | float) -> Array:
    wanted = slice(features.start, features.stop)
    if context.op.name in ("kq", "kq_soft_max"):
        out = context.expected.copy()
        out[wanted] = content if isinstance(content, float) else content[wanted]
        return out
    if context.is_flat:
        at = np.arange(context.recorded[0].size) if context.features is None else context.features
        hit = (at >= features.start) & (at < features.stop)
        new = content if isinstance(content, float) else context.flat(content)
        return np.where(hit, new, context.expected)
    out = context.expected.copy()
    flat = out.reshape(out.shape[0], -1)
    flat[:, wanted] = content if isinstance(content, float) else content.reshape(flat.shape)[:, wanted]
    return flat.reshape(out.shape)


def _all_stale(context: Context, end: str) -> Array:
    return context.flat(_stale(context, end)).copy()


_SLICE = "{0.start} to {0.stop} (exclusive)"
_STALE_SLICE = "{0.features.start} to {0.features.stop} (exclusive)"

_FEATURES = (
    Variant(
        f"features {_SLICE} zero",
        15,
        EVERY_OP,
        f"features {_SLICE} were never written: one thread's slice, or leftover rows, lost (for scores: heads)",
        lambda c, features: _sliced(c, features, 0.0),
        _zero_features,
        group="features never written",
    ),
    Variant(
        f"features {_STALE_SLICE} stale",
        15,
        EVERY_OP,
        f"features {_STALE_SLICE} still hold the values of the pass before (for scores: heads)",
        lambda c, stale: _sliced(c, stale.features, _stale(c, stale.end)),
        _stale_features,
        group="features stale",
    ),
)

_WHOLE = (
    Variant(
        "output zero", 15, EVERY_OP, "the output was never written: all zeros", lambda c: np.zeros_like(c.target)
    ),
    Variant(
        "output stale",
        15,
        EVERY_OP,
        "the output still holds the values of the pass before",
        _all_stale,
        lambda c: ENDS,
    ),
    Variant("output negated", 15, EVERY_OP - BITLINEARS, "the output has the wrong sign", lambda c: -c.expected),
)

VARIANTS = (*_TOKENS, *_FEATURES, *_WHOLE)
