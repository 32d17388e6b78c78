"""The embedding and the LM head of a file, decoded to numbers by the ``gguf`` package.

A table of F16 or F32 is read where it lies. Of any other type it is decoded once, into memory or, where it is
large, into an unnamed file that the system may drop from memory and read again.
"""

from __future__ import annotations

import tempfile
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

TABLES = ("token_embd.weight", "output.weight")
"""Tensors of which rows are looked up or multiplied with in full precision, whatever their type."""
TABLE_TYPES = ("F16", "F32", "BF16", "Q8_0", "Q6_K", "Q4_0", "Q5_0", "Q3_K", "TQ1_0", "TQ2_0")
"""Types that they may have, by ggml's names; the most common first."""

_DECODED_ROWS = 256
IN_MEMORY_BYTES = 256 << 20
"""Decoded tables larger than this are kept in a file."""


class DecodedTable(np.ndarray):
    """Values, float32 ``(rows, cols)``, each a multiple of a step that 16 to 256 neighbours of a row share."""

    steps: npt.NDArray[np.float32] | None = None
    """Euclidean norm of each row's steps, one for every value, ``(rows,)``; None: of a part of a table."""

    def __array_wrap__(self, array: npt.NDArray[Any], *_: Any) -> Any:
        """Return what is computed of a table as a plain array."""
        return array if array.ndim else array[()]


def decode(data: npt.NDArray[np.uint8], kind: GGMLQuantizationType) -> DecodedTable:
    """Decode the bytes ``(rows, bytes of a row)`` of a table to float32 ``(rows, cols)``.

    Raises:
        ValueError: a value is not finite.
    """
    elements, size_bytes = GGML_QUANT_SIZES[kind]
    shape = data.shape[0], data.shape[1] // size_bytes * elements
    values = _room(shape).view(DecodedTable)
    steps = np.empty(shape[0], np.float32)
    for first in range(0, shape[0], _DECODED_ROWS):
        some = slice(first, first + _DECODED_ROWS)
        with np.errstate(invalid="ignore", over="ignore"):
            values[some] = dequantize(data[some], kind)
        if not np.isfinite(values[some]).all():
            raise ValueError(
                f"expected finite values, found others in rows {first} to {first + _DECODED_ROWS - 1}"
            )
        steps[some] = _norm_of_steps(data[some].reshape(len(data[some]), -1, size_bytes), kind)
    values.flags.writeable = False
    values.steps = steps
    return values


def _room(shape: tuple[int, int]) -> npt.NDArray[np.float32]:
    if 4 * shape[0] * shape[1] <= IN_MEMORY_BYTES:
        return np.empty(shape, np.float32)
    return np.memmap(tempfile.TemporaryFile(), np.float32, "w+", shape=shape)  # the map keeps it open


def _norm_of_steps(blocks: npt.NDArray[Any], kind: GGMLQuantizationType) -> npt.NDArray[np.float32]:
    """Return it for Q6_K and the ternary types; 0 for those whose products are added without an offset."""
    if kind is GGMLQuantizationType.Q6_K:  # [192 bytes of codes][16 int8 scales][float16]
        scales = blocks[..., 192:208].view(np.int8).astype(np.float32)
        steps = scales * np.ascontiguousarray(blocks[..., 208:]).view("<f2").astype(np.float32)
        return _root(16 * (steps * steps).sum(axis=(1, 2)))
    if kind in (GGMLQuantizationType.TQ1_0, GGMLQuantizationType.TQ2_0):  # the float16 comes last
        steps = np.ascontiguousarray(blocks[..., -2:]).view("<f2").astype(np.float32)
        return _root(256 * (steps * steps).sum(axis=(1, 2)))
    return np.zeros(len(blocks), np.float32)


def _root(squares: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    roots: npt.NDArray[np.float32] = np.sqrt(squares)
    return roots
