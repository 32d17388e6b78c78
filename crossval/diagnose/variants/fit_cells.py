"""KV cells that hold other cells, zeros, or another layer's: each looked up by what it gave (family 11)."""

# mypy: disable-error-code="no-any-return"
from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from crossval.diagnose.variants.context import Array, Context, Inapplicable
from crossval.diagnose.variants.estimate import Estimate, is_off, sources
from crossval.diagnose.variants.places import listed
from crossval.diagnose.variants.variant import Variant, on
from crossval.model.kinds import widen
from crossval.passes import TapArray

READS_CACHE = on("kq", "kqv_out")
MOST_CELLS = 512
MOST_WRONG = 64
"""Cells that are looked up one by one."""
MOST_LISTED = 8
ROUGHLY = 2e-3
"""Relative distance at which two cells are taken for the same before the output is computed."""

# --- what a cell may hold -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Pool:
    """Cells of several caches, ``(n, n_kv_heads, head_dim)``, with their layers and positions."""

    cells: Array
    layers: Array
    positions: Array


def _cells_of(name: str, passes: Sequence[Mapping[str, TapArray]]) -> Array | None:
    parts = [taken.get(name) for taken in passes]
    whole = [widen(part.array) for part in parts if part is not None and part.rows is None]
    return np.concatenate(whole) if len(whole) == len(parts) and whole else None


def _pool(context: Context) -> _Pool:
    """Collect the cells of every layer that was recorded, this one first."""
    tap = "k_rope" if context.op.name == "kq" else "v"
    own = context.layer
    assert own is not None
    right = context.inputs[1]
    cells, layers = [right], [own]
    for layer in (layer for layer in range(context.config.n_layers) if layer != own):
        other = _cells_of(f"blk.{layer}.{tap}", [*context.previous, context.values])
        if other is not None and other.shape == right.shape:
            cells.append(context.round(1, other))
            layers.append(layer)
    n = right.shape[0]
    return _Pool(np.concatenate(cells), np.repeat(layers, n), np.tile(np.arange(n), len(layers)))


# --- which cells are wrong, and what they hold ----------------------------------------------------------------


def _wrong_keys(context: Context, pool: _Pool) -> dict[int, int]:
    """Return for each wrong cell the index of what it holds, by its column of the scores; -1: zeros."""
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
    weights, right = context.inputs
    n_kv, n_heads = right.shape[1], context.config.n_heads
    repeat = n_heads // n_kv
    target, expected = (
        array.reshape(context.n_rows, n_heads, -1).transpose(1, 0, 2)
        for array in (context.target, context.expected)
    )
    grouped = weights.reshape(n_kv, repeat * context.n_rows, -1)
    change = (target - expected).reshape(n_kv, repeat * context.n_rows, -1)
    if not np.isfinite(change).all():
        raise Inapplicable
    if grouped.shape[1] >= grouped.shape[2]:
        cells = np.stack(
            [np.linalg.lstsq(w, d, rcond=1e-7)[0] for w, d in zip(grouped, change, strict=True)], axis=1
        )
        flat, own = (right + cells).reshape(right.shape[0], -1), right.reshape(right.shape[0], -1)
        wrong = np.flatnonzero(is_off(flat, own, ROUGHLY))
        if not wrong.size or wrong.size > MOST_WRONG:
            raise Inapplicable
        found = sources(flat[wrong], pool.cells.reshape(pool.cells.shape[0], -1), 1e-2)
        empty = np.linalg.norm(flat[wrong], axis=-1) <= ROUGHLY * np.linalg.norm(own[wrong], axis=-1)
        if ((found < 0) & ~empty).any():
            raise Inapplicable
        return {int(c): -1 if e else int(f) for c, f, e in zip(wrong, found, empty, strict=True)}
    return _wrong_value(right, pool, grouped, change)


def _wrong_value(right: Array, pool: _Pool, grouped: Array, change: Array) -> dict[int, int]:
    """Return the one cell whose weights all changes are multiples of, and what it holds."""
    squares = (grouped**2).sum(axis=1)  # (n_kv_heads, n_kv)
    with np.errstate(all="ignore"):
        cells = np.einsum("gkc,gkd->cgd", grouped, change) / squares.T[..., None]
        rest = change[None] - grouped.transpose(2, 0, 1)[..., None] * cells[:, :, None]
        off = np.linalg.norm(rest.reshape(rest.shape[0], -1), axis=-1)
    cell = int(np.where(np.isfinite(off), off, np.inf).argmin())
    content = (right[cell] + cells[cell]).reshape(1, -1)
    if np.linalg.norm(content) <= ROUGHLY * np.linalg.norm(right[cell]):
        return {cell: -1}
    found = int(sources(content, pool.cells.reshape(pool.cells.shape[0], -1), 1e-2)[0])
    if found < 0:
        raise Inapplicable
    return {cell: found}


def _guesses(context: Context, pool: _Pool) -> dict[int, int]:
    """Try what few tokens cannot be solved for: all cells of another layer, two cells exchanged."""
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


def _held(context: Context) -> Iterator[Estimate]:
    """Find what the wrong cells hold, and say it as a rule where there is one."""
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
    yield Estimate(f"{where} read as {what}", {int(c): int(i) for c, i in zip(cells, content, strict=True)})


def _with_cells(context: Context, held: Estimate) -> Array:
    pool = _pool(context)
    cells = context.inputs[1].copy()
    for cell, content in held.value.items():
        if cell >= cells.shape[0] or content >= pool.cells.shape[0]:
            raise Inapplicable
        cells[cell] = 0.0 if content < 0 else pool.cells[content]
    return context.op.function(context.inputs[0], cells)


FITTED = (
    Variant(
        "KV positions {}",
        11,
        READS_CACHE,
        "KV positions {}: their cells hold others, or scores and weights lie in other columns",
        _with_cells,
        _held,
        shown="KV positions *a* read as *b*",
        shown_sentence="cells hold others, zeros or another layer's, or scores and weights lie in other columns",
    ),
)
