"""Outputs of any operation that a kernel did not write, or wrote to the wrong place (families 11 and 15)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import numpy as np

from crossval.diagnose.variants.context import Array, Context, Inapplicable
from crossval.diagnose.variants.estimate import Fit, fitted
from crossval.diagnose.variants.places import GROUPS, Flags, Rule, described, periods, rules, runs
from crossval.diagnose.variants.variant import EVERY_OP, Variant
from crossval.model import taps
from crossval.model.kinds import widen
from crossval.model.taps import BITLINEARS

PRODUCTS = BITLINEARS | {"result_output"}

# --- tokens ---------------------------------------------------------------------------------------------------


def _by_token(context: Context) -> Array:
    """Return a copy of the correct output with tokens on the first axis."""
    return np.moveaxis(context.expected, context.token_axis, 0).copy()


def _back(context: Context, by_token: Array) -> Array:
    return np.moveaxis(by_token, 0, context.token_axis)


class _Tokens(NamedTuple):
    """Tokens of the pass with the same symptom: the rule, and how the symptom is described."""

    rule: Rule
    symptom: str

    @property
    def verb(self) -> str:
        return "holds" if self.symptom.startswith("token ") else "hold"

    def flags(self, context: Context) -> Flags:
        if not context.whole_pass:
            raise Inapplicable
        flags = self.rule.hits(context.n_tokens)
        if not flags.any() or flags.all():
            raise Inapplicable
        return flags


def _ruled(flags: Flags) -> Iterator[_Tokens]:
    for rule in rules(flags):
        yield _Tokens(rule, described(flags, "token"))


def _tails(context: Context) -> Iterator[_Tokens]:
    """Yield the tokens left over after groups of any size."""
    if not context.whole_pass:
        return
    n = context.n_tokens
    for rest in sorted({n % group for group in GROUPS if group <= n} - {0}):
        yield from _ruled(np.arange(n) >= n - rest)


def _tail_before(context: Context, tokens: _Tokens) -> Array:
    flags, out = tokens.flags(context), _by_token(context)
    out[flags] = out[np.argmax(flags) - 1]
    return _back(context, out)


def _tail_first(context: Context, tokens: _Tokens) -> Array:
    flags, out = tokens.flags(context), _by_token(context)
    n = np.count_nonzero(flags)
    if 2 * n > flags.size:
        raise Inapplicable
    out[flags] = out[:n].copy()
    return _back(context, out)


def _tail_shifted(context: Context, tokens: _Tokens) -> Array:
    flags, out = tokens.flags(context), _by_token(context)
    n = np.count_nonzero(flags)
    if n == 1:
        raise Inapplicable  # the one before
    out[flags] = out[-2 * n : -n].copy() if 2 * n <= out.shape[0] else out[0]
    return _back(context, out)


def _reordered(order: Callable[[int], Array]) -> Callable[[Context], Array]:
    def function(c: Context) -> Array:
        if not c.whole_pass or c.n_rows < 2:
            raise Inapplicable
        return _back(c, _by_token(c)[order(c.n_rows)])

    return function


def _zero_tokens(context: Context) -> Iterator[_Tokens]:
    """Find the tokens that hold zeros in the recorded output."""
    if context.whole_pass:
        found = np.moveaxis(widen(context.recorded), context.token_axis, 0)
        yield from _ruled(np.asarray(~found.reshape(found.shape[0], -1).any(axis=-1)))


def _tokens_zeroed(context: Context, tokens: _Tokens) -> Array:
    out = _by_token(context)
    out[tokens.flags(context)] = 0.0
    return _back(context, out)


def _zero_embeddings(context: Context) -> Iterator[_Tokens]:
    """Find the tokens that hold zeros, if no other token has their ids."""
    ids = np.asarray(context.plan.token_ids)
    for tokens in _zero_tokens(context):
        flags = tokens.flags(context)
        if not np.isin(ids[flags], ids[~flags]).any():
            yield tokens


# --- features -------------------------------------------------------------------------------------------------


MOST_RUNS = 3


def _slices(flags: Flags) -> Iterator[Flags]:
    """Yield the longest runs of flags, the one at the end, and flags that repeat: zeros occur by chance."""
    if flags.all() or not flags.any():
        return
    found = runs(flags)
    longest = sorted(found, key=len, reverse=True)[:MOST_RUNS]
    longest += [run for run in found[-1:] if run.stop == flags.size and run not in longest]
    at = np.arange(flags.size)
    yield from ((at >= run.start) & (at < run.stop) for run in longest)
    if periods(flags):
        yield flags


def _features_of(context: Context, array: Array) -> Array:
    """Return an array with its features on the last axis, tokens and all other axes on the first."""
    if context.op.name in ("kq", "kq_soft_max"):
        return array.transpose(1, 2, 0)  # heads are what threads divide
    return array.reshape(array.shape[0], -1)


def _zero_features(context: Context) -> Iterator[Fit]:
    """Find the features that are zero in every token of the recorded output."""
    found = _features_of(context, widen(context.recorded))
    for flags in _slices(np.asarray(~found.any(axis=tuple(range(found.ndim - 1))))):
        yield Fit(described(flags, "feature"), partial(_sliced, flags, 0.0))


def _stale_features(context: Context) -> Iterator[Fit]:
    """Find the slices of features that still hold values of the pass before."""
    found = _features_of(context, widen(context.recorded))
    for end in ENDS:
        same = found == _features_of(context, _stale(context, end))
        for flags in _slices(same.all(axis=tuple(range(found.ndim - 1)))):
            yield Fit(described(flags, "feature"), partial(_stale_slice, flags, end))


ENDS = ("first", "last")


def _stale(context: Context, end: str) -> Array:
    """Return what the pass before left for as many tokens: its first (same place in the buffer) or last."""
    before = context.previous[-1].get(context.op.output) if context.previous else None
    if before is None:
        raise Inapplicable
    axis = context.token_axis
    n, total = context.recorded.shape[axis], before.array.shape[axis]
    if total < n:
        raise Inapplicable
    rows = range(n) if end == "first" else range(total - n, total)
    taken = widen(np.take(before.array, rows, axis=axis))
    if taken.shape != context.recorded.shape:
        raise Inapplicable
    return taken


def _stale_slice(flags: Flags, end: str, context: Context) -> Array:
    return _sliced(flags, _stale(context, end), context)


def _sliced(flags: Flags, content: Array | float, context: Context) -> Array:
    """Return the correct output with other content in some features (of scores: heads)."""
    if context.op.name in ("kq", "kq_soft_max"):
        out = context.expected.copy()
        out[flags] = content if isinstance(content, float) else content[flags]
        return out
    if context.is_flat:
        hit = flags if context.features is None else flags[context.features]
        new = content if isinstance(content, float) else context.flat(content)
        return np.where(hit, new, context.expected)
    out = context.expected.copy()
    flat = out.reshape(out.shape[0], -1)
    flat[:, flags] = content if isinstance(content, float) else content.reshape(flat.shape)[:, flags]
    return flat.reshape(out.shape)


tokens = partial(Variant, family=11, ops=EVERY_OP)
kernel = partial(Variant, family=15, ops=EVERY_OP)
product = partial(fitted, family=15, ops=PRODUCTS)
# fmt: off
VARIANTS = (
    tokens("{0.rule.words} zero", "{0.rule.words} were never written, or overwritten with zeros", _tokens_zeroed,
        _zero_tokens, group="{0.symptom} zero",
        shown="tokens from *a* on, last n mod *m* tokens, or tokens t mod *m* = *r*, zero",
        shown_sentence="the tokens left over, beyond a limit, or of one remainder were never written: zeros"),
    Variant("embedding rows of {0.rule.words} read as zeros",
        "the embedding rows of the ids of {0.rule.words}, which no other token has, are read as zeros",
        _tokens_zeroed, _zero_embeddings, group="{0.symptom} zero", family=10, ops=frozenset(taps.INPUT_TAPS)),
    tokens("{0.rule.words} {0.verb} the one before", "{0.rule.words} hold the result of the token before them",
        _tail_before, _tails, group="{0.symptom} {0.verb} the one before",
        shown="tokens from *a* on, or last n mod *m* tokens, hold the one before",
        shown_sentence="the tokens left over, or beyond a limit, hold the result of the token before them"),
    tokens("{0.rule.words} {0.verb} the first ones", "{0.rule.words} hold the results of the first tokens",
        _tail_first, _tails, group="{0.symptom} {0.verb} the first ones",
        shown="tokens from *a* on, or last n mod *m* tokens, hold the first ones",
        shown_sentence="the tokens left over, or beyond a limit, hold the results of the first tokens"),
    tokens("{0.rule.words} hold those before", "{0.rule.words} hold the results of as many tokens before them",
        _tail_shifted, _tails, group="{0.symptom} hold those before",
        shown="tokens from *a* on, or last n mod *m* tokens, hold those before",
        shown_sentence="the tokens left over, or beyond a limit, hold the results of as many tokens before them"),
    tokens("every token holds the one before", "every token holds the result of the token before",
        _reordered(lambda n: np.maximum(np.arange(n) - 1, 0))),
    tokens("every token holds the one after", "every token holds the result of the token after",
        _reordered(lambda n: np.minimum(np.arange(n) + 1, n - 1))),
    tokens("every token holds the first", "every token holds the first one's result",
        _reordered(lambda n: np.zeros(n, int))),
    tokens("every token holds the last", "every token holds the last one's result",
        _reordered(lambda n: np.full(n, n - 1))),
    tokens("tokens in reverse order", "results are stored in reverse order of the tokens",
        _reordered(lambda n: np.arange(n)[::-1])),
    fitted("{} zero",
        "{} were never written: one thread's slice, or leftover rows, lost (for scores: heads)",
        _zero_features, shown="features *a* to *b* zero",
        shown_sentence="features were never written: a thread's slice, or leftover rows, lost (for scores: heads)",
        family=15, ops=EVERY_OP - PRODUCTS),
    product("{} never written", "{} were never written: one thread's slice, or leftover rows, lost",
        _zero_features, group="{} zero", shown="features *a* to *b* never written",
        shown_sentence="features were never written: one thread's slice, or leftover rows, lost"),
    product("weight rows of {} read as zeros", "the rows of the weight that give {} are read as zeros",
        _zero_features, group="{} zero", shown="weight rows of features *a* to *b* read as zeros",
        shown_sentence="the rows of the weight that give these features are read as zeros"),
    fitted("{} stale", "{} still hold the values of the pass before (for scores: heads)",
        _stale_features, group="features stale", shown="features *a* to *b* stale",
        shown_sentence="features still hold the values of the pass before (for scores: heads)",
        family=15, ops=EVERY_OP),
    kernel("output zero", "the output was never written: all zeros", lambda c: np.zeros_like(c.target)),
    kernel("output stale", "the output still holds the values of the pass before",
        lambda c, end: c.flat(_stale(c, end)).copy(), lambda c: ENDS),
    Variant("output negated", "the output has the wrong sign", lambda c: -c.expected, family=15,
        ops=EVERY_OP - BITLINEARS),
)
# fmt: on
