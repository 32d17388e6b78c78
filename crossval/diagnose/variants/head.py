"""The LM head done wrong: table, input, scale, logits in other places or capped (families 7, 9, 10 and 12)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np

from crossval.diagnose.variants.context import Array, Context, Inapplicable, head, input_scale, quantize
from crossval.diagnose.variants.embedding import transposed
from crossval.diagnose.variants.estimate import Fit, fitted, log_minimum, number
from crossval.diagnose.variants.places import listed
from crossval.diagnose.variants.precision import bf16_read_as_f16, f16_read_as_bf16, truncate_bf16
from crossval.diagnose.variants.variant import Variant, on
from crossval.formats import to_bf16, to_f16

HEAD = on("result_output")
CAPPED = on("kq", "result_output")
SAME = 2e-6
"""Logits closer than this, relative to the largest, cannot be told apart."""
MOST_VALUES = 4096
GROUPS = (2, 4, 8, 16, 32, 64, 128, 256)
MOST_LISTED = 16


def _other_table(context: Context) -> Iterator[str]:
    own = context.op.weights[0]
    return (name for name in ("token_embd.weight", "output.weight") if name != own)


def _moved(context: Context, taken: Callable[[Array], Array]) -> Array:
    """Logits in other places: the token id whose logit each id gets."""
    return head(context.sampled(taken(context.looked_at)))


def _int8_input(context: Context) -> Array:
    x = context.inputs[0]
    scale = input_scale(context, x)
    return head(context, x=quantize(context, x, scale).astype(np.float64) / scale)


def _log_softmax(context: Context) -> Array:
    logits = head(context.sampled(None))
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return context.flat(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def _f32_to_f16(context: Context) -> Array:
    if context.vector.dtype == np.float16:
        raise Inapplicable
    return head(context, change=to_f16)


def _table(name: str, change: Callable[[Array], Array]) -> Variant:
    said = f"the head's table is {name}"
    return Variant(f"head table {name}", said, lambda c: head(c, change=change), family=12, ops=HEAD)


logits = partial(Variant, family=10, ops=HEAD)
# fmt: off
VARIANTS = (
    logits("head of {}", "multiplied with {} instead of the head's own table",
        lambda c, name: head(c, table=c.array(name)), _other_table, group="head of another table"),
    logits("head table transposed", "the table is read as (dim, vocab_size)",
        lambda c: head(c, table=transposed(c.vector))),
    logits("logits shifted by {:+d}", "logits are stored {:+d} places from their token ids",
        lambda c, step: _moved(c, lambda ids: (ids - step) % c.config.vocab_size), lambda c: (-1, 1),
        group="logits shifted"),
    Variant("final norm skipped", "the head multiplies the last layer's output without the final norm",
        lambda c: head(c, x=c.round(0, c.tap(f"blk.{c.config.n_layers - 1}.l_out"))), family=7, ops=HEAD),
    Variant("head with int8 activations", "the head's input is quantised to int8", _int8_input, family=12,
        ops=HEAD),
    logits("logits divided by the root of dim", "logits are divided by sqrt(dim)",
        lambda c: c.expected / np.sqrt(c.config.dim)),
    logits("logits multiplied by the root of dim", "logits are multiplied by sqrt(dim)",
        lambda c: c.expected * np.sqrt(c.config.dim)),
    logits("soft-capped logits", "logits go through 30·tanh(x/30) (Gemma)",
        lambda c: 30.0 * np.tanh(c.expected / 30.0)),
    logits("log-probabilities", "the head returns log-probabilities, not logits", _log_softmax, deferred=True),
    logits("probabilities", "the head returns probabilities, not logits", lambda c: np.exp(_log_softmax(c)),
        deferred=True),
    _table("rounded to BF16", to_bf16),
    _table("truncated to BF16", truncate_bf16),
    _table("BF16 read as F16", bf16_read_as_f16),
    _table("BF16 read as F16", lambda t: bf16_read_as_f16(t, truncate_bf16)),
    _table("F16 read as BF16", f16_read_as_bf16),
    Variant("head table F32 rounded to F16", "a float32 table is rounded to binary16", _f32_to_f16,
        family=12, ops=HEAD),
)
# fmt: on

# --- fitted: logits in other places ---------------------------------------------------------------------------


def _unique(recorded: Array, right: Array) -> Array:
    """Return for each recorded logit the only place whose correct value it can be; -1: none, or several."""
    order = np.argsort(right)
    values, least = right[order], SAME * float(np.abs(right).max())
    first = np.searchsorted(values, recorded - least)
    stop = np.searchsorted(values, recorded + least, side="right")
    return np.where(stop - first == 1, order[np.minimum(first, order.size - 1)], -1)


def _sources(context: Context) -> Array:
    """Return for each logit the token id whose value it holds, if that is certain; else -1."""
    whole = context.sampled(None)
    if not np.isfinite(whole.target).all():
        raise Inapplicable
    found = _unique(whole.target[-1], whole.expected[-1])
    own = np.arange(found.size)
    certain = found >= 0
    if certain.sum() < max(8, found.size // 4) or (found == own)[certain].all():
        raise Inapplicable
    return found


def _orders(context: Context) -> Iterator[Fit]:
    """Find the rule by which logits are stored in the places of others."""
    found = _sources(context)
    n = found.size
    at = np.flatnonzero(found >= 0)
    step = (found[at] - at) % n
    if np.unique(step).size == 1:
        shift = int(step[0]) if 2 * step[0] <= n else int(step[0]) - n
        yield _fit(f"shifted by {-shift:+d}", lambda ids: (ids + shift) % n)
        return
    if np.array_equal(found[at], n - 1 - at):
        yield _fit("in reverse", lambda ids: n - 1 - ids)
        return
    for size in GROUPS:
        inside = _inside(found, at, size)
        if inside is not None:
            words = f": {listed(inside, MOST_LISTED)}" if size <= MOST_LISTED else ""
            yield _fit(f"in groups of {size} in another order{words}", partial(_in_groups, n, inside))
            return
    moved = at[found[at] != at]
    if moved.size <= MOST_LISTED and set(found[moved].tolist()) == set(moved.tolist()):
        words = f"of token ids {listed(moved, MOST_LISTED)} those of {listed(found[moved], MOST_LISTED)}"
        order = np.arange(n)
        order[moved] = found[moved]
        yield _fit(words, lambda ids: order[ids])


def _fit(name: str, taken: Callable[[Array], Array]) -> Fit:
    return Fit(name, lambda c: _moved(c, taken))


def _inside(found: Array, at: Array, size: int) -> Array | None:
    """Return the order within groups if it is the same in all of them and seen twice; other places keep theirs."""
    at = at[at < found.size // size * size]
    if at.size < 2 * size or (found[at] // size != at // size).any():
        return None
    order = np.full(size, -1)
    order[at % size] = found[at] % size
    if (order < 0).any() or (order[at % size] != found[at] % size).any() or np.unique(order).size != size:
        return None
    return order


def _in_groups(n: int, order: Array, ids: Array) -> Array:
    inside = ids // order.size * order.size + order[ids % order.size]
    return np.where(ids < n // order.size * order.size, inside, ids)


# --- fitted: soft caps ----------------------------------------------------------------------------------------


def _caps(context: Context) -> Iterator[Fit]:
    """Fit the limit c of c·tanh(x / c)."""
    seen = np.ones(context.target.shape, bool) if context.visible is None else context.visible
    seen = np.broadcast_to(seen, context.target.shape)
    x, y = context.expected[seen], context.target[seen]
    if not np.isfinite(y).all() or not x.any():
        return
    largest = np.argsort(np.abs(x))[-MOST_VALUES:]
    x, y = x[largest], y[largest]

    def distance(log_cap: float) -> float:
        cap = np.exp(log_cap)
        return float(np.linalg.norm(cap * np.tanh(x / cap) - y))

    cap = log_minimum(distance, float(np.log(np.abs(x).max())), 5.0)
    if cap < 100 * np.abs(x).max():
        yield Fit(number(cap, 3), lambda c: cap * np.tanh(c.expected / cap))


# fmt: off
FITTED = (
    fitted("logits {}", "logits lie {}, in the output or by the rows of the table", _orders,
        group="logits in another order",
        shown="logits shifted by *d*; logits in groups of *n* in another order; logits in reverse",
        shown_sentence="logits, or rows of the table, lie in other places: found by looking each value up",
        family=10, ops=HEAD),
    fitted("capped at {}", "values x go through c·tanh(x/c) with c = {} (soft cap)", _caps, family=9, ops=CAPPED),
)
# fmt: on
