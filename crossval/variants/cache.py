"""KV cache cells that do not hold what was stored (family 11)."""

# mypy: disable-error-code="no-any-return"
from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from crossval.variants.context import Array, Context, Inapplicable
from crossval.variants.variant import Variant, on

READS_CACHE = on("kq", "kqv_out")
MOST_CELLS = 512
"""Cells tried one by one."""

CellChange = Callable[[Array, int], None]
"""Changes cells ``(n_kv, n_kv_heads, head_dim)`` in place; the pass's own ones start at the given index."""


def _own_zero(cells: Array, start: int) -> None:
    cells[start:] = 0.0


def _own_late(cells: Array, start: int) -> None:
    cells[start:] = cells[start - 1 : -1].copy()


def _all_late(cells: Array, start: int) -> None:
    cells[1:] = cells[:-1].copy()


def _first_overwritten(cells: Array, start: int) -> None:
    cells[0] = cells[-1]


def _early(cells: Array, start: int) -> None:
    cells[start - 1 : -1] = cells[start:].copy()
    cells[-1] = 0.0


def _restarted(cells: Array, start: int) -> None:
    own = cells[start:].copy()
    cells[start:] = 0.0
    cells[: len(own)] = own


def _forgotten(cells: Array, start: int) -> None:
    cells[:start] = 0.0


def _reversed(cells: Array, start: int) -> None:
    cells[:] = cells[::-1].copy()


def _changed(change: CellChange, *, later_pass: bool = False) -> Callable[[Context], Array]:
    def function(c: Context) -> Array:
        cells = c.inputs[1]
        start = cells.shape[0] - c.n_tokens
        if cells.shape[0] < 2 or (later_pass and start == 0):
            raise Inapplicable
        cells = cells.copy()
        change(cells, start)
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
    for cell in range(n if n <= MOST_CELLS else 0):
        if not (cell == last and context.n_tokens == 1) and not (cell == 0 and start == 1):
            yield _Cell((cell, -1))
        if cell > 0 and not (cell == last and context.n_tokens == 1) and n > 2:
            yield _Cell((cell, cell - 1))
        if 0 < cell < last:
            yield _Cell((cell, last))


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


def _named(name: str, explanation: str, change: CellChange, *, later_pass: bool = False) -> Variant:
    return Variant(name, 11, READS_CACHE, explanation, _changed(change, later_pass=later_pass))


VARIANTS = (
    _named(
        "own cells not written",
        "the cells of this pass's own tokens hold zeros: they were not stored before being read",
        _own_zero,
        later_pass=True,
    ),
    _named(
        "own cells hold the token before",
        "the cells of this pass's own tokens hold those of the token before",
        _own_late,
        later_pass=True,
    ),
    _named("every cell holds the token before", "every cell holds what belongs one position later", _all_late),
    _named(
        "cell 0 overwritten by the newest", "cell 0 holds what belongs to the newest token", _first_overwritten
    ),
    _named(
        "own cells stored one too early",
        "this pass's tokens were stored one cell too early; the last cell is empty",
        _early,
        later_pass=True,
    ),
    _named(
        "cache restarts at cell 0",
        "this pass's tokens were stored from cell 0 on; their own cells are empty",
        _restarted,
        later_pass=True,
    ),
    _named("earlier passes forgotten", "the cells of all earlier passes hold zeros", _forgotten, later_pass=True),
    _named("cells in reverse order", "cells are read from the last to the first", _reversed),
    Variant(
        "cell {}",
        11,
        READS_CACHE,
        "KV cell {}",
        _single,
        _cells,
        group="one wrong KV cell",
    ),
)
