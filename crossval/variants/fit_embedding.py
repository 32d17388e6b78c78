"""Rows of the embedding table that belong to other token ids, or are zero: looked up in the table (family 10)."""

# mypy: disable-error-code="no-any-return"
from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from crossval.variants.context import Array, Context, Inapplicable
from crossval.variants.embedding import EMBED
from crossval.variants.estimate import Estimate
from crossval.variants.variant import Variant

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
    """Find the rule that leads from each token's id to the id whose row it holds."""
    ids, found = context.inputs[0], context.once("ids found", _found_ids)
    wrong = found != ids
    offsets = np.unique(found - ids)
    if offsets.size == 1:
        yield Estimate(f"id {offsets[0]:+d}", ("offset", int(offsets[0])))
    yield from _moduli(ids, found)
    if np.array_equal(np.minimum(ids, found.max()), found):
        yield Estimate(f"min(id, {found.max()})", ("limit", int(found.max())))
    rows = np.unique(found[wrong])
    if (
        rows.size == 1
        and wrong.sum() > 1
        and ids[wrong].min() > ids[~wrong].max(initial=-1)
        and rows[0] < ids[wrong].min()
    ):
        yield Estimate(
            f"{rows[0]} for ids above {ids[~wrong].max(initial=-1)}",
            ("instead", int(rows[0]), int(ids[wrong].min())),
        )
    for size in BLOCKS:
        order = _order(ids, found, size)
        if order:
            yield Estimate(f"in another order within blocks of {size}", ("block", size, tuple(order.items())))
            break


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
        yield Estimate(f"id mod {size}", ("mod", size))


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


def _ids_by_content(context: Context) -> tuple[set[int], set[int]]:
    """Return the ids of tokens that hold zeros and of those that do not, over all passes."""
    zero: set[int] = set()
    other: set[int] = set()
    for record in context.passes:
        tap = record.taps.get(context.op.output)
        if tap is None:
            continue
        ids = record.plan.token_ids if tap.rows is None else [record.plan.token_ids[row] for row in tap.rows]
        for token, row in zip(ids, tap.array, strict=True):
            (other if row.any() else zero).add(token)
    return zero, other


def _missing_ids(context: Context) -> Iterator[Estimate]:
    """Find a range of token ids whose rows are zero."""
    zero, other = _ids_by_content(context)
    if not zero or not other or zero & other:
        return
    low, high = min(zero), max(zero)
    if low > max(other):
        yield Estimate(f"from {low} on, or from a lower one above {max(other)},", (low, context.config.vocab_size))
    elif high < min(other):
        yield Estimate(f"up to {high}, or to a higher one below {min(other)},", (0, high + 1))
    elif len(zero) > 1 and not any(low < token < high for token in other):
        yield Estimate(f"{low} to {high}", (low, high + 1))


def _without_ids(context: Context, missing: Estimate) -> Array:
    first, stop = missing.value
    ids = context.inputs[0]
    gone = (ids >= first) & (ids < stop)
    if not gone.any():
        raise Inapplicable
    return np.where(gone[:, None], 0.0, context.expected)


VARIANTS = (
    Variant(
        "rows of token ids {} zero",
        10,
        EMBED,
        "the table's rows of token ids {} are read as zeros: a part of the table is missing",
        _without_ids,
        _missing_ids,
        group="rows of zeros",
    ),
)
"""Beside what a kernel did not write: both have to be seen."""

FITTED = (
    Variant(
        "row of token id {}",
        10,
        EMBED,
        "the row that is taken is that of token id {}",
        _mapped,
        _maps,
        group="rows of other token ids",
    ),
)
