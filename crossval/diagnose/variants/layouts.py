"""Ways to read a matrix's 2-bit codes from its bytes: the correct one, and those that engines use by mistake."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from crossval.diagnose.variants.context import Array
from crossval.model.kinds import IntArray, TernaryMatrix

SHIFTS = (6, 4, 2, 0)

CodesOf = Callable[[TernaryMatrix, IntArray], Array]
"""Returns the codes 0 to 3 of some rows of a matrix: uint8 ``(features, cols)``."""


@dataclass(frozen=True)
class Layout:
    """An order of the codes within a tensor's bytes."""

    name: str
    """Empty for the correct layout."""
    sentence: str
    codes_of: CodesOf
    block: int = 128
    """The number of columns must be a multiple of this."""


def packed(signs: Array) -> Array:
    """Return the bytes of I2_S rows, uint8 ``(rows, cols / 4)``: byte p of a block holds p, 32+p, 64+p, 96+p."""
    codes = (signs + 1).astype(np.uint8).reshape(signs.shape[0], -1, 4, 32)
    data = np.zeros((*codes.shape[:2], 32), np.uint8)
    for quarter, shift in enumerate(SHIFTS):
        data |= codes[:, :, quarter] << np.uint8(shift)
    return data.reshape(signs.shape[0], -1)


def strided(data: Array, block: int, shifts: tuple[int, ...]) -> Array:
    """Decode bytes in blocks of ``block`` weights whose quarters are side by side: codes ``(rows, cols)``."""
    blocks = data.reshape(data.shape[0], -1, block // 4)
    return np.stack([(blocks >> np.uint8(s)) & 3 for s in shifts], axis=2).reshape(data.shape[0], -1)


def sequential(data: Array, shifts: tuple[int, ...]) -> Array:
    """Decode four consecutive weights per byte: codes ``(rows, cols)``."""
    return np.stack([(data >> np.uint8(s)) & 3 for s in shifts], axis=-1).reshape(data.shape[0], -1)


def of_bytes(decode: Callable[[Array], Array]) -> CodesOf:
    """Return a reader of codes that uses only each row's own bytes."""
    return lambda matrix, features: decode(packed(matrix.signs[features]))


def _right(matrix: TernaryMatrix, features: IntArray) -> Array:
    return (matrix.signs[features] + 1).astype(np.uint8)


def _rows_in_a_byte(shifts: tuple[int, ...]) -> CodesOf:
    """Four neighbouring rows share each byte: row r is in bits ``shifts[r % 4]`` of the bytes of four rows."""

    def codes_of(matrix: TernaryMatrix, features: IntArray) -> Array:
        if matrix.signs.shape[0] % 4:
            raise ValueError("the number of rows is not a multiple of 4")
        quads, inverse = np.unique(features // 4, return_inverse=True)
        rows = (quads[:, None] * 4 + np.arange(4)).reshape(-1)
        data = packed(matrix.signs[rows]).reshape(quads.size, -1)[inverse]
        return (data >> np.asarray(shifts, np.uint8)[features % 4][:, None]) & 3

    return codes_of


RIGHT = Layout("", "", _right)
FOUR_IN_A_ROW = Layout(
    "codes read four in a row",
    "I2_S read as four consecutive weights per byte, highest bits first, not as blocks of 128 in four strides",
    of_bytes(lambda d: sequential(d, SHIFTS)),
)
FOUR_IN_A_ROW_LOW = Layout(
    "codes read four in a row, low bits first",
    "I2_S read as four consecutive weights per byte, lowest bits first, not as blocks of 128 in four strides",
    of_bytes(lambda d: sequential(d, SHIFTS[::-1])),
)
REVERSED = Layout(
    "strides of a block in reverse",
    "the four strides of an I2_S block are read lowest bits first instead of highest first",
    of_bytes(lambda d: strided(d, 128, SHIFTS[::-1])),
)


def blocks_of(block: int) -> Layout:
    """Return the layout in blocks of another size."""
    return Layout(
        f"block of {block}",
        f"I2_S unpacked in blocks of {block} weights instead of 128",
        of_bytes(lambda d: strided(d, block, SHIFTS)),
        block,
    )


def _blocks_reversed(block: int) -> Layout:
    return Layout(
        f"block of {block}, strides in reverse",
        f"I2_S unpacked in blocks of {block} weights instead of 128, lowest bits first",
        of_bytes(lambda d: strided(d, block, SHIFTS[::-1])),
        block,
    )


BLOCKS = (32, 64, 256, 512)
KNOWN = (FOUR_IN_A_ROW, FOUR_IN_A_ROW_LOW, REVERSED, *map(blocks_of, BLOCKS))
"""Layouts with their own variants, with the correct table of codes."""
OTHERS = (
    *map(_blocks_reversed, BLOCKS),
    Layout(
        "four rows in a byte",
        "I2_S read as bytes that hold one weight of four neighbouring rows each, highest bits first",
        _rows_in_a_byte(SHIFTS),
    ),
    Layout(
        "four rows in a byte, low bits first",
        "I2_S read as bytes that hold one weight of four neighbouring rows each, lowest bits first",
        _rows_in_a_byte(SHIFTS[::-1]),
    ),
)
"""Layouts tried with every table of codes when nothing simpler fits."""


def layouts(cols: int) -> tuple[Layout, ...]:
    """Return the layouts in which a matrix with this many columns can be read, the correct one first."""
    return tuple(layout for layout in (RIGHT, *KNOWN, *OTHERS) if cols % layout.block == 0)
