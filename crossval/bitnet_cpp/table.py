"""What differs between the generations of the llama.cpp family, as data: one ``Table`` per generation.

``march`` and ``main`` hold the tables, ``abi`` opens a library and chooses its table. To add a generation:
a module with its table, and its row in ``abi.TABLES``. Everything else asks the table.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from ctypes import (
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
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from crossval.terms import Generation

TYPE_F32 = 0
TYPE_F16 = 1
TYPE_BF16 = 30

ANY = object()
"""Placeholder for a value that is not checked, because it depends on the build."""

Node = tuple[str, frozenset[str] | None]
"""A node of the graph: its name without the layer, and the operations that identify it (None: any)."""
Nodes = Mapping[str, tuple[Node, ...]]
"""Tap -> the nodes that may hold it, in the order in which they are computed; where several of one pass match, the
last one is the tap. Empty: nothing in the graph holds it."""
LINEAR = frozenset({"MUL_MAT", "ADD", "MUL"})
"""A projection, possibly with an optional bias or scale applied."""


@dataclass(frozen=True)
class Layout:
    """A C struct: its fields in order, each with the value it must have when the library has filled it in."""

    name: str
    fields: tuple[tuple[str, Any, Any], ...]

    @cached_property
    def struct(self) -> type[ctypes.Structure]:
        """The ctypes mirror."""
        return type(self.name, (ctypes.Structure,), {"_fields_": [(name, kind) for name, kind, _ in self.fields]})


def layout(name: str, *fields: tuple[str, Any]) -> Layout:
    """Return a struct whose values are not checked."""
    return Layout(name, tuple((field_name, kind, ANY) for field_name, kind in fields))


@dataclass(frozen=True)
class Function:
    """A function of the library; ``constants`` are passed after the arguments that the caller gives."""

    name: str
    result: Any
    arguments: tuple[Any, ...] = ()
    constants: tuple[Any, ...] = ()


@dataclass(frozen=True)
class DotProduct:
    """Where the library's dot product of F16 vectors is found.

    ``lookup``: function from a type number to ``traits``, whose fields must have the stated values. ``prepare``:
    function to call first.
    """

    lookup: str
    traits: Layout
    prepare: str | None = None


@dataclass(frozen=True)
class Quantizer:
    """How ``quantize_row_i8_s`` of the unchanged source rounds ties, and its scale for a row of zeros."""

    ties: Literal["even", "away"]
    scale_of_zeros: float


@dataclass(frozen=True)
class Table:
    """One generation: whatever the code that drives a library has to know and cannot ask it."""

    generation: Generation
    engine: str
    """Its name in identities and messages."""
    title: str
    """What it is called where it is told from the others."""
    functions: Mapping[str, Function]
    """Role -> function. A library of this generation exports all of them; a role that only some have is listed in
    ``abi.OPTIONAL_ROLES``."""
    model_params: Layout
    context_params: Layout
    batch: Layout
    tensor: Layout
    types: Mapping[int, bytes]
    """Numbers of tensor types -> names, checked because other generations number them otherwise."""
    graphs: Mapping[str, Nodes]
    """Architectures whose graph is known -> where the taps are in it."""
    flash_attention: str | None = None
    """Field of the context parameters that turns flash attention on (1) and off (0); None: it stays off."""
    gone_with_flash_attention: frozenset[str] = field(default_factory=frozenset)
    """Taps that do not exist when flash attention is on."""
    template_takes_model: bool = False
    """Whether the function that applies a chat template takes the model first."""
    products_on_stack: bool = False
    """Whether results of an I2_S product are kept on the stack of the thread (``crossval.bitnet_cpp.limits``)."""
    dot: DotProduct | None = None
    quantizer: Quantizer | None = None

    def nodes(self, arch: str, flash_attention: bool) -> Nodes:
        """Return where the taps of an architecture are; those that do not exist have no node."""
        gone = self.gone_with_flash_attention if flash_attention else frozenset()
        return {tap: () if tap in gone else nodes for tap, nodes in self.graphs[arch].items()}


# --- what the generations have in common ----------------------------------------------------------------------

BITNET_NODES: Nodes = {
    "attn_norm": (("attn_norm", None),),
    "q": (("Qcur", LINEAR),),
    "k": (("Kcur", LINEAR),),
    "v": (("Vcur", LINEAR),),
    "q_rope": (("Qcur", frozenset({"ROPE"})),),
    "k_rope": (("Kcur", frozenset({"ROPE"})),),
    "kq": (("kq", frozenset({"MUL_MAT"})),),
    "kqv_out": (("kqv_out", None),),
    "attn_sub_norm": (("attn_sub_norm", None),),
    "ffn_inp": (("ffn_inp", None),),
    "ffn_norm": (("ffn_norm", None),),
    "ffn_gate": (("ffn_gate", None), ("ffn_gate_b", None), ("ffn_gate_s", None)),
    "ffn_up": (("ffn_up", None), ("ffn_up_b", None), ("ffn_up_s", None)),
    "ffn_sub_norm": (("ffn_sub_norm", None),),
    "ffn_down": (("ffn_down", None),),
    "l_out": (("l_out", None),),
    "result_norm": (("result_norm", None),),
}
"""Taps of the BitNet graph that every generation names alike.

``result_output`` is in no table: logits come from ``llama_get_logits_ith``, with capture and without.
"""

BATCH_FIELDS: tuple[tuple[str, Any], ...] = (
    ("n_tokens", c_int32),
    ("token", POINTER(c_int32)),
    ("embd", POINTER(c_float)),
    ("pos", POINTER(c_int32)),
    ("n_seq_id", POINTER(c_int32)),
    ("seq_id", POINTER(POINTER(c_int32))),
    ("logits", POINTER(c_int8)),
)
"""Fields that ``struct llama_batch`` starts with."""

NAME_FIELD = ("name", c_char * 64)

OVERRIDE = layout(
    "llama_model_kv_override",
    ("tag", c_int32),
    ("key", c_char * 128),
    ("padding", c_char * 4),
    ("value", c_char * 128),
)
"""A value for a metadata key instead of the file's; ``value`` is a union of int64, double, bool and text."""

MESSAGE = layout("llama_chat_message", ("role", c_char_p), ("content", c_char_p))
TEMPLATE_ARGUMENTS: tuple[Any, ...] = (c_char_p, POINTER(MESSAGE.struct), c_size_t, c_bool, c_char_p, c_int32)
"""Template, messages, how many, whether the assistant's turn is begun, buffer, its size."""

INIT_PARAMS = layout("ggml_init_params", ("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


def common_functions(model_params: Layout, context_params: Layout, batch: Layout) -> dict[str, Function]:
    """Return the functions that every generation has with the same arguments, by role."""
    pointer = c_void_p
    functions = {
        "backend_init": Function("llama_backend_init", None),
        "default_model_params": Function("llama_model_default_params", model_params.struct),
        "default_context_params": Function("llama_context_default_params", context_params.struct),
        "n_ctx": Function("llama_n_ctx", c_uint32, (pointer,)),
        "n_ubatch": Function("llama_n_ubatch", c_uint32, (pointer,)),
        "metadata": Function("llama_model_meta_val_str", c_int32, (pointer, c_char_p, c_char_p, c_size_t)),
        "decode": Function("llama_decode", c_int32, (pointer, batch.struct)),
        "synchronize": Function("llama_synchronize", None, (pointer,)),
        "logits": Function("llama_get_logits_ith", POINTER(c_float), (pointer, c_int32)),
        "vocab_type": Function("llama_vocab_type", c_int32, (pointer,)),
        "tokenize": Function(
            "llama_tokenize", c_int32, (pointer, c_char_p, c_int32, POINTER(c_int32), c_int32, c_bool, c_bool)
        ),
        "token_to_piece": Function(
            "llama_token_to_piece", c_int32, (pointer, c_int32, c_char_p, c_int32, c_int32, c_bool)
        ),
        "system_info": Function("llama_print_system_info", c_char_p),
        "state_size": Function("llama_state_seq_get_size", c_size_t, (pointer, c_int32)),
        "get_state": Function("llama_state_seq_get_data", c_size_t, (pointer, pointer, c_size_t, c_int32)),
        "set_state": Function("llama_state_seq_set_data", c_size_t, (pointer, pointer, c_size_t, c_int32)),
    }
    integer, size = ctypes.c_int, c_int64
    ggml: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "ggml_init": (pointer, (INIT_PARAMS.struct,)),
        "ggml_free": (None, (pointer,)),
        "ggml_new_tensor_4d": (pointer, (pointer, c_int32, size, size, size, size)),
        "ggml_permute": (pointer, (pointer, pointer, integer, integer, integer, integer)),
        "ggml_view_1d": (pointer, (pointer, pointer, size, c_size_t)),
        "ggml_sqr": (pointer, (pointer, pointer)),
        "ggml_set_name": (pointer, (pointer, c_char_p)),
        "ggml_get_name": (pointer, (pointer,)),
        "ggml_get_data": (pointer, (pointer,)),
        "ggml_nbytes": (c_size_t, (pointer,)),
        "ggml_nelements": (size, (pointer,)),
        "ggml_op_name": (c_char_p, (c_int32,)),
        "ggml_type_name": (c_char_p, (c_int32,)),
        "ggml_tensor_overhead": (c_size_t, ()),
        "ggml_backend_buffer_is_host": (c_bool, (pointer,)),
    }
    return functions | {name: Function(name, *signature) for name, signature in ggml.items()}
