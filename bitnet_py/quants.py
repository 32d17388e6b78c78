"""The I2_S format: ternary weights packed four to a byte, one float32 scale per matrix.

Layout of a matrix ``(rows, cols)`` (x86; bitnet.cpp ggml-bitnet-mad.cpp ``quantize_i2_s``)::

    [ rows * cols / 4 bytes of codes, row after row ][ float32 scale ][ 28 bytes of padding ]

    128 weights w[0..127] of a row make one block of 32 bytes; byte b of the block:

        bit    7 6       5 4       3 2       1 0
             +---------+---------+---------+---------+
             | w[b]    | w[32+b] | w[64+b] | w[96+b] |        code = weight + 1:  0 -> -1, 1 -> 0, 2 -> +1
             +---------+---------+---------+---------+        code 3 does not exist

Worked example: in a block with w[5] = +1, w[37] = -1, w[69] = 0, w[101] = +1, byte 5 is
``10 00 01 10`` = 0x86. A block of zeros is 32 times ``01 01 01 01`` = 0x55. The weight's value is
``scale * (code - 1)``.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from bitnet_py.config import I2_S_BLOCK
from bitnet_py.errors import ModelError
from bitnet_py.ggml_types import I2_S_TAIL_BYTES

_GROUP = I2_S_BLOCK // 4
_CHUNK_WEIGHTS = 1 << 22
_SHIFTS = np.array([6, 4, 2, 0], np.uint8)


def pack_codes(codes: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Pack codes 0, 1, 2 ``(rows, cols)`` uint8 into ``(rows * cols // 4,)`` bytes; nothing is checked."""
    blocks = codes.reshape(-1, 4, _GROUP)
    packed: npt.NDArray[np.uint8] = blocks[:, 0] << _SHIFTS[0]
    for group in range(1, 4):
        packed |= blocks[:, group] << _SHIFTS[group]
    return packed.reshape(-1)


def pack_i2_s(ternary: npt.NDArray[np.int8]) -> npt.NDArray[np.uint8]:
    """Pack weights -1, 0, +1 ``(rows, cols)`` into ``(rows * cols // 4,)`` bytes.

    Raises:
        ModelError: not a matrix, cols not a multiple of 128, or another weight than -1, 0, +1.
    """
    if ternary.ndim != 2 or not ternary.size or ternary.shape[1] % I2_S_BLOCK:
        raise ModelError(f"I2_S packing: expected (rows, cols) with cols a multiple of 128, found {ternary.shape}")
    if ternary.min() < -1 or ternary.max() > 1:
        raise ModelError(f"I2_S packing: expected weights -1, 0, +1, found {ternary.min()} to {ternary.max()}")
    return pack_codes((ternary + 1).astype(np.uint8))


def unpack_i2_s(data: npt.NDArray[np.uint8], rows: int, cols: int) -> npt.NDArray[np.int8]:
    """Unpack the first ``rows * cols // 4`` bytes into weights -1, 0, +1 ``(rows, cols)`` int8.

    Raises:
        ModelError: too few bytes, cols not a multiple of 128, or code 3.
    """
    n_bytes = rows * cols // 4
    if rows < 1 or cols < 1 or cols % I2_S_BLOCK or data.dtype != np.uint8 or data.size < n_bytes:
        raise ModelError(
            f"I2_S unpacking: expected at least {n_bytes} uint8 bytes for {rows} x {cols} weights "
            f"(cols a multiple of 128), found {data.size} of {data.dtype}"
        )
    packed = data.reshape(-1)[:n_bytes]
    bad = find_invalid_code(packed)
    if bad is not None:
        raise ModelError(f"I2_S unpacking: expected codes 0, 1, 2, found code 3 in byte {bad}")
    ternary: npt.NDArray[np.int8] = unpack_codes(packed).reshape(rows, cols).astype(np.int8) - np.int8(1)
    return ternary


def unpack_codes(packed: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Undo ``pack_codes``: codes ``(4 * n,)`` of ``(n,)`` bytes; nothing is checked."""
    codes = packed.reshape(-1, 1, _GROUP) >> _SHIFTS[:, None] & 3
    return codes.astype(np.uint8, copy=False).reshape(-1)


def find_invalid_code(data: npt.NDArray[np.uint8]) -> int | None:
    """Return the index of the first byte that holds code 3, or None."""
    bad = data & (data >> 1) & 0x55
    return int(np.argmax(bad != 0)) if bad.any() else None


def pack_values(values: npt.NDArray[np.floating]) -> tuple[npt.NDArray[np.uint8], float]:
    """Pack a matrix ``(rows, cols)`` of one value, its negative and zeros; return its codes and that value.

    Raises:
        ModelError: cols not a multiple of 128, or other values.
    """
    rows, cols = values.shape
    if cols % I2_S_BLOCK:
        raise ModelError(f"expected rows of a multiple of {I2_S_BLOCK} weights, found {cols}")
    packed = np.empty((rows, cols // 4), np.uint8)
    step = max(1, _CHUNK_WEIGHTS // cols)
    scale = max(float(np.abs(values[first : first + step]).max()) for first in range(0, rows, step))
    if not np.isfinite(scale):
        raise ModelError("expected finite weights, found others")
    for first in range(0, rows, step):
        some = values[first : first + step]
        codes = np.sign(some).astype(np.int8) + np.int8(1)
        other = (some != 0) & (np.abs(some) != scale)
        if other.any():
            row, col = (int(i) for i in np.unravel_index(int(np.argmax(other)), other.shape))
            at, found = (first + row, col), some[row, col]
            raise ModelError(f"element {at}: expected 0 or {scale:.9g} of either sign, found {found:.9g}")
        packed[first : first + step] = pack_codes(codes.astype(np.uint8)).reshape(len(some), -1)
    return packed.reshape(-1), scale or 1.0


def i2_s_tensor(packed: npt.NDArray[np.uint8], scale: float) -> npt.NDArray[np.uint8]:
    """Return the bytes of a whole I2_S tensor: packed codes, little-endian float32 scale, zero padding."""
    out = np.zeros(packed.size + I2_S_TAIL_BYTES, np.uint8)
    out[: packed.size] = packed
    out[packed.size : packed.size + 4] = np.frombuffer(np.array([scale], "<f4").tobytes(), np.uint8)
    return out


def quantize_absmean(weights: npt.NDArray[np.floating]) -> tuple[npt.NDArray[np.int8], float]:
    """Quantise a float matrix to ternary weights and a scale (a float32 value).

    BitNet b1.58 ("The Era of 1-bit LLMs", equations 1-3): gamma = mean |W|, W~ = clip(round(W /
    gamma), -1, 1), rounding half to even; W is then approximated by gamma * W~. gamma is at least
    1e-5, as in the published models' code, so that a matrix of zeros has a usable scale.

    Raises:
        ModelError: a weight is NaN or infinite.
    """
    values = weights.astype(np.float64)
    gamma = max(float(np.mean(np.abs(values))), 1e-5) if values.size else 1e-5
    if not np.isfinite(gamma):
        raise ModelError("absmean quantisation: expected finite weights, found NaN or infinity")
    ternary = np.clip(np.rint(values / gamma), -1, 1).astype(np.int8)
    return ternary, float(np.float32(gamma))
