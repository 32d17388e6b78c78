"""The embedding done wrong: rows of other token ids, of zeros, in another format (families 10 and 12)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np

from crossval.diagnose.variants.context import Array, Context, Inapplicable
from crossval.diagnose.variants.estimate import Fit, fitted
from crossval.diagnose.variants.norms import unit
from crossval.diagnose.variants.places import described
from crossval.diagnose.variants.precision import bf16_read_as_f16, f16_read_as_bf16, truncate_bf16
from crossval.diagnose.variants.variant import Variant, on
from crossval.formats import to_bf16
from crossval.passes import PassRecord

EMBED = on("inp_embd")
PROBED = 4
"""Number of columns of the table compared first."""
BLOCKS = (2, 4, 8, 16, 32, 64, 128)


def transposed(table: Array) -> Array:
    """Return a table ``(vocab_size, dim)`` with its memory read as ``(dim, vocab_size)``."""
    return table.reshape(table.shape[1], table.shape[0]).T


def _rows(context: Context, ids: Array) -> Array:
    return context.vector[ids].astype(np.float64)


def _next_id(context: Context, offset: int) -> Array:
    return _rows(context, np.clip(context.inputs[0] + offset, 0, context.config.vocab_size - 1))


embedding = partial(Variant, family=10, ops=EMBED)
# fmt: off
VARIANTS = (
    embedding("row of token id {:+d}", "the row of token id {:+d} is taken", _next_id, lambda c: (-1, 1),
        group="row of another token id"),
    embedding("embedding scaled by the root of dim", "rows are multiplied by sqrt(dim) (Gemma, T5)",
        lambda c: c.expected * np.sqrt(c.config.dim)),
    embedding("embedding divided by the root of dim", "rows are divided by sqrt(dim)",
        lambda c: c.expected / np.sqrt(c.config.dim)),
    embedding("embedding normed", "rows are normed on the way in", lambda c: unit(c, c.expected)),
    embedding("embedding table transposed", "the table is read as (dim, vocab_size)",
        lambda c: transposed(c.vector)[c.inputs[0]].astype(np.float64)),
    Variant("embedding BF16 read as F16", "the table was stored as bfloat16 and its bits are read as binary16",
        lambda c, store: bf16_read_as_f16(c.expected, store), lambda c: (to_bf16, truncate_bf16), family=12,
        ops=EMBED),
    Variant("embedding F16 read as BF16", "the bits of binary16 values are read as bfloat16",
        lambda c: f16_read_as_bf16(c.expected), family=12, ops=EMBED),
)
# fmt: on

# --- fitted: rows of other ids --------------------------------------------------------------------------------


def _found_ids(context: Context) -> Array:
    """Return for each token the id whose row of the table it holds; its own if that fits.

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


def _maps(context: Context) -> Iterator[Fit]:
    """Find the rules that map each token's id to the id whose row it holds."""
    ids, found = context.inputs[0], context.once("ids found", _found_ids)
    rules = list(_rules(ids, found))
    yield from rules
    for size in () if rules else BLOCKS:
        order = _order(ids, found, size)
        if order:
            yield _fit(f"token ids in another order within blocks of {size}", partial(_reordered, size, order))
            return


def _fit(name: str, taken: Callable[[Array], Array]) -> Fit:
    """Return a rule by which rows are chosen, from token ids to ids."""
    return Fit(name, lambda c: _rows(c, taken(c.inputs[0])))


def _rules(ids: Array, found: Array) -> Iterator[Fit]:
    """Yield rules that hold for all ids: an offset, a remainder, a limit, one row for all above a limit."""
    wrong = found != ids
    offsets = np.unique(found - ids)
    if offsets.size == 1:
        offset = int(offsets[0])
        yield Fit(f"token id {offset:+d}", lambda c: _next_id(c, offset))
    for size in _moduli(ids, found):
        yield _fit(f"token id mod {size}", partial(_modulo, size))
    top, least = int(found.max()), int(ids[wrong].min())
    if np.array_equal(np.minimum(ids, top), found):
        yield _fit(f"min(token id, {top})", lambda ids: np.minimum(ids, top))
    row, below = int(found[wrong][0]), int(ids[~wrong].max(initial=-1))
    if wrong.sum() > 1 and (found[wrong] == row).all() and least > max(row, below):
        yield _fit(f"token id {row} for ids above {below}", lambda ids: np.where(ids >= least, row, ids))


def _modulo(size: int, ids: Array) -> Array:
    return ids % size


def _moduli(ids: Array, found: Array) -> list[int]:
    """Return the moduli that give these ids; of several, the power of two."""
    if (found > ids).any():
        return []
    multiple = int(np.gcd.reduce((ids - found)[found != ids]))
    sizes = [
        n
        for n in range(int(found.max()) + 1, multiple + 1)
        if multiple % n == 0 and np.array_equal(ids % n, found)
    ]
    powers = [n for n in sizes if n & (n - 1) == 0]
    return powers if len(powers) == 1 else sizes


def _order(ids: Array, found: Array, size: int) -> dict[int, int]:
    """Return the permutation within a block, if it is the same in all blocks and seen twice."""
    if not np.array_equal(found // size, ids // size):
        return {}
    order = dict(zip((ids % size).tolist(), (found % size).tolist(), strict=True))
    same = all(order[int(i) % size] == int(f) % size for i, f in zip(ids, found, strict=True))
    one_to_one = len(set(order.values())) == len(order)
    return order if same and one_to_one and np.unique(ids).size > len(order) else {}


def _reordered(size: int, order: dict[int, int], ids: Array) -> Array:
    if not set((ids % size).tolist()) <= set(order):
        raise Inapplicable
    return ids // size * size + np.array([order[int(i) % size] for i in ids])


FITTED = (
    fitted(
        "row of {}",
        "the row that is taken is that of {}",
        _maps,
        group="rows of other token ids",
        family=10,
        ops=EMBED,
    ),
)

# --- rows of zeros --------------------------------------------------------------------------------------------
#
# A missing part of the table and tokens that were never written look the same. Here the tokens that hold zeros are
# compared by their ids, in every recorded pass; the variants in ``kernels`` compare them by their places.


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


def _missing_ids(context: Context) -> Iterator[Fit]:
    """Find a range of token ids whose rows are zero; the group is the name of the tokens in ``kernels``."""
    zero, other = _ids_by_content(context, context.passes)
    if not zero or not other or zero & other:
        return
    low, high = min(zero), max(zero)
    gone = np.asarray(~context.recorded.any(axis=-1))
    fit = partial(Fit, group="output" if gone.all() else described(gone, "token"))
    if low > max(other):
        words = f"from {low} on (or from a lower one above {max(other)})"
        yield fit(words, partial(_without_ids, low, context.config.vocab_size))
    elif high < min(other):
        words = f"up to {high} (or to a higher one below {min(other)})"
        yield fit(words, partial(_without_ids, 0, high + 1))
    elif len(zero) > 1 and not any(low < token < high for token in other):
        yield fit(f"{low} to {high}", partial(_without_ids, low, high + 1))


def _without_ids(first: int, stop: int, context: Context) -> Array:
    ids = context.inputs[0]
    gone = (ids >= first) & (ids < stop)
    if not gone.any():
        raise Inapplicable
    return np.where(gone[:, None], 0.0, context.expected)


def _missing_rows(context: Context) -> Iterator[None]:
    """Check whether all tokens of a pass hold zeros while no token with their ids holds anything else.

    In passes of the same kind: decoded tokens may be looked up by other code than a prompt.
    """
    alike = [record for record in context.passes if record.plan.kind == context.plan.kind]
    zero, other = _ids_by_content(context, alike)
    if not context.recorded.any() and not zero & other:
        yield None


# fmt: off
MISSING = (
    fitted("rows of token ids {} zero",
        "the table's rows of token ids {} are read as zeros: a part of the table is missing", _missing_ids,
        group="{0.group} zero", shown="rows of token ids from *n* on zero",
        shown_sentence="the table's rows of a range of ids are read as zeros: a part of the table is missing",
        family=10, ops=EMBED),
    Variant("embedding rows of all tokens read as zeros",
        "the embedding rows of all tokens, whose ids no other token of such passes has, are read as zeros",
        lambda context, _: np.zeros_like(context.expected), _missing_rows, group="output zero", family=10,
        ops=EMBED),
)
# fmt: on
"""Tried together with tokens that a kernel did not write: both explanations have to be seen."""

# fmt: off
