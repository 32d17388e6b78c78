"""The types that the embedding and the LM head may have in a file: their rows, and which values are usable.

Every value of a type in blocks is ``d * scale * code``: ``d`` one float16 a block, an integer scale for 16 values
(Q6_K, Q3_K) and an integer code. ``csrc/tables.c`` decodes them; layouts: llama.cpp ggml-common.h.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from bitnet_py import _native
from bitnet_py.ggml_types import BLOCK_LAYOUT, GGMLType

TABLE_TYPES: tuple[GGMLType, ...] = (
    GGMLType.F16,
    GGMLType.F32,
    GGMLType.BF16,
    GGMLType.Q8_0,
    GGMLType.Q6_K,
    GGMLType.Q4_0,
    GGMLType.Q5_0,
    GGMLType.Q3_K,
    GGMLType.TQ1_0,
    GGMLType.TQ2_0,
)
"""In the order of the enum in csrc/bitnet.h."""
TABLES: Mapping[str, GGMLType] = MappingProxyType({kind.name.lower(): kind for kind in TABLE_TYPES})
"""Name on command lines -> type."""

_PLAIN = {GGMLType.F16: "<f2", GGMLType.F32: "<f4", GGMLType.BF16: "<u2"}
_D_AT = {
    GGMLType.Q8_0: 0,
    GGMLType.Q4_0: 0,
    GGMLType.Q5_0: 0,
    GGMLType.Q6_K: 208,
    GGMLType.Q3_K: 108,
    GGMLType.TQ1_0: 52,
    GGMLType.TQ2_0: 64,
}
"""Byte of a block at which its float16 stands."""

Table = npt.NDArray[Any]
"""Rows as stored: float16 or float32 ``(rows, cols)``, BF16 as uint16, blocks as bytes ``(rows, bytes)``."""


def view(data: npt.NDArray[np.uint8], kind: GGMLType, rows: int) -> Table:
    """Return the bytes of a table of one of ``TABLE_TYPES`` as its rows."""
    return data.view(_PLAIN.get(kind, np.uint8)).reshape(rows, -1)


def values(row: Table, kind: GGMLType) -> npt.NDArray[np.float32]:
    """Return the values of one row in float32, as the engine's embedding has them.

    Exact, but that a value of Q6_K is rounded once.
    """
    elements, size_bytes = BLOCK_LAYOUT[kind]
    out = np.empty(row.nbytes // size_bytes * elements, np.float32)
    row = np.ascontiguousarray(row)
    _native.call("bn_table_values", TABLE_TYPES.index(kind), _native.address(row), out.size, _native.address(out))
    return out


def find_unusable(rows: Table, kind: GGMLType) -> tuple[int, int, object] | None:
    """Return row, first column and value of the first number that is not finite, or of a code 3; or None."""
    if kind is GGMLType.BF16:
        bad = (rows & 0x7F80) == 0x7F80
        return _first(bad, (rows.astype(np.uint32) << 16).view(np.float32), 1)
    if kind is GGMLType.F16:
        # Exponent bits all set: infinity or NaN. On integers it is several times faster than np.isfinite.
        return _first((rows.view(np.uint16) & 0x7C00) == 0x7C00, rows, 1)
    if kind is GGMLType.F32:
        return _first((rows.view(np.uint32) & 0x7F800000) == 0x7F800000, rows, 1)
    elements, size_bytes = BLOCK_LAYOUT[kind]
    blocks = rows.reshape(len(rows), -1, size_bytes)
    at = _D_AT[kind]
    d = np.ascontiguousarray(blocks[..., at : at + 2]).view("<f2")[..., 0]
    found = _first(~np.isfinite(d), d, elements)
    if found is None and kind is GGMLType.TQ2_0:
        codes = blocks[..., :at]
        undefined = (codes & (codes >> 1) & 0x55).any(axis=-1)
        found = _first(undefined, np.full(undefined.shape, "code 3", object), elements)
    return found


def _first(bad: npt.NDArray[np.bool_], what: npt.NDArray[Any], elements: int) -> tuple[int, int, object] | None:
    if not bad.any():
        return None
    row, col = np.unravel_index(int(np.argmax(bad)), bad.shape)
    return int(row), int(col) * elements, what[row, col]
