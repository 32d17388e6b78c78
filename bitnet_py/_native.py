"""The one bridge to the C library: find it, check its ABI, declare its functions, turn status into exceptions.

The structs mirror ``csrc/bitnet.h``; change one, change the other and raise the ABI version in
both.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
from ctypes import (
    POINTER,
    Structure,
    byref,
    c_char_p,
    c_double,
    c_float,
    c_int,
    c_int32,
    c_int64,
    c_uint64,
    c_void_p,
)
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bitnet_py.errors import NativeError

ABI_VERSION = 9
ACTIVATIONS = ("relu_squared", "silu", "gelu")
"""In the order of the enum in csrc/bitnet.h."""
ROPE_PAIRINGS = ("halves", "adjacent")
"""In the order of the enum in csrc/bitnet.h."""
LIBRARY_NAME = "libbitnet_native.so"
LIBRARY_VARIABLE = "BITNET_LIBRARY"
"""Environment variable: path of a C library to load instead of the installed one (for kernel
developers)."""


class Matrix(Structure):
    """``bn_matrix``: an I2_S matrix, and what follows the product with it."""

    _fields_ = [
        ("data", c_void_p),
        *((name, c_int64) for name in ("rows", "cols")),
        *((name, c_float) for name in ("scale", "factor")),
        ("bias", c_void_p),
    ]


LAYER_NORMS = (
    *("attn_norm", "attn_q_norm_in", "attn_k_norm_in", "attn_v_norm_in", "q_norm", "k_norm", "attn_sub_norm"),
    *("attn_post_norm", "ffn_norm", "ffn_gate_norm_in", "ffn_up_norm_in", "ffn_sub_norm", "ffn_post_norm"),
)
"""In the order of the fields of ``bn_layer``; names of ``LayerWeights``."""


class Layer(Structure):
    """``bn_layer``: the tensors of one layer."""

    _fields_ = [
        *((name, c_void_p) for name in LAYER_NORMS),
        *((name, Matrix) for name in ("q", "k", "v", "o", "gate", "up", "down")),
    ]


class TableStruct(Structure):
    """``bn_table``: the embedding or the LM head."""

    _fields_ = [("rows", c_void_p), ("type", c_int32)]


class ModelStruct(Structure):
    """``bn_model``: shape and tensors of a model."""

    _fields_ = [
        *((name, c_int32) for name in ("n_layers", "n_heads", "n_kv_heads", "head_dim")),
        *((name, c_int32) for name in ("dim", "hidden_dim", "vocab_size", "activation", "rope_pairing")),
        ("rms_eps", c_float),
        ("rope_base", c_float),
        ("rope_scale", c_float),
        ("rope_factors", c_void_p),
        ("embedding_scale", c_float),
        ("query_scale", c_float),
        ("token_embd", TableStruct),
        ("output", TableStruct),
        ("own_head", c_int32),
        ("output_norm", c_void_p),
        ("layers", POINTER(Layer)),
    ]


class ArithmeticStruct(Structure):
    """``bn_arithmetic``: how the engine rounds."""

    _fields_ = [
        *((name, c_int32) for name in ("generation", "simd_width", "fused_quantizer", "block_quantizer")),
        *((name, c_int32) for name in ("fused_sums", "bfloat_pairs", "half_sums", "flash_attention")),
        ("attention_threads", c_int32),
        ("follow_reference", c_int32),
    ]


class Options(Structure):
    """``bn_options``: arithmetic, threads and kernel family."""

    _fields_ = [
        ("arithmetic", ArithmeticStruct),
        ("n_threads", c_int32),
        ("bytes_per_thread", c_int64),
        ("kernel", c_char_p),
    ]


class ScreenStruct(Structure):
    """``bn_screen``: a compact copy of the LM head."""

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
        ("pooling", c_int32),
        ("pooled", c_void_p),
        ("taps", c_void_p),
    ]


class Counter(Structure):
    """``bn_counter``: how often an operation ran."""

    _fields_ = [
        *((name, c_char_p) for name in ("name", "operation", "family")),
        *((name, c_int32) for name in ("quantized", "reads_weights")),
        *((name, c_uint64) for name in ("calls", "bytes")),
    ]


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
        c_char_p, c_int, c_void_p, c_int64, c_void_p, POINTER(c_float), POINTER(c_int32),
    ],
    "bn_kernel_dots": [
        c_char_p, c_int, c_int, c_void_p, c_int64, c_int64, c_void_p, c_int64, c_int64, c_int64, c_void_p, c_int64,
    ],
    "bn_kernel_softmax": [c_char_p, c_int, c_void_p, c_int64, c_int64, c_float],
    "bn_kernel_rope": [c_char_p, c_int, c_void_p, c_void_p, c_void_p, c_int, c_void_p],
    "bn_kernel_exponentials": [c_char_p, c_int, c_void_p, c_int64, c_float, POINTER(c_double)],
    "bn_kernel_weigh_half": [c_char_p, c_int, c_float, c_void_p, c_float, c_int64, c_void_p],
    "bn_kernel_multiply_add": [
        c_char_p, c_void_p, c_int64, c_int64, c_void_p, c_int64, c_int64, c_void_p, c_int64,
    ],
    "bn_kernel_blocks": [
        c_char_p, c_int, c_int, c_void_p, c_int64, c_int, c_float, c_void_p, c_int, c_void_p,
    ],
    "bn_kernel_table": [
        c_char_p, c_int, POINTER(ArithmeticStruct), c_int, c_int, c_void_p, c_int64, c_int64, c_void_p, c_int64,
        c_void_p,
    ],
    "bn_table_values": [c_int, c_void_p, c_int64, c_void_p],
    "bn_kernel_gated": [c_char_p, c_int, c_int, c_void_p, c_void_p, c_int64, c_void_p, c_void_p],
    "bn_kernel_rescale": [c_char_p, c_int, c_void_p, c_int64, c_float, c_float, c_float, c_void_p],
    "bn_kernel_screen_row": [
        c_char_p, c_void_p, c_int64, c_void_p, POINTER(c_float), POINTER(c_float), POINTER(c_float),
    ],
    "bn_kernel_screen_dots": [c_char_p, c_void_p, c_int64, c_void_p, c_int64, c_void_p],
    "bn_kernel_top": [c_char_p, c_int, c_void_p, c_int64, c_int64, c_void_p, POINTER(TopStruct)],
    "bn_kernel_to_f16": [c_char_p, c_void_p, c_int64, c_void_p],
    "bn_kernel_from_f16": [c_char_p, c_void_p, c_int64, c_void_p],
    "bn_probe_bandwidth": [c_void_p, c_int64, c_int, c_int, POINTER(c_uint64)],
}  # fmt: skip


def _find_library() -> Path:
    override = os.environ.get(LIBRARY_VARIABLE)
    if override:
        path = Path(override)
        if not path.is_file():
            raise NativeError(f"{LIBRARY_VARIABLE}={override}: no such file")
        return path
    # An editable install keeps the Python files in the checkout and the library in site-packages;
    # the package's search path lists both.
    package = importlib.util.find_spec(__package__)
    for directory in (package.submodule_search_locations if package else None) or ():
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
"""Digests of the C libraries that references were recorded with, see ``libm_name``."""


@functools.cache
def libm_name() -> str | None:
    """Return the C library whose powf, cosf and sinf are bit-identical to this one's; None for an unknown one.

    RoPE uses these functions as they are, in bitnet.cpp and here. With a C library that rounds them
    differently, single bits of RoPE and of everything after it may differ from a recorded
    reference, but not from a live one, which uses the same functions.
    """
    return RECORDED_LIBM.get(library().bn_libm_digest())


def library_path() -> Path:
    """Return the path of the C library in use. Raises ``NativeError`` when there is none."""
    return Path(library()._name)


def call(name: str, *arguments: Any) -> None:
    """Call a function that returns a status; raise ``NativeError`` with the library's own message on failure."""
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


def probe_bandwidth(words: npt.NDArray[np.uint64], n_threads: int, *, n_passes: int = 1) -> int:
    """Read words ``(n,)`` with ``n_threads`` threads, ``n_passes`` times; the caller takes the time.

    Returns:
        the sum of all words read, modulo 2**64.

    Raises:
        NativeError: no words, or not between 1 and 1024 threads.
    """
    total = c_uint64()
    call("bn_probe_bandwidth", address(words), words.size, n_passes, n_threads, byref(total))
    return total.value
