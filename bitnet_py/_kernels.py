"""Single kernels of the C library, for tests and benchmarks. ``kernel`` is a family; None: the best available."""

from __future__ import annotations

from ctypes import byref, c_double, c_float, c_int32, pointer
from typing import Literal

import numpy as np
import numpy.typing as npt

from bitnet_py._native import ACTIVATIONS, ROPE_PAIRINGS, ScreenStruct, TopStruct, address, call
from bitnet_py._structs import arithmetic_struct
from bitnet_py.arithmetic import GENERATIONS, MARCH, Arithmetic, Generation
from bitnet_py.config import Activation, RopePairing
from bitnet_py.ggml_types import GGMLType
from bitnet_py.tables import TABLE_TYPES

Quantizer = Literal["march", "march_fused", "main"]
QUANTIZERS: tuple[Quantizer, ...] = ("march", "march_fused", "main")
"""In the order of the enum in csrc/bitnet.h."""
DotShape = Literal["dot", "tiled", "half_sums"]
DOT_SHAPES: tuple[DotShape, ...] = ("dot", "tiled", "half_sums")
"""The numbers that csrc/bitnet.h gives them."""


def _name(kernel: str | None) -> bytes | None:
    return None if kernel is None else kernel.encode()


def i2s_dot(
    packed: npt.NDArray[np.uint8], x: npt.NDArray[np.int8], *, kernel: str | None = None
) -> npt.NDArray[np.int32]:
    """Multiply packed I2_S rows with int8 columns.

    Args:
        packed: uint8 ``(rows, k // 4)``, I2_S codes.
        x: int8 ``(n_cols, k)``.
        kernel: family name.

    Returns:
        int32 ``(n_cols, rows)``: sums of ``(weight + 1) * x``.
    """
    rows, k = packed.shape[0], packed.shape[1] * 4
    if x.shape[1] != k:
        raise ValueError(f"x has {x.shape[1]} columns, the weights {k}")
    acc = np.empty((x.shape[0], rows), np.int32)
    call(
        "bn_kernel_i2s_dot",
        _name(kernel),
        address(packed),
        k,
        rows,
        address(x),
        x.shape[0],
        address(acc),
    )
    return acc


def quantize(
    x: npt.NDArray[np.float32], *, quantizer: Quantizer = "march", kernel: str | None = None
) -> tuple[npt.NDArray[np.int8], np.float32, int]:
    """Quantise one float32 row ``(n,)`` to int8; returns the row, the scale (127/absmax) and the row's sum."""
    q, scale, total = np.empty(x.shape, np.int8), c_float(), c_int32()
    call(
        "bn_kernel_quantize",
        _name(kernel),
        QUANTIZERS.index(quantizer),
        address(x),
        x.size,
        address(q),
        byref(scale),
        byref(total),
    )
    return q, np.float32(scale.value), total.value


def blocks(
    packed: npt.NDArray[np.uint8],
    weight_scale: float,
    x: npt.NDArray[np.float32],
    *,
    fused_quantizer: bool = False,
    fused_sums: bool = False,
    kernel: str | None = None,
) -> npt.NDArray[np.float32]:
    """Multiply packed I2_S rows ``(rows, k // 4)`` with float32 columns ``(n_cols, k)``, quantised in blocks.

    Returns float32 ``(n_cols, rows)``.
    """
    out = np.empty((x.shape[0], packed.shape[0]), np.float32)
    call(
        "bn_kernel_blocks", _name(kernel), fused_quantizer, fused_sums, address(packed), x.shape[1],
        packed.shape[0], weight_scale, address(x), x.shape[0], address(out),
    )  # fmt: skip
    return out


def table(
    rows: npt.NDArray[np.uint8],
    kind: GGMLType,
    x: npt.NDArray[np.float32],
    *,
    arithmetic: Arithmetic = MARCH,
    is_tiled: bool = False,
    packed: bool = False,
    kernel: str | None = None,
) -> npt.NDArray[np.float32]:
    """Multiply rows of a table of any type but F16, bytes ``(rows, row_bytes)``, with float32 ``(n_cols, n)``.

    In the order of a build for one column, or (``is_tiled``) for several; ``packed``: of Q4_0 in main, for
    architectures whose graph has a head of its own.
    Returns float32 ``(n_cols, rows)``.
    """
    out = np.empty((x.shape[0], rows.shape[0]), np.float32)
    call(
        "bn_kernel_table", _name(kernel), TABLE_TYPES.index(kind), byref(arithmetic_struct(arithmetic)), is_tiled,
        packed, address(rows), rows.shape[0], x.shape[1], address(x), x.shape[0], address(out),
    )  # fmt: skip
    return out


def dots(
    a: npt.NDArray[np.float16],
    b: npt.NDArray[np.float32],
    *,
    simd_width: int,
    shape: DotShape,
    kernel: str | None = None,
) -> npt.NDArray[np.float32]:
    """Multiply F16 rows ``(rows, n)`` with float32 columns ``(cols, n)``, or one ``(n,)``, in one
    of bitnet.cpp's summation orders (docs/numerics.md). Returns ``(cols, rows)``, or ``(rows,)``."""
    n_rows, n = a.shape
    out = np.empty((*b.shape[:-1], n_rows), np.float32)
    call(
        "bn_kernel_dots", _name(kernel), simd_width, DOT_SHAPES.index(shape), address(a), n, n_rows,
        address(b), n, b.size // n, n, address(out), n_rows,
    )  # fmt: skip
    return out


def softmax(
    scores: npt.NDArray[np.float32], *, n_padded: int, scale: float, simd_width: int, kernel: str | None = None
) -> npt.NDArray[np.float32]:
    """Return the softmax of one row of raw scores ``(n_visible,)``, zero-filled to ``(n_padded,)``."""
    row = np.zeros(n_padded, np.float32)
    row[: scores.size] = scores
    call("bn_kernel_softmax", _name(kernel), simd_width, address(row), scores.size, n_padded, scale)
    return row


def rope(
    x: npt.NDArray[np.float32],
    cos: npt.NDArray[np.float32],
    sin: npt.NDArray[np.float32],
    *,
    pairing: RopePairing = "halves",
    kernel: str | None = None,
) -> npt.NDArray[np.float32]:
    """Rotate one head ``(2 * half,)`` by the angles whose cosines and sines are given ``(half,)``."""
    out = np.empty_like(x)
    call(
        "bn_kernel_rope", _name(kernel), ROPE_PAIRINGS.index(pairing), address(x), address(cos), address(sin),
        cos.size, address(out),
    )  # fmt: skip
    return out


def gated(
    gate: npt.NDArray[np.float32],
    up: npt.NDArray[np.float32],
    *,
    activation: Activation = "relu_squared",
    simd_width: int = 8,
    kernel: str | None = None,
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Return ``activation(gate)`` and its product with ``up``, all float32 ``(n,)``."""
    act, prod = np.empty_like(gate), np.empty_like(gate)
    call(
        "bn_kernel_gated", _name(kernel), simd_width, ACTIVATIONS.index(activation), address(gate), address(up),
        gate.size, address(act), address(prod),
    )  # fmt: skip
    return act, prod


def rescale(
    acc: npt.NDArray[np.int32],
    total: float,
    activation_scale: float,
    weight_scale: float,
    *,
    generation: Generation = "march",
    kernel: str | None = None,
) -> npt.NDArray[np.float32]:
    """Return ``(acc - total) / activation_scale * weight_scale`` in float32, rounded as the generation does."""
    out = np.empty(acc.shape, np.float32)
    call(
        "bn_kernel_rescale", _name(kernel), GENERATIONS.index(generation), address(acc), acc.size, total,
        activation_scale, weight_scale, address(out),
    )  # fmt: skip
    return out


def exponentials(
    row: npt.NDArray[np.float32], top: float, *, simd_width: int, kernel: str | None = None
) -> tuple[npt.NDArray[np.float32], float]:
    """Return ``exp(row - top)`` of a row ``(n,)`` and its sum, as softmax does; n a multiple of the width."""
    out, total = np.array(row, np.float32), c_double()
    call("bn_kernel_exponentials", _name(kernel), simd_width, address(out), out.size, top, byref(total))
    return out, total.value


def weigh_half(
    a: npt.NDArray[np.float32],
    factor: float,
    v: npt.NDArray[np.float16],
    weight: float,
    *,
    half_sums: bool,
    kernel: str | None = None,
) -> npt.NDArray[np.float32]:
    """Return ``a * factor + v * weight``, each step kept in binary16; ``a`` ``(n,)`` holds binary16 values."""
    out = np.array(a, np.float32)
    call("bn_kernel_weigh_half", _name(kernel), int(half_sums), factor, address(v), weight, out.size, address(out))
    return out


def multiply_add(
    a: npt.NDArray[np.float32],
    b: npt.NDArray[np.float32],
    c: npt.NDArray[np.float32],
    *,
    kernel: str | None = None,
) -> npt.NDArray[np.float32]:
    """Return ``c + a @ b`` by fused steps along the middle axis: ``(rows, k)``, ``(k, n)``, ``(rows, n)``."""
    out = np.array(c, np.float32)
    (n_rows, k), n = a.shape, b.shape[1]
    call("bn_kernel_multiply_add", _name(kernel), address(a), k, n_rows, address(b), k, n, address(out), n)
    return out


def screen_row(
    row: npt.NDArray[np.float16], *, kernel: str | None = None
) -> tuple[npt.NDArray[np.int8], np.float32, np.float32, np.float32]:
    """Quantise one F16 row ``(n,)`` of the LM head, n a multiple of 32, as a row of ``bitnet_py.screen.Screen``.

    Returns:
        codes int8 ``(n,)``, their scale, and upper bounds of the norms of the error and of the
        copy.
    """
    codes = np.empty(row.shape, np.int8)
    scale, error, norm = c_float(), c_float(), c_float()
    call(
        "bn_kernel_screen_row", _name(kernel), address(row), row.size, address(codes), byref(scale), byref(error),
        byref(norm),
    )  # fmt: skip
    return codes, np.float32(scale.value), np.float32(error.value), np.float32(norm.value)


def screen_dots(
    codes: npt.NDArray[np.int8], x: npt.NDArray[np.int16], *, kernel: str | None = None
) -> npt.NDArray[np.int32]:
    """Multiply int8 rows ``(rows, n)`` with one int16 vector ``(n,)``, n a multiple of 32."""
    out = np.empty(codes.shape[0], np.int32)
    call(
        "bn_kernel_screen_dots",
        _name(kernel),
        address(codes),
        codes.shape[0],
        address(x),
        x.size,
        address(out),
    )
    return out


def top(
    rows: npt.NDArray[np.float16],
    b: npt.NDArray[np.float32],
    n: int,
    screen: ScreenStruct,
    *,
    simd_width: int,
    kernel: str | None = None,
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32], int]:
    """Return ids and values of the ``n`` largest dots of F16 rows with ``b`` ``(dim,)``, and the rows read."""
    ids, logits = np.empty(n, np.int32), np.empty(n, np.float32)
    found = TopStruct(pointer(screen), n, address(ids), address(logits), 0)
    call(
        "bn_kernel_top", _name(kernel), simd_width, address(rows), rows.shape[0], rows.shape[1], address(b),
        byref(found),
    )  # fmt: skip
    return ids, logits, found.n_rescored


def to_f16(x: npt.NDArray[np.float32], *, kernel: str | None = None) -> npt.NDArray[np.float16]:
    """Round float32 values to binary16, to nearest, ties to even."""
    out = np.empty(x.shape, np.float16)
    call("bn_kernel_to_f16", _name(kernel), address(x), x.size, address(out))
    return out


def from_f16(x: npt.NDArray[np.float16], *, kernel: str | None = None) -> npt.NDArray[np.float32]:
    """Widen binary16 values to float32, exactly."""
    out = np.empty(x.shape, np.float32)
    call("bn_kernel_from_f16", _name(kernel), address(x), x.size, address(out))
    return out
