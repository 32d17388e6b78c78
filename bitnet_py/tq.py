"""The TQ1_0 and TQ2_0 formats of llama.cpp: ternary weights in blocks of 256, each with a scale of its own.

A row is a sequence of blocks; the value of a weight is ``scale * (code - 1)`` with code 0, 1 or 2::

    TQ2_0, 66 bytes:  [ 64 bytes of codes ][ float16 scale ]
    byte b of each 32 holds the codes of w[b], w[32+b], w[64+b], w[96+b] of its 128 weights, lowest bits first

    TQ1_0, 54 bytes:  [ 32 bytes ][ 16 bytes ][ 4 bytes ][ float16 scale ]
    byte b of the 32 holds w[b], w[32+b], .. w[128+b]; of the 16: w[160+b], w[176+b], .. w[224+b];
    of the 4: w[240+b], w[244+b], w[248+b], w[252+b]

A TQ1_0 byte holds five codes as digits of base 3, ``n = 81 c0 + 27 c1 + 9 c2 + 3 c3 + c4``, stored as
``ceil(256 n / 243)``; code i is ``3 * (byte * 3^i mod 256) >> 8``. Worked example: codes 2 0 1 1 1 make n = 175,
byte 185; 185 * 3 >> 8 = 2, then 185 * 3 mod 256 = 43, 43 * 3 >> 8 = 0, and so on.

Source: llama.cpp ggml-quants.c ``quantize_row_tq1_0_ref``, ``quantize_row_tq2_0_ref`` and their inverses.

The engine multiplies by one scale per matrix, as BitNet's definition has it, so a matrix is packed anew as I2_S
when it is loaded; the scale of a block of zeros does not matter.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from bitnet_py.errors import ModelError
from bitnet_py.ggml_types import BLOCK_LAYOUT, GGMLType
from bitnet_py.quants import find_invalid_code, pack_codes, unpack_codes

TQ_TYPES = (GGMLType.TQ1_0, GGMLType.TQ2_0)
TQ_BLOCK = 256
"""Weights in one block."""

_SCALE_BYTES = 2
_ZEROS = 0x55  # four codes 1
_CHUNK_BLOCKS = 1 << 14
_BYTES = np.arange(256, dtype=np.uint16)
_REVERSED = np.sum([((_BYTES >> shift) & 3) << (6 - shift) for shift in (0, 2, 4, 6)], axis=0).astype(np.uint8)
"""A byte of TQ2_0 as I2_S has it: the same four weights, highest bits first."""
_DIGITS = np.stack([(_BYTES * 3**i % 256 * 3 >> 8).astype(np.uint8) for i in range(5)], axis=1)
"""The five codes of every TQ1_0 byte, ``(256, 5)``."""
_PLACES = ((0, 32, 5), (32, 16, 5), (48, 4, 4))
"""TQ1_0: first byte, bytes, and codes in each byte."""


def repack(data: npt.NDArray[np.uint8], ggml_type: GGMLType) -> tuple[npt.NDArray[np.uint8], float]:
    """Return the bytes of a TQ1_0 or TQ2_0 tensor as packed I2_S codes ``(n_weights // 4,)``, and its scale.

    Raises:
        ModelError: blocks of different scales, a scale that is not usable, or code 3.
    """
    size = BLOCK_LAYOUT[ggml_type][1]
    blocks = data.reshape(-1, size)
    packed = np.empty((len(blocks), TQ_BLOCK // 4), np.uint8)
    scales = np.ascontiguousarray(blocks[:, -_SCALE_BYTES:]).view("<f2").reshape(-1).astype(np.float32)
    finite = np.isfinite(scales)
    if not finite.all():
        bad = int(np.argmin(finite))
        raise ModelError(f"scale of block {bad}: expected a finite value, found {scales[bad]}")
    decode = _decode_tq1_0 if ggml_type is GGMLType.TQ1_0 else _decode_tq2_0
    for start in range(0, len(blocks), _CHUNK_BLOCKS):
        some = slice(start, start + _CHUNK_BLOCKS)
        packed[some] = decode(blocks[some, :-_SCALE_BYTES])
        invalid = find_invalid_code(packed[some].reshape(-1))
        if invalid is not None:
            raise ModelError(f"codes of block {start + invalid * 4 // TQ_BLOCK}: expected 0, 1 or 2, found 3")
    packed[scales == 0] = _ZEROS
    return packed.reshape(-1), _common_scale(scales, (packed != _ZEROS).any(axis=1))


def _common_scale(scales: npt.NDArray[np.float32], matters: npt.NDArray[np.bool_]) -> float:
    """Return the scale of all blocks that are not zero."""
    if not matters.any():
        return 1.0
    first = int(np.argmax(matters))
    scale = float(scales[first])
    if scale < 0:
        raise ModelError(f"scale of block {first}: expected a value above 0, found {scale}")
    other = matters & (scales != scales[first])
    if other.any():
        at = int(np.argmax(other))
        raise ModelError(
            f"blocks of different scales: expected one for the whole matrix, found {scale} in block {first} and "
            f"{float(scales[at])} in block {at}"
        )
    return scale


def _decode_tq2_0(codes: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    packed: npt.NDArray[np.uint8] = _REVERSED[codes]
    return packed


def _decode_tq1_0(codes: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    parts = [
        _DIGITS[codes[:, first : first + n_bytes], :n_codes].swapaxes(1, 2).reshape(len(codes), -1)
        for first, n_bytes, n_codes in _PLACES
    ]
    return pack_codes(np.concatenate(parts, axis=1)).reshape(len(codes), -1)


def tq_tensor(packed: npt.NDArray[np.uint8], scale: float, ggml_type: GGMLType) -> npt.NDArray[np.uint8]:
    """Return the bytes of a TQ1_0 or TQ2_0 tensor of packed I2_S codes; the scale is rounded to float16.

    The codes of a row have to fill whole blocks of 256.

    Raises:
        ModelError: the scale is too large or too small for a float16.
    """
    with np.errstate(over="ignore"):
        half = np.float16(scale)
    if not (np.isfinite(half) and half >= np.finfo(np.float16).tiny):
        raise ModelError(f"{ggml_type.name} scale: expected one that a float16 holds, found {scale}")
    out = np.empty((packed.size * 4 // TQ_BLOCK, BLOCK_LAYOUT[ggml_type][1]), np.uint8)
    encode = _encode_tq1_0 if ggml_type is GGMLType.TQ1_0 else _decode_tq2_0  # reversing undoes itself
    blocks = packed.reshape(len(out), -1)
    for start in range(0, len(out), _CHUNK_BLOCKS):
        some = slice(start, start + _CHUNK_BLOCKS)
        out[some, :-_SCALE_BYTES] = encode(blocks[some])
    out[:, -_SCALE_BYTES:] = np.frombuffer(half.astype("<f2").tobytes(), np.uint8)
    return out.reshape(-1)


def _encode_tq1_0(packed: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    codes = unpack_codes(packed.reshape(-1)).reshape(len(packed), TQ_BLOCK).astype(np.uint32)
    parts, first = [], 0
    for _, n_bytes, n_codes in _PLACES:
        some = codes[:, first : first + n_bytes * n_codes].reshape(len(codes), n_codes, n_bytes)
        weights = np.array([81, 27, 9, 3, 1], np.uint32)[:n_codes, None]
        parts.append(((some * weights).sum(axis=1) * 256 + 242) // 243)
        first += n_bytes * n_codes
    return np.concatenate(parts, axis=1).astype(np.uint8)
