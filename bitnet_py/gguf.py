"""Read GGUF containers: safe, memory-mapped, bounds-checked; no length in the file is ever trusted.

Layout (version 2 and 3, little-endian; https://github.com/ggml-org/ggml/blob/master/docs/gguf.md)::

    "GGUF" | u32 version | u64 n_tensors | u64 n_kv
    n_kv      x ( string key | u32 value type | value )
    n_tensors x ( string name | u32 n_dims | u64 dims[n_dims] | u32 tensor type | u64 offset )
    padding to ``general.alignment`` (default 32)
    tensor data; every offset is relative to this point and a multiple of the alignment

    string = u64 size_bytes | UTF-8 bytes          array = u32 element type | u64 count | elements

``dims`` are stored fastest-running first; ``TensorInfo.shape`` is the reverse, NumPy order.
"""

from __future__ import annotations

import contextlib
import itertools
import mmap
import os
import stat
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from bitnet_py import overrides
from bitnet_py.errors import DAMAGED, ModelError, clip, model_error
from bitnet_py.ggml_types import BLOCK_LAYOUT, LOOKUP_TYPES, OTHER_TYPES, GGMLType, tensor_size_bytes
from bitnet_py.string_array import MAX_STRING_BYTES, StringArray, find_strings, walk_strings

__all__ = ["GGMLType", "GGUFFile", "TensorInfo"]

DEFAULT_ALIGNMENT = 32
# Each takes memory beside the file: known vocabularies have up to 262,144 tokens and 514,906 merges.
_MAX_STRINGS = 1 << 19
_MAX_KEYS = 1 << 16
_MAX_TENSORS = 1 << 16
_MAX_NAME_BYTES = 64
_MAX_DIMS = 4
_MIN_KV_BYTES = 8 + 4 + 1
_MIN_TENSOR_INFO_BYTES = 8 + 4 + 4 + 8
_TRUNCATED = "the file is truncated or damaged: copy or download it again"
_LOOKUP = (
    "TL1 and TL2 are laid out for the kernels of one build: take the model's I2_S file, or convert its checkpoint "
    "with bitnet.cpp's setup_env.py -q i2_s"
)


_SCALARS: Mapping[int, tuple[str, str]] = MappingProxyType(
    {
        0: ("B", "u1"),
        1: ("b", "i1"),
        2: ("<H", "<u2"),
        3: ("<h", "<i2"),
        4: ("<I", "<u4"),
        5: ("<i", "<i4"),
        6: ("<f", "<f4"),
        7: ("B", "u1"),
        10: ("<Q", "<u8"),
        11: ("<q", "<i8"),
        12: ("<d", "<f8"),
    }
)
"""GGUF value type -> (struct format, dtype)."""
_BOOL, _STRING, _ARRAY = 7, 8, 9


@dataclass(frozen=True)
class TensorInfo:
    """One entry of the tensor table: shape in NumPy order (rows, cols), offset from the start of the file."""

    name: str
    shape: tuple[int, ...]
    type: GGMLType
    offset: int
    size_bytes: int


class GGUFFile:
    """An open GGUF file: metadata, tensor table and read-only views into the mapped file.

    Use as a context manager or call ``close``. Views handed out by ``data`` and the arrays of
    ``metadata`` stay valid after closing; the mapping itself is released with the last view or
    ``StringArray``.

    Values of ``metadata`` are bool, int, float, str, a read-only NumPy array, or a ``StringArray``.
    The strings of the latter are decoded on access: one that is not UTF-8 is a ``ModelError`` only
    then.
    """

    def __init__(
        self,
        path: Path,
        version: int,
        metadata: Mapping[str, Any],
        tensors: Mapping[str, TensorInfo],
        mapping: mmap.mmap,
        alignment: int,
        values: Mapping[str, slice],
    ) -> None:
        self.path = path
        self.alignment = alignment
        self._values = values
        self.version = version
        self.size_bytes = len(mapping)
        self.metadata = metadata
        self.tensors = tensors
        self._mapping: mmap.mmap | None = mapping

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> GGUFFile:
        """Map the file and parse its header; tensor data is not touched.

        Raises:
            ModelError: missing, unreadable or malformed file; the message names the file and the
                place. Or a value of ``--override`` does not fit it.
        """
        mapping, resolved = _map(path)
        try:
            gguf = _Parser(resolved, mapping).parse()
            gguf.metadata = overrides.applied(gguf.metadata)
            return gguf
        except BaseException:
            _release(mapping)
            raise

    def data(self, name: str) -> npt.NDArray[np.uint8]:
        """Return the bytes of a tensor as a read-only uint8 view ``(size_bytes,)`` into the mapping.

        Raises:
            ModelError: no such tensor, or the file is closed.
        """
        if self._mapping is None:
            raise ModelError(f"{self.path}: tensor {clip(name)} asked for after the file was closed")
        info = self.tensors.get(name)
        if info is None:
            raise model_error(
                self.path,
                "tensor table",
                expected=f"tensor {clip(name)}",
                found=f"{len(self.tensors)} others",
                remedy="this is not a complete model of the expected architecture",
            )
        return np.frombuffer(self._mapping, np.uint8, count=info.size_bytes, offset=info.offset)

    def raw_value(self, key: str) -> bytes:
        """Return the value of a key as it stands in the file, its type first.

        Raises:
            ModelError: the file is closed.
        """
        if self._mapping is None:
            raise ModelError(f"{self.path}: key {clip(key)} asked for after the file was closed")
        return self._mapping[self._values[key]]

    def release_pages(self, view: npt.NDArray[Any]) -> None:
        """Let the system drop the pages of a view into the mapping; the next access reads them again."""
        if self._mapping is None or not hasattr(self._mapping, "madvise"):
            return
        start = view.ctypes.data - np.frombuffer(self._mapping, np.uint8, count=1).ctypes.data
        first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE  # whole pages inside
        end = (start + view.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if end > first:
            self._mapping.madvise(mmap.MADV_DONTNEED, first, end - first)

    def close(self) -> None:
        """Release the mapping; existing views and string arrays keep it alive until they are gone."""
        mapping, self._mapping = self._mapping, None
        if mapping is not None:
            _release(mapping)

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()


def _map(path: str | os.PathLike[str]) -> tuple[mmap.mmap, Path]:
    """Open and map a regular, non-empty file read-only."""
    resolved = Path(path)
    give = "give the path of a .gguf file"
    try:
        # Checked before opening: opening a FIFO would wait for a writer forever.
        if not stat.S_ISREG(os.stat(resolved).st_mode):
            kind = "a directory" if resolved.is_dir() else "a special file"
            raise model_error(resolved, "model file", expected="a regular file", found=kind, remedy=give)
        with resolved.open("rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                raise model_error(resolved, "model file", expected="GGUF data", found="0 bytes", remedy=_TRUNCATED)
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), resolved
    except FileNotFoundError:
        raise model_error(resolved, "model file", expected="a file", found="nothing", remedy=give) from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise model_error(resolved, "model file", expected="a readable file", found=reason, remedy=give) from None


def _release(mapping: mmap.mmap) -> None:
    """Close a mapping now, or leave it to the last view (an array, or one held by a traceback)."""
    with contextlib.suppress(BufferError):
        mapping.close()


class _Parser:
    """A cursor over the mapped header; every read is checked against the end of the file first."""

    def __init__(self, path: Path, mapping: mmap.mmap) -> None:
        self.path = path
        self.mapping = mapping
        self.end = len(mapping)
        self.pos = 0

    def fail(self, what: str, expected: object, found: object, remedy: str = DAMAGED) -> NoReturn:
        raise model_error(
            self.path, f"{what} (byte {self.pos})", expected=expected, found=found, remedy=remedy
        ) from None

    def need(self, n_bytes: int, what: str) -> None:
        if n_bytes > self.end - self.pos:
            self.fail(what, f"{n_bytes} bytes", f"{self.end - self.pos} up to the end of the file", _TRUNCATED)

    def scalar(self, fmt: str, what: str) -> Any:
        size = struct.calcsize(fmt)
        self.need(size, what)
        (value,) = struct.unpack_from(fmt, self.mapping, self.pos)
        self.pos += size
        return value

    def string(self, what: str, limit: int = MAX_STRING_BYTES) -> str:
        offsets = walk_strings(self.mapping, self.pos, 1, limit)
        if len(offsets) < 2:
            self.refuse_length(what, 0, limit)
        self.pos += 8
        try:
            with memoryview(self.mapping) as whole, whole[self.pos : offsets[1]] as part:
                text = str(part, "utf-8")
        except UnicodeDecodeError as error:
            self.fail(f"{what}, string 0", "UTF-8", f"{error.reason} at its byte {error.start}")
        self.pos = offsets[1]
        return text

    def strings(self, count: int, what: str) -> StringArray:
        offsets = find_strings(self.mapping, self.pos, count)
        self.pos = int(offsets[-1])
        if offsets.size <= count:
            self.refuse_length(what, offsets.size - 1, MAX_STRING_BYTES)
        return StringArray(self.mapping, offsets, self.path, what)

    def refuse_length(self, what: str, index: int, limit: int) -> NoReturn:
        """Raise for the length of the string at the cursor, with what is wrong with it."""
        what = f"{what}, length of string {index}"
        rest = self.end - self.pos
        if rest < 8:
            self.fail(what, "8 bytes", rest, _TRUNCATED)
        (length,) = struct.unpack_from("<Q", self.mapping, self.pos)
        self.fail(what, f"at most {min(limit, rest - 8)} bytes", length, _TRUNCATED)

    def array(self, key: str) -> StringArray | npt.NDArray[Any]:
        element = self.scalar("<I", f"element type of {key}")
        count = self.scalar("<Q", f"length of {key}")
        if element == _STRING:
            most = min((self.end - self.pos) // 8, _MAX_STRINGS)
            if count > most:
                self.fail(f"length of {key}", f"at most {most} strings", count)
            return self.strings(count, key)
        if element not in _SCALARS:
            found = "an array" if element == _ARRAY else f"type {element}"
            self.fail(f"element type of {key}", "a scalar or string type (0..8, 10..12)", found)
        dtype = np.dtype(_SCALARS[element][1])
        most = (self.end - self.pos) // dtype.itemsize
        if count > most:
            self.fail(f"length of {key}", f"at most {most} elements up to the end of the file", count, _TRUNCATED)
        values: npt.NDArray[Any] = np.frombuffer(self.mapping, dtype, count=count, offset=self.pos)
        self.pos += count * dtype.itemsize
        if element == _BOOL:
            if count and values.max() > 1:
                self.fail(key, "booleans 0 or 1", int(values.max()))
            values = values.astype(np.bool_)
        else:
            values = values.copy()
        values.flags.writeable = False
        return values

    def value(self, key: str) -> Any:
        kind = self.scalar("<I", f"type of {key}")
        if kind == _STRING:
            return self.string(key)
        if kind == _ARRAY:
            return self.array(key)
        if kind not in _SCALARS:
            self.fail(f"type of {key}", "a GGUF value type (0..12)", kind)
        value = self.scalar(_SCALARS[kind][0], key)
        if kind == _BOOL:
            if value > 1:
                self.fail(key, "a boolean, 0 or 1", value)
            return bool(value)
        return value

    def parse(self) -> GGUFFile:
        version, n_tensors, n_kv = self.header()
        metadata: dict[str, Any] = {}
        values: dict[str, slice] = {}
        for i in range(n_kv):
            key = self.string(f"key {i} of {n_kv}", limit=65535)
            if not key or key in metadata:
                self.fail(f"key {i}", "a new, non-empty key", clip(key))
            start = self.pos
            metadata[key] = self.value(f"key {clip(key)}")
            values[key] = slice(start, self.pos)
        alignment = self.alignment(metadata)
        raw = [self.tensor_info(i) for i in range(n_tensors)]
        data_start = -(-self.pos // alignment) * alignment
        tensors: dict[str, TensorInfo] = {}
        for name, shape, kind, offset in raw:
            if name in tensors:
                self.fail("tensor table", "unique tensor names", f"{clip(name)} twice")
            tensors[name] = self.place(name, shape, kind, offset, data_start, alignment)
        self.check_overlap(tensors)
        header = MappingProxyType(metadata), MappingProxyType(tensors)
        return GGUFFile(self.path, version, *header, self.mapping, alignment, values)

    def header(self) -> tuple[int, int, int]:
        magic = self.mapping[:4]
        if magic != b"GGUF":
            self.fail("magic", "b'GGUF'", repr(magic), "this is not a GGUF file: give the path of a .gguf model")
        self.pos = 4
        version = self.scalar("<I", "version")
        if version not in (2, 3):
            found: object = version
            if version and version & 0xFFFF == 0:
                found = f"{version:#010x}, a big-endian file"
                remedy = "convert it to little-endian (gguf-convert-endian of the gguf package), or take that file"
                self.fail("version", "2 or 3, little-endian", found, remedy)
            self.fail("version", "2 or 3, little-endian", found, "convert the model again with a current tool")
        n_tensors = self.scalar("<Q", "number of tensors")
        n_kv = self.scalar("<Q", "number of keys")
        left = self.end - self.pos
        for what, count, size, most in (
            ("keys", n_kv, _MIN_KV_BYTES, _MAX_KEYS),
            ("tensors", n_tensors, _MIN_TENSOR_INFO_BYTES, _MAX_TENSORS),
        ):
            if count > left // size:
                self.fail(f"number of {what}", f"at most {left // size} in {left} bytes", count, _TRUNCATED)
            if count > most:
                self.fail(f"number of {what}", f"at most {most}", count)
        return version, n_tensors, n_kv

    def alignment(self, metadata: Mapping[str, Any]) -> int:
        value = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if type(value) is not int or not 8 <= value <= 65536 or value & (value - 1):
            self.fail("general.alignment", "a power of two from 8 to 65536", clip(str(value)))
        return value

    def tensor_info(self, index: int) -> tuple[str, tuple[int, ...], int, int]:
        name = self.string(f"name of tensor {index}", limit=_MAX_NAME_BYTES)
        if not name:
            self.fail(f"name of tensor {index}", "a name", "an empty string")
        what = f"tensor {clip(name)}"
        n_dims = self.scalar("<I", f"{what}, number of dimensions")
        if not 1 <= n_dims <= _MAX_DIMS:
            self.fail(f"{what}, number of dimensions", f"1 to {_MAX_DIMS}", n_dims)
        shape = tuple(self.scalar("<Q", f"{what}, dimension {i}") for i in range(n_dims))[::-1]
        if min(shape) == 0:
            self.fail(f"{what}, shape", "dimensions of at least 1", shape)
        return name, shape, self.scalar("<I", f"{what}, type"), self.scalar("<Q", f"{what}, offset")

    def place(
        self, name: str, shape: tuple[int, ...], kind: int, offset: int, data_start: int, alignment: int
    ) -> TensorInfo:
        """Return the checked entry of one tensor: known type, whole blocks, aligned, inside the file."""
        what = f"tensor {clip(name)}"
        if kind in LOOKUP_TYPES:
            self.fail(f"{what}, type", "I2_S", f"{LOOKUP_TYPES[kind]} ({kind})", _LOOKUP)
        if kind not in GGMLType.__members__.values():
            found = f"{OTHER_TYPES[kind]} ({kind})" if kind in OTHER_TYPES else kind
            remedy = "convert the model to I2_S with a table of F16, F32 or another supported type"
            self.fail(f"{what}, type", "a type that is read here", found, remedy)
        ggml_type = GGMLType(kind)
        size_bytes = tensor_size_bytes(shape, ggml_type)
        if size_bytes is None:
            elements = BLOCK_LAYOUT[ggml_type][0]
            self.fail(f"{what}, row length for {ggml_type.name}", f"a multiple of {elements}", shape[-1])
        if offset % alignment:
            self.fail(f"{what}, offset", f"a multiple of {alignment}", offset)
        start = data_start + offset
        if start + size_bytes > self.end:
            expected = f"bytes {start} to {start + size_bytes} inside the file"
            self.fail(f"{what}, data", expected, f"a file of {self.end} bytes", _TRUNCATED)
        return TensorInfo(name, shape, ggml_type, start, size_bytes)

    def check_overlap(self, tensors: Mapping[str, TensorInfo]) -> None:
        ordered = sorted(tensors.values(), key=lambda info: info.offset)
        for left, right in itertools.pairwise(ordered):
            if left.offset + left.size_bytes > right.offset:
                expected = f"to start at byte {left.offset + left.size_bytes} or later, after {clip(left.name)}"
                self.fail(f"tensor {clip(right.name)}, data", expected, right.offset)
