"""KV cache cells with wrong contents: other cells, zeros, another layer's (family 11)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from crossval.diagnose.variants.context import Array, Context, Inapplicable
from crossval.diagnose.variants.estimate import ROUGHLY, Fit, fitted, is_off, sources
from crossval.diagnose.variants.places import listed
from crossval.diagnose.variants.variant import Variant, on
from crossval.passes import pass_kind

READS_CACHE = on("kq", "kqv_out")
MOST_CELLS = 512
"""Number of cells tried one at a time."""
MOST_WRONG = 64
"""Number of wrong cells looked up."""
MOST_LISTED = 8

Places = Callable[[Array], tuple[Array, Array]]
"""From the positions of a pass's tokens to the cells written, and the tokens whose keys or values they get."""
SCOPES = ("this pass", "all passes", "prefill", "decode")
"""Passes in which a mistake is made; its name does not depend on them."""


def _cached_tap(context: Context) -> str:
    """Return the tap whose rows the cells hold."""
    return "k_rope" if context.op.name == "kq" else "v"


def passes(context: Context, scope: str) -> Iterator[tuple[Array, bool]]:
    """Yield the positions of every pass that wrote to the cache, and whether a mistake is made in that pass."""
    lengths = context.lengths(context.name(_cached_tap(context)))
    start = 0
    for number, n in enumerate(lengths, 1):
        this = scope == "this pass" and number == len(lengths)
        yield np.arange(start, start + n), this or scope in ("all passes", pass_kind(n, start))
        start += n


def cells_in(context: Context, inside: Array, outside: Array, scope: str) -> Array:
    """Return cells of the cache: ``inside`` those stored in passes of the scope, ``outside`` the others."""
    cells = outside.copy()
    for at, wrong in passes(context, scope):
        if wrong:
            cells[at] = inside[at]
    return cells


def _stored(places: Places) -> Callable[[Context, str], Array]:
    """Return a variant that fills the cache pass by pass, incorrectly in some."""

    def function(c: Context, scope: str) -> Array:
        right = c.inputs[1]
        cells = np.zeros_like(right)
        for at, wrong in passes(c, scope):
            to, source = places(at) if wrong else (at, at)
            cells[to] = right[source]
        return c.op.function(c.inputs[0], cells)

    return function


def _late_from_cache(context: Context, scope: str) -> Array:
    """The first token of a pass reads what the cache holds there, which may itself be wrong."""
    right = context.inputs[1]
    cells = right.copy()
    for at, wrong in passes(context, scope):
        if wrong:
            before = cells[at[:1] - 1] if at[0] else right[:1]
            cells[at] = np.concatenate([before, right[at[:-1]]])
    return context.op.function(context.inputs[0], cells)


def _changed(change: Callable[[Array, int], Array]) -> Callable[[Context], Array]:
    """Return a variant that changes the cells as they are read; those of the pass start at the given index."""

    def function(c: Context) -> Array:
        cells = c.inputs[1]
        if cells.shape[0] < 2:
            raise Inapplicable
        return c.op.function(c.inputs[0], change(cells, cells.shape[0] - c.n_tokens))

    return function


def _single_cells(context: Context) -> Iterator[Fit]:
    """Yield single cells with zeros, the cell before, or the newest; not those that have their own names."""
    n = context.raw[1].shape[0]
    start, last = n - context.n_tokens, n - 1
    for cell in _suspects(context) if n <= MOST_CELLS else ():
        own = cell == last and context.n_tokens == 1
        if not own and not (cell == 0 and start == 1):
            yield Fit(f"{cell} holds zeros", partial(_single, at=cell, source=-1))
        if cell > 0 and not own and n > 2:
            yield _holding(cell, cell - 1)
        if 0 < cell < last:
            yield _holding(cell, last)


def _holding(cell: int, source: int) -> Fit:
    name = f"{cell} holds the key or value of position {source}"
    return Fit(name, partial(_single, at=cell, source=source))


def _suspects(context: Context) -> Sequence[int]:
    """Return the cells that could each explain the deviation alone: all, if nothing deviates."""
    n = context.raw[1].shape[0]
    with np.errstate(over="ignore", invalid="ignore"):
        off = context.masked(context.target - context.expected)
    if not np.abs(off).max() < np.sqrt(np.finfo(np.float64).max):
        return ()
    if context.op.name == "kq":
        columns = (np.abs(off) > ROUGHLY * np.abs(context.expected).max()).any(axis=(0, 1))
        return range(n) if not columns.any() else np.flatnonzero(columns).tolist() if columns.sum() == 1 else ()
    rest = _unexplained(context, off)
    return range(n) if rest is None else np.flatnonzero(rest <= ROUGHLY).tolist()


def _unexplained(context: Context, off: Array) -> Array | None:
    """Return for each cell how much of a change of the weighted sums remains whatever it holds, ``(n_kv,)``.

    None: there is no significant change.
    """
    size = float(np.linalg.norm(off))
    if size <= ROUGHLY * float(np.linalg.norm(context.expected)):
        return None
    weights, change = _by_kv_head(context, off)
    squares = (weights**2).sum(axis=1)
    along = np.einsum("gkc,gkd->gcd", weights, change)
    with np.errstate(all="ignore"):
        explained = np.nan_to_num((along**2).sum(axis=-1) / squares).sum(axis=0)
    return np.sqrt(np.maximum(size**2 - explained, 0.0)) / size


def _by_kv_head(context: Context, sums: Array) -> tuple[Array, Array]:
    """Return attention weights and weighted sums, ``(n_kv_heads, heads of it · n_rows, n_kv or head_dim)``."""
    n_kv = context.config.n_kv_heads
    weights = context.inputs[0].reshape(n_kv, -1, context.inputs[0].shape[-1])
    by_head = sums.reshape(context.n_rows, context.config.n_heads, -1).transpose(1, 0, 2)
    return weights, by_head.reshape(n_kv, weights.shape[1], -1)


def _single(context: Context, at: int, source: int) -> Array:
    """Replace one cell: a change of one column of the scores, or a rank-one change of the weighted sum."""
    first, cells = context.inputs
    content = np.zeros_like(cells[at]) if source < 0 else cells[source]
    output = context.expected.copy()
    if context.op.name == "kq":
        output[..., at : at + 1] = context.op.function(first, content[None])
        return output
    repeat = context.config.n_heads // context.config.n_kv_heads
    change = np.repeat(content - cells[at], repeat, axis=0)  # (n_heads, head_dim)
    return output + (first[:, :, at].T[:, :, None] * change).reshape(output.shape)


def _store(name: str, explanation: str, stored: Callable[[Context, str], Array]) -> Variant:
    return Variant(name, explanation, stored, lambda c: SCOPES, family=11, ops=READS_CACHE)


LATE = partial(
    _store, "own cells hold the token before", "the cells of a pass's own tokens hold those of the token before"
)
EARLY = partial(_store, "own cells stored one too early", "a pass's tokens were stored one cell too early")
read = partial(Variant, family=11, ops=READS_CACHE)
# fmt: off
VARIANTS = (
    _store("own cells not written",
        "the cells of a pass's own tokens hold zeros: they were not stored before being read",
        _stored(lambda at: (at[:0], at[:0]))),
    LATE(_stored(lambda at: (at, np.maximum(at - 1, 0)))),
    LATE(_late_from_cache),
    LATE(_stored(lambda at: (at, np.maximum(at - 1, at[0])))),
    EARLY(_stored(lambda at: (np.maximum(at - 1, 0), at))),
    EARLY(_stored(lambda at: (at[at > 0] - 1, at[at > 0]))),
    _store("cache restarts at cell 0", "a pass's tokens were stored from cell 0 on",
        _stored(lambda at: (at - at[0], at))),
    read("cell 0 overwritten by the newest", "cell 0 holds what belongs to the newest token",
        _changed(lambda cells, start: np.concatenate([cells[-1:], cells[1:]]))),
    read("earlier passes forgotten", "the cells of all earlier passes hold zeros",
        _changed(lambda cells, start: np.concatenate([np.zeros_like(cells[:start]), cells[start:]]))),
    read("cells in reverse order", "cells are read from the last to the first",
        _changed(lambda cells, start: cells[::-1])),
    fitted("cell {}", "KV cell {}", _single_cells, group="one wrong KV cell", family=11, ops=READS_CACHE),
)
# fmt: on

# --- fitted: what cells hold -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Pool:
    """Cells of several caches, ``(n, n_kv_heads, head_dim)``, with their layers and positions."""

    cells: Array
    layers: Array
    positions: Array

    @property
    def flat(self) -> Array:
        """The cells as vectors."""
        return self.cells.reshape(self.cells.shape[0], -1)


def _pool(context: Context) -> _Pool:
    """Collect the cells of every recorded layer, this one first."""
    own, right = context.layer, context.inputs[1]
    assert own is not None
    cells, layers = [right], [own]
    for layer in (layer for layer in range(context.config.n_layers) if layer != own):
        try:
            other = context.cells(f"blk.{layer}.{_cached_tap(context)}")
        except Inapplicable:  # not recorded
            continue
        if other.shape == right.shape:
            cells.append(context.round(1, other))
            layers.append(layer)
    n = right.shape[0]
    return _Pool(np.concatenate(cells), np.repeat(layers, n), np.tile(np.arange(n), len(layers)))


def _wrong_keys(context: Context, pool: _Pool) -> dict[int, int]:
    """Return for each wrong cell the index of what it holds, found from its column of the scores; -1: zeros."""
    q, visible = context.inputs[0], context.visible
    assert visible is not None
    target, right = context.target, context.expected
    n_kv = target.shape[-1]
    mask = visible.T[:, None, :]  # (n_kv, 1, n_rows)
    columns, own = (array.transpose(2, 0, 1) * mask for array in (target, right))
    wrong = np.flatnonzero(is_off(columns.reshape(n_kv, -1), own.reshape(n_kv, -1), ROUGHLY))
    if not wrong.size or wrong.size > MOST_WRONG:
        raise Inapplicable
    scores = context.op.function(q, pool.cells).transpose(2, 0, 1)
    held = {}
    for cell in wrong:
        column = columns[cell].reshape(1, -1)
        if not column.any():
            held[int(cell)] = -1
            continue
        found = sources(column, (scores * mask[cell]).reshape(scores.shape[0], -1), ROUGHLY)[0]
        if found < 0:
            raise Inapplicable
        held[int(cell)] = int(found)
    return held


def _wrong_values(context: Context, pool: _Pool) -> dict[int, int]:
    """Return the same for values, from the cells that, by least squares, give the recorded sums."""
    right = context.inputs[1]
    weights, change = _by_kv_head(context, context.target - context.expected)
    if not np.isfinite(change).all():
        raise Inapplicable
    if weights.shape[1] < weights.shape[2]:
        return _wrong_value(right, pool, weights, change)
    cells = np.stack([np.linalg.lstsq(w, d, rcond=1e-7)[0] for w, d in zip(weights, change, strict=True)], axis=1)
    flat, own = (right + cells).reshape(right.shape[0], -1), right.reshape(right.shape[0], -1)
    wrong = np.flatnonzero(is_off(flat, own, ROUGHLY))
    if not wrong.size or wrong.size > MOST_WRONG:
        raise Inapplicable
    found = sources(flat[wrong], pool.flat, 1e-2)
    empty = np.linalg.norm(flat[wrong], axis=-1) <= ROUGHLY * np.linalg.norm(own[wrong], axis=-1)
    if ((found < 0) & ~empty).any():
        raise Inapplicable
    return {int(c): -1 if e else int(f) for c, f, e in zip(wrong, found, empty, strict=True)}


def _wrong_value(right: Array, pool: _Pool, grouped: Array, change: Array) -> dict[int, int]:
    """Return the single cell that explains all changes as multiples of its weights, and what it holds."""
    squares = (grouped**2).sum(axis=1)  # (n_kv_heads, n_kv)
    with np.errstate(all="ignore"):
        cells = np.einsum("gkc,gkd->cgd", grouped, change) / squares.T[..., None]
        rest = change[None] - grouped.transpose(2, 0, 1)[..., None] * cells[:, :, None]
        off = np.linalg.norm(rest.reshape(rest.shape[0], -1), axis=-1)
    cell = int(np.where(np.isfinite(off), off, np.inf).argmin())
    content = (right[cell] + cells[cell]).reshape(1, -1)
    if np.linalg.norm(content) <= ROUGHLY * np.linalg.norm(right[cell]):
        return {cell: -1}
    found = int(sources(content, pool.flat, 1e-2)[0])
    if found < 0:
        raise Inapplicable
    return {cell: found}


def _guesses(context: Context, pool: _Pool) -> dict[int, int]:
    """Try what cannot be solved for from few tokens: all cells of another layer, two cells swapped."""
    right, n = context.inputs[1], context.inputs[1].shape[0]
    change = context.target - context.expected
    least = ROUGHLY * float(np.linalg.norm(change))
    for first in range(n, pool.cells.shape[0], n):
        changed = context.op.function(context.inputs[0], pool.cells[first : first + n] - right)
        if np.linalg.norm(changed - change) <= least:
            return {cell: first + cell for cell in range(n)}
    if n > MOST_WRONG:
        raise Inapplicable
    repeat = context.config.n_heads // context.config.n_kv_heads
    wide = np.repeat(right, repeat, axis=1)  # (n_kv, n_heads, head_dim)
    weights = context.inputs[0].transpose(2, 1, 0)  # (n_kv, n_rows, n_heads)
    for a in range(n - 1):
        weight = weights[a] - weights[a + 1 :]
        changed = (weight[..., None] * (wide[a + 1 :] - wide[a])[:, None]).reshape(n - a - 1, *change.shape)
        off = np.linalg.norm((changed - change).reshape(n - a - 1, -1), axis=-1)
        if off.min() <= least:
            b = a + 1 + int(off.argmin())
            return {a: b, b: a}
    raise Inapplicable


def _found(context: Context, pool: _Pool) -> dict[int, int]:
    if context.op.name == "kq":
        return _wrong_keys(context, pool)
    try:
        return _wrong_values(context, pool)
    except Inapplicable:
        return _guesses(context, pool)


def _held(context: Context) -> Iterator[Fit]:
    """Find what the wrong cells hold, and describe it by a rule if there is one."""
    if context.inputs[1].shape[0] > MOST_CELLS:
        return
    pool = _pool(context)
    held = _found(context, pool)
    cells = np.array(sorted(held))
    content = np.array([held[int(cell)] for cell in cells])
    if (content == cells).any():
        return
    layers = {int(pool.layers[i]) for i in content if i >= 0}
    same_place = (content >= 0).all() and np.array_equal(pool.positions[content], cells)
    if (content < 0).all():
        what = "zeros"
    elif same_place and len(layers) == 1:
        what = f"those of layer {layers.pop()}"
    else:
        what = listed([int(pool.positions[i]) if i >= 0 else "zeros" for i in content], MOST_LISTED)
        if layers != {context.layer}:
            what += f" of layers {listed(sorted(layers), MOST_LISTED)}"
    everywhere = same_place and cells.size == context.inputs[1].shape[0]
    where = "all" if everywhere else listed(cells, MOST_LISTED)
    yield Fit(f"{where} read as {what}", lambda c: _with_cells(c, held))


def _with_cells(context: Context, held: Mapping[int, int]) -> Array:
    pool = _pool(context)
    cells = context.inputs[1].copy()
    for cell, content in held.items():
        if cell >= cells.shape[0] or content >= pool.cells.shape[0]:
            raise Inapplicable
        cells[cell] = 0.0 if content < 0 else pool.cells[content]
    return context.op.function(context.inputs[0], cells)


# fmt: off


# fmt: off
FITTED = (
    fitted("KV positions {}",
        "KV positions {}: their cells hold others, or scores and weights lie in other columns",
        _held, shown="KV positions *a* read as *b*",
        shown_sentence="cells hold others, zeros or another layer's, or scores and weights lie in other columns",
        family=11, ops=READS_CACHE),
)
# fmt: on
