"""Rows of the embedding table that belong to other token ids, or are zero: looked up in the table (family 10)."""

# mypy: disable-error-code="no-any-return"
from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from crossval.diagnose.variants.context import Array, Context, Inapplicable
from crossval.diagnose.variants.embedding import EMBED
from crossval.diagnose.variants.estimate import Estimate
from crossval.diagnose.variants.places import described
from crossval.diagnose.variants.variant import Variant
from crossval.passes import PassRecord

PROBED = 4
"""Columns of the table that are compared first."""
BLOCKS = (2, 4, 8, 16, 32, 64, 128)

# --- rows of other ids ----------------------------------------------------------------------------------------


def _found_ids(context: Context) -> Array:
    """Return for each token the id whose row of the table it holds; its own where that fits.

    Raises:
        Inapplicable: a token holds no row of the table, or all hold their own.
    """
    table, recorded, ids = context.vector, context.recorded, context.inputs[0]
    found = ids.copy()
    columns = np.linspace(0, table.shape[1] - 1, PROBED).astype(int)
    probes = table[:, columns].astype(recorded.dtype)
    for token in np.flatnonzero((recorded != table[ids]).any(axis=-1)):
        alike = np.flatnonzero((probes == recorded[token, columns]).all(axis=-1))
        same = [i for i in alike if np.array_equal(table[i].astype(recorded.dtype), recorded[token])]
        if len(same) != 1:
            raise Inapplicable
        found[token] = same[0]
    if np.array_equal(found, ids):
        raise Inapplicable
    return found


def _maps(context: Context) -> Iterator[Estimate]:
    """Find the rules that lead from each token's id to the id whose row it holds."""
    ids, found = context.inputs[0], context.once("ids found", _found_ids)
    rules = list(_rules(ids, found))
    yield from rules
    for size in () if rules else BLOCKS:
        order = _order(ids, found, size)
        if order:
            yield Estimate(
                f"token ids in another order within blocks of {size}", ("block", size, tuple(order.items()))
            )
            return


def _rules(ids: Array, found: Array) -> Iterator[Estimate]:
    """Yield rules that hold for all ids: an offset, a remainder, a limit, one row for all beyond a limit."""
    wrong = found != ids
    offsets = np.unique(found - ids)
    if offsets.size == 1:
        yield Estimate(f"token id {offsets[0]:+d}", ("offset", int(offsets[0])))
    yield from _moduli(ids, found)
    top, least = int(found.max()), int(ids[wrong].min())
    if np.array_equal(np.minimum(ids, top), found):
        yield Estimate(f"min(token id, {top})", ("limit", top))
    row, below = int(found[wrong][0]), int(ids[~wrong].max(initial=-1))
    if wrong.sum() > 1 and (found[wrong] == row).all() and least > max(row, below):
        yield Estimate(f"token id {row} for ids above {below}", ("instead", row, least))


def _moduli(ids: Array, found: Array) -> Iterator[Estimate]:
    """Find the numbers modulo which these are the ids; several: those that somebody would choose."""
    if (found > ids).any():
        return
    multiple = int(np.gcd.reduce((ids - found)[found != ids]))
    sizes = [
        n
        for n in range(int(found.max()) + 1, multiple + 1)
        if multiple % n == 0 and np.array_equal(ids % n, found)
    ]
    powers = [n for n in sizes if n & (n - 1) == 0]
    for size in powers if len(powers) == 1 else sizes:
        yield Estimate(f"token id mod {size}", ("mod", size))


def _order(ids: Array, found: Array, size: int) -> dict[int, int]:
    """Return what place within a block holds which, where that is the same in all blocks and seen twice."""
    if not np.array_equal(found // size, ids // size):
        return {}
    order = dict(zip((ids % size).tolist(), (found % size).tolist(), strict=True))
    same = all(order[int(i) % size] == int(f) % size for i, f in zip(ids, found, strict=True))
    one_to_one = len(set(order.values())) == len(order)
    return order if same and one_to_one and np.unique(ids).size > len(order) else {}


def _mapped(context: Context, rule: Estimate) -> Array:
    ids = context.inputs[0]
    kind, *numbers = rule.value
    if kind == "offset":
        taken = np.clip(ids + numbers[0], 0, context.config.vocab_size - 1)
    elif kind == "mod":
        taken = ids % numbers[0]
    elif kind == "limit":
        taken = np.minimum(ids, numbers[0])
    elif kind == "instead":
        taken = np.where(ids >= numbers[1], numbers[0], ids)
    else:
        size, order = numbers[0], dict(numbers[1])
        if not set((ids % size).tolist()) <= set(order):
            raise Inapplicable
        taken = ids // size * size + np.array([order[int(i) % size] for i in ids])
    return context.vector[taken].astype(np.float64)


# --- rows of zeros --------------------------------------------------------------------------------------------
#
# A part of the table that is missing and tokens that nobody wrote look the same. Which tokens hold zeros is held
# against their ids, in every pass that was recorded; what their places say, the kernels' variants know.


def _ids_by_content(context: Context, passes: Sequence[PassRecord]) -> tuple[set[int], set[int]]:
    """Return the ids of tokens that hold zeros and of those that do not."""
    zero: set[int] = set()
    other: set[int] = set()
    for record in passes:
        tap = record.taps.get(context.op.output)
        if tap is None:
            continue
        ids = record.plan.token_ids if tap.rows is None else [record.plan.token_ids[row] for row in tap.rows]
        for token, row in zip(ids, tap.array, strict=True):
            (other if row.any() else zero).add(token)
    return zero, other


class _Missing(NamedTuple):
    """A range of token ids, in words; and the tokens of this pass that hold zeros, as the kernels say it."""

    words: str
    first: int
    stop: int
    symptom: str


def _missing_ids(context: Context) -> Iterator[_Missing]:
    """Find a range of token ids whose rows are zero."""
    zero, other = _ids_by_content(context, context.passes)
    if not zero or not other or zero & other:
        return
    low, high = min(zero), max(zero)
    gone = np.asarray(~context.recorded.any(axis=-1))
    symptom = "output" if gone.all() else described(gone, "token")
    if low > max(other):
        words = f"from {low} on (or from a lower one above {max(other)})"
        yield _Missing(words, low, context.config.vocab_size, symptom)
    elif high < min(other):
        yield _Missing(f"up to {high} (or to a higher one below {min(other)})", 0, high + 1, symptom)
    elif len(zero) > 1 and not any(low < token < high for token in other):
        yield _Missing(f"{low} to {high}", low, high + 1, symptom)


def _missing_rows(context: Context) -> Iterator[None]:
    """Find out whether all tokens of a pass hold zeros while none with their ids holds anything.

    In passes of the same kind: decoded tokens may be looked up by other code than a prompt.
    """
    alike = [record for record in context.passes if record.plan.kind == context.plan.kind]
    zero, other = _ids_by_content(context, alike)
    if not context.recorded.any() and not zero & other:
        yield None


def _without_ids(context: Context, missing: _Missing) -> Array:
    ids = context.inputs[0]
    gone = (ids >= missing.first) & (ids < missing.stop)
    if not gone.any():
        raise Inapplicable
    return np.where(gone[:, None], 0.0, context.expected)


VARIANTS = (
    Variant(
        "rows of token ids {0.words} zero",
        10,
        EMBED,
        "the table's rows of token ids {0.words} are read as zeros: a part of the table is missing",
        _without_ids,
        _missing_ids,
        group="{0.symptom} zero",
        shown="rows of token ids from *n* on zero",
        shown_sentence="the table's rows of a range of ids are read as zeros: a part of the table is missing",
    ),
    Variant(
        "embedding rows of all tokens read as zeros",
        10,
        EMBED,
        "the embedding rows of all tokens, whose ids no other token of such passes has, are read as zeros",
        lambda context, _: np.zeros_like(context.expected),
        _missing_rows,
        group="output zero",
    ),
)
"""Beside what a kernel did not write: both have to be seen."""

FITTED = (
    Variant(
        "row of {}",
        10,
        EMBED,
        "the row that is taken is that of {}",
        _mapped,
        _maps,
        group="rows of other token ids",
    ),
)
