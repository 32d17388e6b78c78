"""ctypes mirror of the C interface of bitnet.cpp's llama.cpp, and behavioural checks that it fits.

The structs are those of the llama.cpp generation inside bitnet.cpp (``include/llama.h``,
``ggml/include/ggml.h``). Nothing in the library states its version, so its behaviour is checked
before it is trusted: ``verify`` compares sizes, default values and the fields of tensors it makes
itself with what the library's own accessor functions return. Used in the child process only.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from ctypes import (
    CFUNCTYPE,
    POINTER,
    c_bool,
    c_char,
    c_char_p,
    c_float,
    c_int8,
    c_int32,
    c_int64,
    c_size_t,
    c_uint32,
    c_void_p,
)
from typing import Any

from crossval.errors import UnavailableError

TYPE_F32 = 0
TYPE_F16 = 1
TYPE_I2_S = 36

EVAL_CALLBACK = CFUNCTYPE(c_bool, c_void_p, c_bool, c_void_p)
"""``bool cb_eval(struct ggml_tensor * t, bool ask, void * user_data)``"""

VEC_DOT = CFUNCTYPE(
    None, ctypes.c_int, POINTER(c_float), c_size_t, c_void_p, c_size_t, c_void_p, c_size_t, ctypes.c_int
)
"""``void vec_dot(int n, float * s, size_t bs, const void * x, size_t bx, const void * y, size_t by, int nrc)``"""

_SIZE_OF_GGML_OBJECT = 32
_CANARY_BYTES = 1024


BUILD_DEPENDENT = object()
"""Placeholder for a default value that depends on the build."""
MODEL_PARAMS: tuple[tuple[str, Any, Any], ...] = (
    ("n_gpu_layers", c_int32, BUILD_DEPENDENT),
    ("split_mode", c_int32, 1),
    ("main_gpu", c_int32, 0),
    ("tensor_split", c_void_p, None),
    ("rpc_servers", c_void_p, None),
    ("progress_callback", c_void_p, None),
    ("progress_callback_user_data", c_void_p, None),
    ("kv_overrides", c_void_p, None),
    ("vocab_only", c_bool, False),
    ("use_mmap", c_bool, True),
    ("use_mlock", c_bool, False),
    ("check_tensors", c_bool, False),
)
"""Fields of ``struct llama_model_params``: name, type, value in ``llama_model_default_params``."""
CONTEXT_PARAMS: tuple[tuple[str, Any, Any], ...] = (
    ("n_ctx", c_uint32, 512),
    ("n_batch", c_uint32, 2048),
    ("n_ubatch", c_uint32, 512),
    ("n_seq_max", c_uint32, 1),
    ("n_threads", c_int32, 4),
    ("n_threads_batch", c_int32, 4),
    ("rope_scaling_type", c_int32, -1),
    ("pooling_type", c_int32, -1),
    ("attention_type", c_int32, -1),
    ("rope_freq_base", c_float, 0.0),
    ("rope_freq_scale", c_float, 0.0),
    ("yarn_ext_factor", c_float, -1.0),
    ("yarn_attn_factor", c_float, 1.0),
    ("yarn_beta_fast", c_float, 32.0),
    ("yarn_beta_slow", c_float, 1.0),
    ("yarn_orig_ctx", c_uint32, 0),
    ("defrag_thold", c_float, -1.0),
    ("cb_eval", c_void_p, None),
    ("cb_eval_user_data", c_void_p, None),
    ("type_k", c_int32, TYPE_F16),
    ("type_v", c_int32, TYPE_F16),
    ("logits_all", c_bool, False),
    ("embeddings", c_bool, False),
    ("offload_kqv", c_bool, True),
    ("flash_attn", c_bool, False),
    ("no_perf", c_bool, True),
    ("abort_callback", c_void_p, None),
    ("abort_callback_data", c_void_p, None),
)
"""Fields of ``struct llama_context_params``, likewise."""


class ModelParams(ctypes.Structure):
    """``struct llama_model_params``."""

    _fields_ = tuple((name, kind) for name, kind, _ in MODEL_PARAMS)


class ContextParams(ctypes.Structure):
    """``struct llama_context_params``."""

    _fields_ = tuple((name, kind) for name, kind, _ in CONTEXT_PARAMS)


class Batch(ctypes.Structure):
    """``struct llama_batch``."""

    _fields_ = (
        ("n_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", POINTER(c_float)),
        ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)),
        ("seq_id", POINTER(POINTER(c_int32))),
        ("logits", POINTER(c_int8)),
        ("all_pos_0", c_int32),
        ("all_pos_1", c_int32),
        ("all_seq_id", c_int32),
    )


class Tensor(ctypes.Structure):
    """``struct ggml_tensor``: ``ne`` elements and ``nb`` bytes of stride per dimension, fastest first."""

    _fields_ = (
        ("type", c_int32),
        ("backend", c_int32),
        ("buffer", c_void_p),
        ("ne", c_int64 * 4),
        ("nb", c_size_t * 4),
        ("op", c_int32),
        ("op_params", c_int32 * 16),
        ("flags", c_int32),
        ("grad", c_void_p),
        ("src", c_void_p * 10),
        ("view_src", c_void_p),
        ("view_offs", c_size_t),
        ("data", c_void_p),
        ("name", c_char * 64),
        ("extra", c_void_p),
    )


class TypeTraits(ctypes.Structure):
    """``struct ggml_type_traits``."""

    _fields_ = (
        ("type_name", c_char_p),
        ("blck_size", c_int64),
        ("blck_size_interleave", c_int64),
        ("type_size", c_size_t),
        ("is_quantized", c_bool),
        ("to_float", c_void_p),
        ("from_float", c_void_p),
        ("from_float_ref", c_void_p),
        ("from_float_to_mat", c_void_p),
        ("vec_dot", c_void_p),
        ("vec_dot_type", c_int32),
        ("nrows", c_int64),
        ("ncols", c_int64),
        ("gemv", c_void_p),
        ("gemm", c_void_p),
    )


class InitParams(ctypes.Structure):
    """``struct ggml_init_params``."""

    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


FUNCTIONS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "llama_backend_init": (None, ()),
    "llama_model_default_params": (ModelParams, ()),
    "llama_context_default_params": (ContextParams, ()),
    "llama_load_model_from_file": (c_void_p, (c_char_p, ModelParams)),
    "llama_new_context_with_model": (c_void_p, (c_void_p, ContextParams)),
    "llama_n_ctx": (c_uint32, (c_void_p,)),
    "llama_n_ubatch": (c_uint32, (c_void_p,)),
    "llama_n_vocab": (c_int32, (c_void_p,)),
    "llama_n_ctx_train": (c_int32, (c_void_p,)),
    "llama_n_embd": (c_int32, (c_void_p,)),
    "llama_n_layer": (c_int32, (c_void_p,)),
    "llama_n_head": (c_int32, (c_void_p,)),
    "llama_vocab_type": (c_int32, (c_void_p,)),
    "llama_model_meta_val_str": (c_int32, (c_void_p, c_char_p, c_char_p, c_size_t)),
    "llama_get_model_tensor": (c_void_p, (c_void_p, c_char_p)),
    "llama_kv_cache_clear": (None, (c_void_p,)),
    "llama_decode": (c_int32, (c_void_p, Batch)),
    "llama_synchronize": (None, (c_void_p,)),
    "llama_get_logits_ith": (POINTER(c_float), (c_void_p, c_int32)),
    "llama_tokenize": (c_int32, (c_void_p, c_char_p, c_int32, POINTER(c_int32), c_int32, c_bool, c_bool)),
    "llama_print_system_info": (c_char_p, ()),
    "llama_state_seq_get_size": (c_size_t, (c_void_p, c_int32)),
    "llama_state_seq_get_data": (c_size_t, (c_void_p, c_void_p, c_size_t, c_int32)),
    "llama_state_seq_set_data": (c_size_t, (c_void_p, c_void_p, c_size_t, c_int32)),
    "ggml_init": (c_void_p, (InitParams,)),
    "ggml_free": (None, (c_void_p,)),
    "ggml_new_tensor_4d": (c_void_p, (c_void_p, c_int32, c_int64, c_int64, c_int64, c_int64)),
    "ggml_permute": (c_void_p, (c_void_p, c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int)),
    "ggml_view_1d": (c_void_p, (c_void_p, c_void_p, c_int64, c_size_t)),
    "ggml_sqr": (c_void_p, (c_void_p, c_void_p)),
    "ggml_set_name": (c_void_p, (c_void_p, c_char_p)),
    "ggml_get_name": (c_void_p, (c_void_p,)),
    "ggml_get_data": (c_void_p, (c_void_p,)),
    "ggml_nbytes": (c_size_t, (c_void_p,)),
    "ggml_nelements": (c_int64, (c_void_p,)),
    "ggml_op_name": (c_char_p, (c_int32,)),
    "ggml_type_name": (c_char_p, (c_int32,)),
    "ggml_tensor_overhead": (c_size_t, ()),
    "ggml_backend_buffer_is_host": (c_bool, (c_void_p,)),
}
"""Every function used: name -> (result type, argument types)."""


def load(path: str) -> ctypes.CDLL:
    """Open the shared library and declare every function used.

    Raises:
        UnavailableError: it cannot be loaded, or a function of this generation is missing.
    """
    try:
        library = ctypes.CDLL(path, mode=ctypes.RTLD_LOCAL)
    except OSError as error:
        raise UnavailableError(f"cannot load the bitnet.cpp library {path}: {error}") from error
    missing = []
    for name, (result, arguments) in FUNCTIONS.items():
        try:
            function = getattr(library, name)
        except AttributeError:
            missing.append(name)
            continue
        function.restype = result
        function.argtypes = arguments
    if missing:
        raise UnavailableError(
            f"{path} is not a libllama of bitnet.cpp's llama.cpp generation: it lacks {', '.join(missing[:5])}"
            + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        )
    return library


def verify(library: ctypes.CDLL) -> None:
    """Check by behaviour that the structs mirrored here match the library's.

    Raises:
        UnavailableError: a size, default value or tensor field is not what this generation has.
    """
    problems = [
        *_size_problems(library, "llama_context_default_params", ContextParams),
        *_size_problems(library, "llama_model_default_params", ModelParams),
    ]
    if not problems:
        problems += _default_problems(library.llama_context_default_params(), CONTEXT_PARAMS)
        problems += _default_problems(library.llama_model_default_params(), MODEL_PARAMS)
        problems += _tensor_problems(library)
    if problems:
        raise UnavailableError(
            "the library's data structures are not those of bitnet.cpp's llama.cpp generation: "
            + "; ".join(problems[:4])
        )


def _size_problems(library: ctypes.CDLL, function: str, struct: type[ctypes.Structure]) -> list[str]:
    """Compare the number of bytes the library writes into a returned struct with the mirror's size."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return []  # only there is the pointer to the result an ordinary first argument
    address = ctypes.cast(getattr(library, function), c_void_p).value
    if address is None:
        return [f"{function} has no address"]
    call = CFUNCTYPE(c_void_p, c_void_p)(address)
    images = []
    for fill in (0xA5, 0x5A):
        buffer = (ctypes.c_uint8 * _CANARY_BYTES)(*[fill] * _CANARY_BYTES)
        call(ctypes.addressof(buffer))
        images.append(bytes(buffer))
    written = [i for i, (a, b) in enumerate(zip(*images, strict=True)) if a == b]
    size = written[-1] + 1 if written else 0
    expected = ctypes.sizeof(struct)
    # Padding at the end may stay unwritten.
    if expected - 8 < size <= expected:
        return []
    return [f"{function} writes {size} bytes, expected {expected}"]


def _default_problems(struct: ctypes.Structure, fields: Iterable[tuple[str, Any, Any]]) -> list[str]:
    problems = []
    for name, _, value in fields:
        actual = getattr(struct, name)
        if value is not BUILD_DEPENDENT and actual != value:
            problems.append(f"default {name} is {actual!r}, expected {value!r}")
    return problems


@contextmanager
def _ggml_context(library: ctypes.CDLL) -> Iterator[int]:
    context = library.ggml_init(InitParams(1 << 20, None, False))
    if not context:
        raise UnavailableError("ggml_init failed while the library's layout was being checked")
    try:
        yield context
    finally:
        library.ggml_free(context)


def _tensor_problems(library: ctypes.CDLL) -> list[str]:
    """Make a few tensors and compare their fields with what the library's accessors return."""
    size = library.ggml_tensor_overhead() - _SIZE_OF_GGML_OBJECT
    if size != ctypes.sizeof(Tensor):
        return [f"struct ggml_tensor has {size} bytes, expected {ctypes.sizeof(Tensor)}"]
    if library.ggml_type_name(TYPE_I2_S) != b"i2_s":
        return [f"ggml type {TYPE_I2_S} is {library.ggml_type_name(TYPE_I2_S)!r}, expected b'i2_s'"]
    with _ggml_context(library) as context:
        address = library.ggml_new_tensor_4d(context, TYPE_F32, 7, 5, 3, 2)
        library.ggml_set_name(address, b"layout-check")
        square_address = library.ggml_sqr(context, address)
        permuted = Tensor.from_address(library.ggml_permute(context, address, 0, 2, 1, 3))
        view = Tensor.from_address(library.ggml_view_1d(context, address, 4, 20))
        plain = Tensor.from_address(address)
        square = Tensor.from_address(square_address)
        facts: dict[str, tuple[object, object]] = {
            "type": (plain.type, TYPE_F32),
            "ne": (tuple(plain.ne), (7, 5, 3, 2)),
            "nb": (tuple(plain.nb), (4, 28, 140, 420)),
            "nbytes": (plain.ne[3] * plain.nb[3], library.ggml_nbytes(address)),
            "nelements": (210, library.ggml_nelements(address)),
            "data": (plain.data, library.ggml_get_data(address)),
            "name": (plain.name, b"layout-check"),
            "address of name": (address + Tensor.name.offset, library.ggml_get_name(address)),
            "op": (library.ggml_op_name(square.op), b"SQR"),
            "src": (square.src[0], address),
            "op of a leaf": (library.ggml_op_name(plain.op), b"NONE"),
            "permuted ne": (tuple(permuted.ne), (7, 3, 5, 2)),
            "permuted nb": (tuple(permuted.nb), (4, 140, 28, 420)),
            "view_src": (view.view_src, address),
            "view_offs": (view.view_offs, 20),
            "data of a view": (view.data, (plain.data or 0) + 20),
        }
    return [f"tensor {what} is {a!r}, expected {b!r}" for what, (a, b) in facts.items() if a != b]
