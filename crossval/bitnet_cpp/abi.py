"""Open a library of the llama.cpp family: find its generation, and check by behaviour that the table of it fits.

No library states its version. The functions it exports decide which tables come into question (one name
may have other arguments in another generation), and its behaviour decides whether to trust one: the sizes
and default values of parameters, the fields of tensors it makes itself beside what its own accessors
return, the names of tensor types. Used in the child process only.
"""

from __future__ import annotations

import ctypes
import platform
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from ctypes import CFUNCTYPE, POINTER, c_bool, c_float, c_size_t, c_void_p
from pathlib import Path
from typing import Any

from bitnet_py.errors import listed
from crossval.bitnet_cpp import main, mainline, march
from crossval.bitnet_cpp.table import ANY, INIT_PARAMS, OVERRIDE, TYPE_F32, Function, Layout, Table
from crossval.errors import BadInputError, UnavailableError

TABLES: tuple[Table, ...] = (march.TABLE, main.TABLE, mainline.TABLE)
OPTIONAL_ROLES = {
    "vocab": "functions about the vocabulary take what it returns, otherwise the model",
    "memory": "the function that empties the KV cache takes what it returns, otherwise the context",
    "pooling_type": "how a context pools tokens can be asked",
    "pooled": "the pooled vector of a sequence can be read",
    "model_tensor": "tensors of a loaded model can be looked up by name",
}
"""Roles of functions that only some generations have, and what their being there means."""

COMPANIONS = ("libggml-base", "libggml-cpu", "libggml")
"""Libraries that libllama may be linked against, each after those it needs itself."""

EVAL_CALLBACK = CFUNCTYPE(c_bool, c_void_p, c_bool, c_void_p)
"""``bool cb_eval(struct ggml_tensor * t, bool ask, void * user_data)``"""

VEC_DOT = CFUNCTYPE(
    None, ctypes.c_int, POINTER(c_float), c_size_t, c_void_p, c_size_t, c_void_p, c_size_t, ctypes.c_int
)
"""``void vec_dot(int n, float * s, size_t bs, const void * x, size_t bx, const void * y, size_t by, int nrc)``"""

_SIZE_OF_GGML_OBJECT = 32
_CANARY_BYTES = 1024
_OVERRIDE_BYTES = 128
_NAMED = 5
"""Missing functions and differences listed in a message."""


class Library:
    """An opened library of a known generation; its functions are attributes, by their roles in the table."""

    def __init__(self, shared_object: ctypes.CDLL, table: Table) -> None:
        self.shared_object = shared_object
        self.table = table
        self._functions = {role: _declared(shared_object, function) for role, function in table.functions.items()}

    def __getattr__(self, role: str) -> Any:
        try:
            return self._functions[role]
        except KeyError:
            raise AttributeError(f"{self.table.title} has no function for {role!r}") from None

    def has(self, role: str) -> bool:
        """Return whether this generation has a function for a role."""
        return role in self._functions

    def vocab_of(self, model: int) -> int:
        """Return what functions about a model's vocabulary take."""
        return int(self.vocab(model)) if self.has("vocab") else model

    def empty_cache(self, context: int) -> None:
        """Empty the KV cache of a context."""
        self.clear_memory(self.memory(context) if self.has("memory") else context)

    def tensor(self, address: int) -> Any:
        """Return the tensor at an address, with the fields of ``table.tensor``."""
        return self.table.tensor.struct.from_address(address)


def open_library(path: str) -> Library:
    """Load a shared library and find its generation.

    Raises:
        UnavailableError: it cannot be loaded, or is of no known generation; the message says what was
        found.
    """
    shared_object = _load(path)
    fitting = []
    for table in TABLES:
        if not missing_functions(shared_object, table):
            library = Library(shared_object, table)
            problems = layout_problems(library)
            if not problems:
                return library
            fitting.append(f"{table.title}: {listed(problems, _NAMED, '; ')}")
    if fitting:
        raise UnavailableError(
            f"{path} exports the functions of a known generation, but its data are others than those of "
            + "; nor those of ".join(fitting)
        )
    raise UnavailableError(_unknown(shared_object, path))


def overrides(values: Mapping[str, int | float | bool | str]) -> Any:
    """Return metadata values as the list of structs that model parameters point to.

    Raises:
        BadInputError: a key or a text is too long for the struct.
    """
    entries: Any = (OVERRIDE.struct * (len(values) + 1))()
    for entry, (key, value) in zip(entries, values.items(), strict=False):
        tag, data = _override(value)
        for what, text in (("key", key.encode()), ("value", data)):
            if len(text) >= _OVERRIDE_BYTES:
                raise BadInputError(f"override of {key}: the {what} is longer than {_OVERRIDE_BYTES - 1} bytes")
        entry.tag, entry.key, entry.value = tag, key.encode(), data
    return entries  # the last one, of zeros, ends the list


def _override(value: int | float | bool | str) -> tuple[int, bytes]:
    """Return a value's tag and its bytes."""
    if isinstance(value, bool):
        return 2, bytes([value])
    if isinstance(value, str):
        return 3, value.encode()
    return (0, struct.pack("=q", value)) if isinstance(value, int) else (1, struct.pack("=d", value))


def missing_functions(shared_object: ctypes.CDLL, table: Table) -> list[str]:
    """Return the functions of a generation that a library does not export."""
    return [function.name for function in table.functions.values() if not hasattr(shared_object, function.name)]


def _unknown(shared_object: ctypes.CDLL, path: str) -> str:
    missing = {table.title: missing_functions(shared_object, table) for table in TABLES}
    llama = {f.name for table in TABLES for f in table.functions.values() if f.name.startswith("llama_")}
    if not any(hasattr(shared_object, name) for name in llama):
        return (
            f"{path} is not a libllama: it exports none of the functions of llama.cpp (another library, or one "
            "whose symbols were stripped or hidden)"
        )
    nearest = sorted(missing.items(), key=lambda item: len(item[1]))
    return f"{path} is a libllama of no known generation: " + "; ".join(
        f"for {title} it lacks {listed(names, _NAMED)}" for title, names in nearest
    )


def _load(path: str) -> ctypes.CDLL:
    """Open a library after those beside it that it may need, so that it gets these and no others."""
    for stem in COMPANIONS:
        beside = sorted(Path(path).parent.glob(f"{stem}.so*"))
        if beside:
            with suppress(OSError):  # the error of the library itself, below, says more
                ctypes.CDLL(str(beside[0]), mode=ctypes.RTLD_LOCAL)
    try:
        return ctypes.CDLL(path, mode=ctypes.RTLD_LOCAL)
    except OSError as error:
        reason = str(error)
        if "cannot open shared object file" in reason and not reason.startswith(path):
            needed = reason.partition(":")[0]
            reason = f"it needs {needed}, which is neither beside it nor where the system looks"
        raise UnavailableError(f"cannot load the library {path}: {reason}") from error


def _declared(shared_object: ctypes.CDLL, function: Function) -> Any:
    declared = shared_object[function.name]  # not the attribute, which all tables would share
    declared.restype = function.result
    declared.argtypes = function.arguments
    if not function.constants:
        return declared
    return lambda *arguments: declared(*arguments, *function.constants)


def layout_problems(library: Library) -> list[str]:
    """Return where the structs in the table differ from what the library does; empty when they fit."""
    table = library.table
    params = ((table.context_params, "default_context_params"), (table.model_params, "default_model_params"))
    problems = [problem for layout, role in params for problem in _size_problems(library, role, layout)]
    if not problems:
        for layout, role in params:
            problems += _default_problems(getattr(library, role)(), layout)
        problems += _tensor_problems(library)
    return problems


def _size_problems(library: Library, role: str, layout: Layout) -> list[str]:
    """Compare the number of bytes the library writes into a returned struct with the mirror's size."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return []  # only there is the pointer to the result an ordinary first argument
    function = library.table.functions[role].name
    address = ctypes.cast(getattr(library, role), c_void_p).value
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
    expected = ctypes.sizeof(layout.struct)
    # Padding at the end may stay unwritten.
    if expected - 8 < size <= expected:
        return []
    return [f"{function} writes {size} bytes, expected {expected}"]


def _default_problems(struct: ctypes.Structure, layout: Layout) -> list[str]:
    return [
        f"default {name} is {getattr(struct, name)!r}, expected {value!r}"
        for name, _, value in layout.fields
        if value is not ANY and getattr(struct, name) != value
    ]


@contextmanager
def _ggml_context(library: Library) -> Iterator[int]:
    context = library.ggml_init(INIT_PARAMS.struct(1 << 20, None, False))
    if not context:
        raise UnavailableError("ggml_init failed while the library's layout was being checked")
    try:
        yield context
    finally:
        library.ggml_free(context)


def _tensor_problems(library: Library) -> list[str]:
    """Make a few tensors and compare their fields with what the library's accessors return."""
    struct: Any = library.table.tensor.struct
    size = library.ggml_tensor_overhead() - _SIZE_OF_GGML_OBJECT
    if size != ctypes.sizeof(struct):
        return [f"struct ggml_tensor has {size} bytes, expected {ctypes.sizeof(struct)}"]
    for number, name in library.table.types.items():
        found = library.ggml_type_name(number)
        if found != name:
            return [f"ggml type {number} is {found!r}, expected {name!r}"]
    with _ggml_context(library) as context:
        address = library.ggml_new_tensor_4d(context, TYPE_F32, 7, 5, 3, 2)
        library.ggml_set_name(address, b"layout-check")
        square_address = library.ggml_sqr(context, address)
        permuted = library.tensor(library.ggml_permute(context, address, 0, 2, 1, 3))
        view = library.tensor(library.ggml_view_1d(context, address, 4, 20))
        plain = library.tensor(address)
        square = library.tensor(square_address)
        facts: dict[str, tuple[object, object]] = {
            "type": (plain.type, TYPE_F32),
            "ne": (tuple(plain.ne), (7, 5, 3, 2)),
            "nb": (tuple(plain.nb), (4, 28, 140, 420)),
            "nbytes": (plain.ne[3] * plain.nb[3], library.ggml_nbytes(address)),
            "nelements": (210, library.ggml_nelements(address)),
            "data": (plain.data, library.ggml_get_data(address)),
            "name": (plain.name, b"layout-check"),
            "address of name": (address + struct.name.offset, library.ggml_get_name(address)),
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
