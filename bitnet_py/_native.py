"""The one bridge to the C library: find it, check its ABI, declare its functions, turn status into exceptions.

The structs mirror ``csrc/bitnet.h``; change one, change the other and raise the ABI version in both.
"""

from __future__ import annotations

import ctypes
import functools
import os
from ctypes import (
    POINTER,
    Structure,
    byref,
    c_char_p,
    c_float,
    c_int,
    c_int32,
    c_int64,
    c_uint64,
    c_void_p,
    pointer,
)
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bitnet_py.errors import NativeError

ABI_VERSION = 3
LIBRARY_NAME = "libbitnet_native.so"
LIBRARY_VARIABLE = "BITNET_LIBRARY"
"""Environment variable: path of a C library to load instead of the installed one (for kernel developers)."""


class Matrix(Structure):
    """``bn_matrix``: an I2_S matrix."""

    _fields_ = [("data", c_void_p), ("rows", c_int64), ("cols", c_int64), ("scale", c_float)]


class Layer(Structure):
    """``bn_layer``: the tensors of one layer."""

    _fields_ = [
        *((name, c_void_p) for name in ("attn_norm", "attn_sub_norm", "ffn_norm", "ffn_sub_norm")),
        *((name, Matrix) for name in ("q", "k", "v", "o", "gate", "up", "down")),
    ]


class ModelStruct(Structure):
    """``bn_model``: shape and tensors of a model."""

    _fields_ = [
        *(
            (name, c_int32)
            for name in ("n_layers", "n_heads", "n_kv_heads", "head_dim", "dim", "hidden_dim", "vocab_size")
        ),
        ("rms_eps", c_float),
        ("rope_base", c_float),
        ("token_embd", c_void_p),
        ("output", c_void_p),
        ("output_norm", c_void_p),
        ("layers", POINTER(Layer)),
    ]


class Options(Structure):
    """``bn_options``: numerics, threads and kernel family."""

    _fields_ = [
        ("simd_width", c_int32),
        ("fused_quantizer", c_int32),
        ("n_threads", c_int32),
        ("bytes_per_thread", c_int64),
        ("kernel", c_char_p),
    ]


class ScreenStruct(Structure):
    """``bn_screen``: a compact copy of the output head."""

    _fields_ = [(name, c_void_p) for name in ("codes", "scale", "error", "norm")]


class TopStruct(Structure):
    """``bn_top``: the largest logits of a pass, found with a screen."""

    _fields_ = [
        ("screen", POINTER(ScreenStruct)),
        ("n", c_int32),
        ("ids", c_void_p),
        ("logits", c_void_p),
        ("n_rescored", c_int64),
    ]


class Pass(Structure):
    """``bn_pass``: one call of the engine."""

    _fields_ = [
        ("tokens", c_void_p),
        ("n_tokens", c_int32),
        ("start", c_int32),
        ("n_outputs", c_int32),
        ("capacity", c_int64),
        ("k_cache", c_void_p),
        ("v_cache", c_void_p),
        ("logits", c_void_p),
        ("top", POINTER(TopStruct)),
        ("taps", c_void_p),
    ]


class Counter(Structure):
    """``bn_counter``: how often an operation ran."""

    _fields_ = [("name", c_char_p), ("calls", c_uint64), ("bytes", c_uint64)]


@dataclass(frozen=True)
class KernelFamily:
    """One instruction-set family of kernels, as compiled into the library."""

    name: str
    description: str
    available: bool
    """Whether this CPU and operating system can run it."""


_STATUS_FUNCTIONS: dict[str, list[Any]] = {
    "bn_kernel_info": [c_int, POINTER(c_char_p), POINTER(c_char_p), POINTER(c_int)],
    "bn_engine_create": [POINTER(ModelStruct), POINTER(Options), POINTER(c_void_p)],
    "bn_engine_forward": [c_void_p, POINTER(Pass)],
    "bn_engine_build_screen": [c_void_p, c_int64, c_int64, POINTER(ScreenStruct)],
    "bn_engine_last_logits": [c_void_p, c_int64, c_int64, c_void_p],
    "bn_engine_counters": [c_void_p, POINTER(Counter), c_int, POINTER(c_int)],
    "bn_kernel_i2s_dot": [c_char_p, c_void_p, c_int64, c_int, c_void_p, c_int, c_void_p],
    "bn_kernel_quantize": [
        c_char_p, c_void_p, c_int64, c_int, c_void_p, POINTER(c_float), POINTER(c_int32),
    ],
    "bn_kernel_dots": [
        c_char_p, c_int, c_int, c_void_p, c_int64, c_int64, c_void_p, c_int64, c_int64, c_int64, c_void_p, c_int64,
    ],
    "bn_kernel_softmax": [c_char_p, c_int, c_void_p, c_int64, c_int64, c_float],
    "bn_kernel_rope": [c_char_p, c_void_p, c_void_p, c_void_p, c_int, c_void_p],
    "bn_kernel_gated_relu_squared": [c_char_p, c_void_p, c_void_p, c_int64, c_void_p, c_void_p],
    "bn_kernel_rescale": [c_char_p, c_void_p, c_int64, c_float, c_float, c_float, c_void_p],
    "bn_kernel_screen_row": [
        c_char_p, c_void_p, c_int64, c_void_p, POINTER(c_float), POINTER(c_float), POINTER(c_float),
    ],
    "bn_kernel_screen_dots": [c_char_p, c_void_p, c_int64, c_void_p, c_int64, c_void_p],
    "bn_kernel_top": [c_char_p, c_int, c_void_p, c_int64, c_int64, c_void_p, POINTER(TopStruct)],
    "bn_kernel_to_f16": [c_char_p, c_void_p, c_int64, c_void_p],
    "bn_kernel_from_f16": [c_char_p, c_void_p, c_int64, c_void_p],
    "bn_read": [c_void_p, c_int64, c_int, c_int, POINTER(c_uint64)],
}  # fmt: skip


def _find_library() -> Path:
    override = os.environ.get(LIBRARY_VARIABLE)
    if override:
        path = Path(override)
        if not path.is_file():
            raise NativeError(f"{LIBRARY_VARIABLE}={override}: no such file")
        return path
    # An editable install keeps the Python files in the checkout and the library in site-packages; the package's
    # search path lists both.
    import bitnet_py

    for directory in bitnet_py.__path__:
        path = Path(directory) / LIBRARY_NAME
        if path.is_file():
            return path
    raise NativeError(f"the C library {LIBRARY_NAME} is not installed; run 'pip install .' (needs a C compiler)")


@functools.cache
def library() -> ctypes.CDLL:
    """Load the C library once, check its ABI and declare its functions.

    Raises:
        NativeError: it is missing, cannot be loaded, or was built from another version.
    """
    path = _find_library()
    try:
        lib = ctypes.CDLL(str(path))
        lib.bn_abi_version.restype = c_int
        version = lib.bn_abi_version()
    except (OSError, AttributeError) as error:
        raise NativeError(f"cannot load the C library {path}: {error}") from None
    if version != ABI_VERSION:
        raise NativeError(f"{path} has ABI version {version}, expected {ABI_VERSION}: reinstall the package")
    lib.bn_last_error.restype = c_char_p
    lib.bn_kernel_count.restype = c_int
    lib.bn_libm_digest.restype = c_uint64
    lib.bn_engine_kernel.argtypes = [c_void_p]
    lib.bn_engine_kernel.restype = c_char_p
    lib.bn_engine_free.argtypes = [c_void_p]
    lib.bn_engine_free.restype = None
    for name, argtypes in _STATUS_FUNCTIONS.items():
        function = getattr(lib, name)
        function.argtypes = argtypes
        function.restype = c_int
    return lib


RECORDED_LIBM = {0xE4C4A7E2B2A9E0A5: "glibc 2.36"}
"""Digests of C libraries that references were recorded with, see ``libm_name``."""


@functools.cache
def libm_name() -> str | None:
    """Return the C library whose powf, cosf and sinf give the same bits as this one's; None for an unknown one.

    RoPE takes these functions as they are, in bitnet.cpp and here. On a C library that rounds otherwise, single
    bits of RoPE and of all that follows may differ from a recorded reference; from a live one they do not, because
    it uses the same functions.
    """
    return RECORDED_LIBM.get(library().bn_libm_digest())


def library_path() -> Path:
    """Return the path of the C library in use. Raises ``NativeError`` when there is none."""
    return Path(library()._name)


def call(name: str, *arguments: Any) -> None:
    """Call a function that returns a status. Raises ``NativeError`` with the library's own words on failure."""
    lib = library()
    status = getattr(lib, name)(*arguments)
    if status != 0:
        reason = lib.bn_last_error().decode("utf-8", "replace")
        raise NativeError(reason or f"{name} failed with status {status}")


def address(array: npt.NDArray[Any] | None) -> int | None:
    """Return the address of a C-contiguous array for a pointer argument (None gives NULL)."""
    if array is None:
        return None
    if not array.flags.c_contiguous:
        raise ValueError("the C library takes C-contiguous arrays only")
    return int(array.ctypes.data)


def kernel_families() -> list[KernelFamily]:
    """Return the kernel families compiled into the library, best first."""
    families = []
    for index in range(library().bn_kernel_count()):
        name, description, available = c_char_p(), c_char_p(), c_int()
        call("bn_kernel_info", index, byref(name), byref(description), byref(available))
        families.append(
            KernelFamily((name.value or b"").decode(), (description.value or b"").decode(), bool(available))
        )
    return families


def _name(kernel: str | None) -> bytes | None:
    return None if kernel is None else kernel.encode()


def read(words: npt.NDArray[np.uint64], n_threads: int, *, n_passes: int = 1) -> int:
    """Read words ``(n,)`` with ``n_threads`` threads, ``n_passes`` times; the caller takes the time.

    Returns:
        the sum of all words read, modulo 2**64.

    Raises:
        NativeError: no words, or not between 1 and 1024 threads.
    """
    total = c_uint64()
    call("bn_read", address(words), words.size, n_passes, n_threads, byref(total))
    return total.value


# Single kernels, for tests and benchmarks. `kernel` None: the best available.


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
    call("bn_kernel_i2s_dot", _name(kernel), address(packed), k, rows, address(x), x.shape[0], address(acc))
    return acc


def quantize(
    x: npt.NDArray[np.float32], *, fused: bool = False, kernel: str | None = None
) -> tuple[npt.NDArray[np.int8], np.float32, int]:
    """Quantise one float32 row ``(n,)`` to int8; returns the row, the scale (127/absmax) and the row's sum."""
    q, scale, total = np.empty(x.shape, np.int8), c_float(), c_int32()
    call(
        "bn_kernel_quantize", _name(kernel), address(x), x.size, int(fused), address(q), byref(scale), byref(total)
    )
    return q, np.float32(scale.value), total.value


def dots(
    a: npt.NDArray[np.float16],
    b: npt.NDArray[np.float32],
    *,
    simd_width: int,
    tiled: bool,
    kernel: str | None = None,
) -> npt.NDArray[np.float32]:
    """Multiply F16 rows ``(rows, n)`` with float32 columns ``(cols, n)``, or one ``(n,)``, in one of bitnet.cpp's
    reduction shapes. Returns ``(cols, rows)``, or ``(rows,)``."""
    n_rows, n = a.shape
    out = np.empty((*b.shape[:-1], n_rows), np.float32)
    call(
        "bn_kernel_dots", _name(kernel), simd_width, int(tiled), address(a), n, n_rows,
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
    kernel: str | None = None,
) -> npt.NDArray[np.float32]:
    """Rotate one head ``(2 * half,)`` by the angles whose cosines and sines are given ``(half,)``."""
    out = np.empty_like(x)
    call("bn_kernel_rope", _name(kernel), address(x), address(cos), address(sin), cos.size, address(out))
    return out


def gated_relu_squared(
    gate: npt.NDArray[np.float32], up: npt.NDArray[np.float32], *, kernel: str | None = None
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Return ``relu(gate)**2`` and its product with ``up``, all float32 ``(n,)``."""
    act, prod = np.empty_like(gate), np.empty_like(gate)
    call(
        "bn_kernel_gated_relu_squared", _name(kernel), address(gate), address(up), gate.size, address(act),
        address(prod),
    )  # fmt: skip
    return act, prod


def rescale(
    acc: npt.NDArray[np.int32],
    total: float,
    activation_scale: float,
    weight_scale: float,
    *,
    kernel: str | None = None,
) -> npt.NDArray[np.float32]:
    """Return ``(acc - total) / activation_scale * weight_scale`` in float32, each operation rounded."""
    out = np.empty(acc.shape, np.float32)
    call(
        "bn_kernel_rescale", _name(kernel), address(acc), acc.size, total, activation_scale, weight_scale,
        address(out),
    )  # fmt: skip
    return out


def screen_row(
    row: npt.NDArray[np.float16], *, kernel: str | None = None
) -> tuple[npt.NDArray[np.int8], np.float32, np.float32, np.float32]:
    """Quantise one F16 row ``(n,)`` of the head, n % 32 == 0, as one of ``bitnet_py.screen.Screen``.

    Returns:
        codes int8 ``(n,)``, their scale, an upper bound of the error's norm, one of the copy's norm.
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
    """Multiply int8 rows ``(rows, n)`` with one int16 vector ``(n,)``, n % 32 == 0."""
    out = np.empty(codes.shape[0], np.int32)
    call("bn_kernel_screen_dots", _name(kernel), address(codes), codes.shape[0], address(x), x.size, address(out))
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
    """Round float32 values to binary16, to nearest even."""
    out = np.empty(x.shape, np.float16)
    call("bn_kernel_to_f16", _name(kernel), address(x), x.size, address(out))
    return out


def from_f16(x: npt.NDArray[np.float16], *, kernel: str | None = None) -> npt.NDArray[np.float32]:
    """Widen binary16 values to float32, exactly."""
    out = np.empty(x.shape, np.float32)
    call("bn_kernel_from_f16", _name(kernel), address(x), x.size, address(out))
    return out
