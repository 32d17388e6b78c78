"""Orders of the 2-bit codes within a ternary tensor's bytes: that of I2_S, and those of other writers and readers.

Every function takes the packed bytes of a matrix, uint8 ``(rows * cols // 4,)``, and returns its
codes 0 to 3, uint8 ``(rows, cols)``. Sources of the others: bitnet.cpp ggml-bitnet-mad.cpp
(``quantize_i2_s``: blocks of 64 on ARM, four rows in a byte in builds without ACT_PARALLEL), engines
that read four weights in a row (microsoft/BitNet#598, #600), and the uint8 tensors of Hugging Face
checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

Codes = npt.NDArray[np.uint8]

HIGH_FIRST, LOW_FIRST = (6, 4, 2, 0), (0, 2, 4, 6)


@dataclass(frozen=True)
class Layout:
    """One order of the codes."""

    name: str
    sentence: str
    """What the bytes hold."""
    unpack: Callable[[Codes, int, int], Codes]
    """Called with bytes, rows, cols."""

    def fits(self, rows: int) -> bool:
        """Return whether a matrix with this many rows can have this layout."""
        return rows % 4 == 0 or self.name not in _FOUR_ROWS


def _strided(group: int, shifts: tuple[int, ...]) -> Callable[[Codes, int, int], Codes]:
    """Blocks of ``4 * group`` weights: byte b of a block holds b, b + group, b + 2 group, b + 3 group."""

    def unpack(data: Codes, rows: int, cols: int) -> Codes:
        codes = data.reshape(-1, 1, group) >> np.array(shifts, np.uint8)[:, None] & 3
        return codes.astype(np.uint8, copy=False).reshape(rows, cols)

    return unpack


def _in_a_row(shifts: tuple[int, ...]) -> Callable[[Codes, int, int], Codes]:
    """Four consecutive weights per byte."""
    return _strided(1, shifts)


def _of_four_rows(shifts: tuple[int, ...], *, apart: bool) -> Callable[[Codes, int, int], Codes]:
    """One weight of each of four rows per byte: neighbours, or (``apart``) rows a quarter of the matrix apart."""

    def unpack(data: Codes, rows: int, cols: int) -> Codes:
        quarters = data.reshape(rows // 4, 1, cols) >> np.array(shifts, np.uint8)[:, None] & 3
        codes = quarters.astype(np.uint8, copy=False)
        return np.ascontiguousarray(codes.swapaxes(0, 1) if apart else codes).reshape(rows, cols)

    return unpack


I2_S = Layout("i2_s", "blocks of 128 weights in four strides of 32, as I2_S is defined", _strided(32, HIGH_FIRST))
_CHECKPOINT = "four quarters"
_NEIGHBOURS = ("four rows", "four rows, low bits first")
_FOUR_ROWS = (*_NEIGHBOURS, _CHECKPOINT)

WRONG_LAYOUTS: tuple[Layout, ...] = (
    Layout("sequential", "four consecutive weights per byte, highest bits first", _in_a_row(HIGH_FIRST)),
    Layout(
        "sequential, low bits first", "four consecutive weights per byte, lowest bits first", _in_a_row(LOW_FIRST)
    ),
    Layout("blocks of 64", "blocks of 64 weights in four strides of 16, as on ARM", _strided(16, HIGH_FIRST)),
    Layout("strides reversed", "blocks of 128 weights, lowest bits first", _strided(32, LOW_FIRST)),
    Layout(
        "four rows", "four neighbouring rows per byte, highest bits first", _of_four_rows(HIGH_FIRST, apart=False)
    ),
    Layout(
        "four rows, low bits first",
        "four neighbouring rows per byte, lowest bits first",
        _of_four_rows(LOW_FIRST, apart=False),
    ),
    Layout(
        _CHECKPOINT,
        "four quarters of the rows per byte, lowest bits first, as in a Hugging Face checkpoint",
        _of_four_rows(LOW_FIRST, apart=True),
    ),
)
LAYOUTS: Mapping[str, Layout] = MappingProxyType({one.name: one for one in (I2_S, *WRONG_LAYOUTS)})
"""By name, the right one first."""


def unpack_checkpoint(packed: Codes) -> Codes:
    """Return the codes ``(4 * n, cols)`` of a Hugging Face checkpoint's packed matrix ``(n, cols)``.

    Source: transformers ``integrations/bitnet.py`` ``unpack_weights``: row ``i * n + r`` is in bits
    ``2 i`` of row r; code - 1 is the weight.
    """
    rows, cols = packed.shape
    return LAYOUTS[_CHECKPOINT].unpack(packed.reshape(-1), 4 * rows, cols)
