"""Ternary matrices of a file, decoded to signs and one scale; shares no code with the engine."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize

I2_S = 36
"""ggml's number for the tensor type I2_S; the ``gguf`` package does not have it."""
I2_S_BLOCK_BYTES = 32
"""One block: 128 weights of one row."""
I2_S_TAIL_BYTES = 32
"""After the last block: the float32 scale, then padding."""
BLOCK_TYPES = (GGMLQuantizationType.TQ1_0, GGMLQuantizationType.TQ2_0)
"""Ternary types whose blocks have scales of their own; the ``gguf`` package decodes them."""

_DECODED_ROWS = 64
"""Rows decoded at a time, so that they stay in the cache."""


def decode_i2_s(
    packed: npt.NDArray[np.uint8], rows: int, cols: int, out: npt.NDArray[np.float32] | None = None
) -> npt.NDArray[np.float32]:
    """Decode I2_S codes to signs -1, 0, +1: float32 ``(rows, cols)``, into ``out`` if there is one.

    A row is ``cols / 128`` blocks of 32 bytes. Byte ``p`` of a block holds four codes, 0, 1 or 2, each the weight
    plus one (worked example: byte 0b10_01_00_01 at p = 5 makes elements 5, 37, 69, 101 of its block +1 0 -1 0)::

        bits of byte p    7 6    5 4    3 2    1 0
        element of block  p      32+p   64+p   96+p

    Source: bitnet.cpp ``ggml-bitnet-mad.cpp``, ``quantize_i2_s`` (x86 layout; what the 2B-4T release holds).

    Raises:
        ValueError: ``cols`` is not a multiple of 128, or the undefined code 3 occurs.
    """
    if cols % (4 * I2_S_BLOCK_BYTES):
        raise ValueError(f"expected rows of a multiple of 128 weights, found {cols}")
    blocks = packed.reshape(rows, -1, I2_S_BLOCK_BYTES)
    signs = np.empty((rows, cols), np.float32) if out is None else out
    quarters = signs.reshape(rows, -1, 4, I2_S_BLOCK_BYTES)
    for first in range(0, rows, _DECODED_ROWS):
        some = slice(first, first + _DECODED_ROWS)
        if np.any(blocks[some] & (blocks[some] >> 1) & 0b01010101):
            raise ValueError("expected the codes 0, 1 and 2, found 3")
        for quarter, shift in enumerate((6, 4, 2, 0)):
            np.subtract((blocks[some] >> shift) & 3, np.float32(1), out=quarters[some, :, quarter])
    return signs


def decode_blocks(
    data: npt.NDArray[np.uint8],
    kind: GGMLQuantizationType,
    shape: tuple[int, int],
    out: npt.NDArray[np.float32] | None = None,
) -> tuple[npt.NDArray[np.float32], float]:
    """Decode a tensor of one of ``BLOCK_TYPES`` to signs -1, 0, +1 and the one scale of all its blocks.

    Raises:
        ValueError: its values are not ternary with one scale, as BitNet's matrices are.
    """
    signs = np.empty(shape, np.float32) if out is None else out
    for first in range(0, shape[0], _DECODED_ROWS):
        signs[first : first + _DECODED_ROWS] = dequantize(data[first : first + _DECODED_ROWS], kind)
    scale = float(np.abs(signs).max())
    if scale == 0:
        return signs, 1.0
    if not np.isfinite(scale):
        raise ValueError("expected finite scales, found NaN or infinity")
    signs /= np.float32(scale)
    for first in range(0, shape[0], _DECODED_ROWS):
        some = np.abs(signs[first : first + _DECODED_ROWS])
        if not ((some == 0) | (some == 1)).all():
            raise ValueError(
                "expected -1, 0 and +1 times one scale, found other values: blocks of different scales"
            )
    return signs, scale


def decode_floats(
    values: npt.NDArray[np.floating[Any]], out: npt.NDArray[np.float32] | None = None
) -> tuple[npt.NDArray[np.float32], float]:
    """Return a matrix of numbers as signs -1, 0, +1 and the one number that they are times.

    Raises:
        ValueError: there is more than one, as in no matrix of BitNet.
    """
    signs = np.empty(values.shape, np.float32) if out is None else out
    signs[:] = np.sign(values)
    scale = float(np.abs(values).max())
    if not np.isfinite(scale):
        raise ValueError("expected finite values, found NaN or infinity")
    if not (np.abs(values) == np.abs(signs) * np.float32(scale)).all():
        raise ValueError("expected -1, 0 and +1 times one scale, found other values")
    return signs, scale or 1.0
