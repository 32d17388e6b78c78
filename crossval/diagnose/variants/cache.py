"""KV cache cells that do not hold what was stored (family 11)."""

# mypy: disable-error-code="no-any-return"
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from crossval.diagnose.variants.context import Array, Context, Inapplicable
from crossval.diagnose.variants.variant import Variant, on
from crossval.passes import pass_kind

READS_CACHE = on("kq", "kqv_out")
ROUGHLY = 2e-3
"""Relative size of a deviation that roundings of an input to binary16 do not reach."""
MOST_CELLS = 512
"""Cells tried one by one."""

Write = Callable[[Array, Array, int, int], None]
"""Stores ``n`` tokens from position ``start`` on: ``(cells, right cells, start, n)``, changing ``cells``."""
SCOPES = ("this pass", "all passes", "prefill", "decode")
"""Passes in which a mistake is made; it has the same name in all of them."""


def in_scope(scope: str, start: int, n_tokens: int, *, last: bool) -> bool:
    """Return whether a mistake is made in a pass; ``last``: it is the one that is looked at."""
    kind = pass_kind(n_tokens, start)
    return scope in ("all passes", kind) or (scope == "this pass" and last)


def passes(context: Context) -> list[tuple[int, int, bool]]:
    """Return start, length and whether it is the last of every pass that wrote to the cache."""
    lengths = context.lengths("k_rope" if context.op.name == "kq" else "v")
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(int).tolist()
    return [(start, n, i == len(lengths) - 1) for i, (start, n) in enumerate(zip(starts, lengths, strict=True))]


def cells_in(context: Context, inside: Array, outside: Array, scope: str) -> Array:
    """Return cells of the cache: ``inside`` those stored in passes of the scope, ``outside`` the others."""
    cells = outside.copy()
    for start, n, last in passes(context):
        if in_scope(scope, start, n, last=last):
            cells[start : start + n] = inside[start : start + n]
    return cells


def _stored(write: Write) -> Callable[[Context, str], Array]:
    """Return a variant that fills the cache pass by pass, wrongly in some."""

    def function(c: Context, scope: str) -> Array:
        right = c.inputs[1]
        cells = np.zeros_like(right)
        for start, n, last in passes(c):
            if in_scope(scope, start, n, last=last):
                write(cells, right, start, n)
            else:
                cells[start : start + n] = right[start : start + n]
        return c.op.function(c.inputs[0], cells)

    return function


def _not_written(cells: Array, right: Array, start: int, n: int) -> None:
    pass


def _late(cells: Array, right: Array, start: int, n: int) -> None:
    cells[start : start + n] = right[np.maximum(np.arange(start, start + n) - 1, 0)]


def _late_from_cache(cells: Array, right: Array, start: int, n: int) -> None:
    before = cells[start - 1 : start].copy() if start else right[:1]
    cells[start : start + n] = np.concatenate([before, right[start : start + n - 1]])


def _late_in_pass(cells: Array, right: Array, start: int, n: int) -> None:
    cells[start : start + n] = right[np.maximum(np.arange(start, start + n) - 1, start)]


def _early(cells: Array, right: Array, start: int, n: int) -> None:
    for position in range(start, start + n):
        cells[max(position - 1, 0)] = right[position]


def _early_first_lost(cells: Array, right: Array, start: int, n: int) -> None:
    for position in range(max(start, 1), start + n):
        cells[position - 1] = right[position]


def _restarted(cells: Array, right: Array, start: int, n: int) -> None:
    cells[:n] = right[start : start + n]


def _first_overwritten(cells: Array, start: int) -> None:
    cells[0] = cells[-1]


def _forgotten(cells: Array, start: int) -> None:
    cells[:start] = 0.0


def _reversed(cells: Array, start: int) -> None:
    cells[:] = cells[::-1].copy()


def _changed(change: Callable[[Array, int], None]) -> Callable[[Context], Array]:
    """Return a variant that changes the cells as they are read; the pass's own start at the given index."""

    def function(c: Context) -> Array:
        cells = c.inputs[1].copy()
        if cells.shape[0] < 2:
            raise Inapplicable
        change(cells, cells.shape[0] - c.n_tokens)
        return c.op.function(c.inputs[0], cells)

    return function


class _Cell(tuple[int, int]):
    """A cell and what it holds: another cell's content, or -1 for zeros."""

    def __format__(self, spec: str) -> str:
        return f"{self[0]} holds {'zeros' if self[1] < 0 else f'the key or value of position {self[1]}'}"


def _cells(context: Context) -> Iterator[_Cell]:
    """Yield single cells with zeros, their neighbour before, or the newest; not those with names of their own."""
    n = context.raw[1].shape[0]
    start = n - context.n_tokens
    last = n - 1
    for cell in _suspects(context) if n <= MOST_CELLS else ():
        if not (cell == last and context.n_tokens == 1) and not (cell == 0 and start == 1):
            yield _Cell((cell, -1))
        if cell > 0 and not (cell == last and context.n_tokens == 1) and n > 2:
            yield _Cell((cell, cell - 1))
        if 0 < cell < last:
            yield _Cell((cell, last))


def _suspects(context: Context) -> Sequence[int]:
    """Return the cells any one of which could explain by itself what deviates: all, when nothing does."""
    n = context.raw[1].shape[0]
    with np.errstate(over="ignore", invalid="ignore"):
        off = context.target - context.expected
    if context.visible is not None:
        off = np.where(context.visible, off, 0.0)
    if not np.abs(off).max() < np.sqrt(np.finfo(np.float64).max):
        return ()
    if context.op.name == "kq":
        columns = (np.abs(off) > ROUGHLY * np.abs(context.expected).max()).any(axis=(0, 1))
        return range(n) if not columns.any() else np.flatnonzero(columns).tolist() if columns.sum() == 1 else ()
    rest = unexplained(context, off)
    return range(n) if rest is None else np.flatnonzero(rest <= ROUGHLY).tolist()


def unexplained(context: Context, off: Array) -> Array | None:
    """Return for each cell how much of a change of the weighted sums no other content of it explains, ``(n_kv,)``.

    None: there is no change to speak of.
    """
    size = float(np.linalg.norm(off))
    if size <= ROUGHLY * float(np.linalg.norm(context.expected)):
        return None
    n_kv = context.config.n_kv_heads
    weights = context.inputs[0].reshape(n_kv, -1, context.inputs[0].shape[-1])  # (n_kv_heads, heads · rows, cells)
    by_head = off.reshape(context.n_rows, context.config.n_heads, -1).transpose(1, 0, 2)
    change = by_head.reshape(n_kv, weights.shape[1], -1)
    squares = (weights**2).sum(axis=1)
    along = np.einsum("gkc,gkd->gcd", weights, change)
    with np.errstate(all="ignore"):
        explained = np.nan_to_num((along**2).sum(axis=-1) / squares).sum(axis=0)
    return np.sqrt(np.maximum(size**2 - explained, 0.0)) / size


def _single(context: Context, cell: _Cell) -> Array:
    """Exchange one cell: a change of one column of the scores, or a rank-one change of the weighted sum."""
    at, source = cell
    first, cells = context.inputs
    content = np.zeros_like(cells[at]) if source < 0 else cells[source]
    output = context.expected.copy()
    if context.op.name == "kq":
        output[..., at : at + 1] = context.op.function(first, content[None])
        return output
    repeat = context.config.n_heads // context.config.n_kv_heads
    change = np.repeat(content - cells[at], repeat, axis=0)  # (n_heads, head_dim)
    return output + (first[:, :, at].T[:, :, None] * change).reshape(output.shape)


def _store(name: str, explanation: str, write: Write) -> Variant:
    return Variant(name, 11, READS_CACHE, explanation, _stored(write), lambda c: SCOPES)


def _read(name: str, explanation: str, change: Callable[[Array, int], None]) -> Variant:
    return Variant(name, 11, READS_CACHE, explanation, _changed(change))


_LATE = "own cells hold the token before", "the cells of a pass's own tokens hold those of the token before"
_EARLY = "own cells stored one too early", "a pass's tokens were stored one cell too early"

VARIANTS = (
    _store(
        "own cells not written",
        "the cells of a pass's own tokens hold zeros: they were not stored before being read",
        _not_written,
    ),
    _store(*_LATE, _late),
    _store(*_LATE, _late_from_cache),
    _store(*_LATE, _late_in_pass),
    _store(*_EARLY, _early),
    _store(*_EARLY, _early_first_lost),
    _store("cache restarts at cell 0", "a pass's tokens were stored from cell 0 on", _restarted),
    _read("cell 0 overwritten by the newest", "cell 0 holds what belongs to the newest token", _first_overwritten),
    _read("earlier passes forgotten", "the cells of all earlier passes hold zeros", _forgotten),
    _read("cells in reverse order", "cells are read from the last to the first", _reversed),
    Variant("cell {}", 11, READS_CACHE, "KV cell {}", _single, _cells, group="one wrong KV cell"),
)
