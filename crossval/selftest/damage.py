"""Modified copies of model files: the effect of an engine that misreads its weights or its header."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bitnet_py.ggml_types import GGMLType
from bitnet_py.gguf import GGUFFile
from crossval.errors import BadInputError
from crossval.model import taps

Codes = npt.NDArray[np.uint8]

TENSORS = {"q": "attn_q", "k": "attn_k", "v": "attn_v", "attn_o_out": "attn_output"}
"""Tap -> tensor of its operation, where the names differ."""


class DamagedModel:
    """A writable GGUF file: tensors by name as bytes, codes, scales; numbers of the header by key."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with GGUFFile.open(path) as gguf:
            self._tensors = dict(gguf.tensors)
            self._architecture = gguf.metadata.get("general.architecture")
        self._file: npt.NDArray[np.uint8] = np.memmap(path, np.uint8, "r+")

    @property
    def n_layers(self) -> int:
        """Return how many layers the file holds."""
        return sum(name.endswith(".attn_q.weight") for name in self._tensors)

    def raw(self, name: str) -> npt.NDArray[np.uint8]:
        """Return the tensor's bytes, writable."""
        info = self._tensors[name]
        return self._file[info.offset : info.offset + info.size_bytes]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the tensor's shape (rows, cols)."""
        return tuple(self._tensors[name].shape)

    def packed(self, name: str) -> Codes:
        """Return the code bytes of a ternary tensor, ``(rows, cols // 4)``, writable."""
        rows, cols = self.shape(name)
        return self._of(name, GGMLType.I2_S)[: rows * cols // 4].reshape(rows, cols // 4)

    def scale(self, name: str) -> npt.NDArray[np.float32]:
        """Return the scale of a ternary tensor, ``(1,)``, writable."""
        rows, cols = self.shape(name)
        at = rows * cols // 4
        return self._of(name, GGMLType.I2_S)[at : at + 4].view("<f4")

    def f16(self, name: str) -> npt.NDArray[np.float16]:
        """Return an F16 matrix, writable."""
        return self._of(name, GGMLType.F16).view("<f2").reshape(self.shape(name))

    def f32(self, name: str) -> npt.NDArray[np.float32]:
        """Return an F32 vector, writable."""
        return self._of(name, GGMLType.F32).view("<f4")

    def _of(self, name: str, kind: GGMLType) -> npt.NDArray[np.uint8]:
        """Return the bytes of a tensor that is of a type.

        Raises:
            BadInputError: it is of another.
        """
        found = self._tensors[name].type
        if found is not kind:
            raise BadInputError(
                f"tensor {name}: expected {kind.name}, which faults are made for, found {found.name}; use a model "
                "with I2_S matrices, an F16 embedding and F32 norms, such as the shipped one"
            )
        return self.raw(name)

    def set_header(self, key: str, value: float) -> None:
        """Change a float32 of the header; ``key`` without the architecture's name before it.

        Raises:
            BadInputError: the header does not hold it as such.
        """
        start = f"{self._architecture}.{key}".encode() + (6).to_bytes(4, "little")
        self.change_after(start, 4, lambda _: np.array([value], "<f4"))

    def change_after(
        self, key: bytes, size_bytes: int, change: Callable[[npt.NDArray[np.uint8]], npt.NDArray[Any]]
    ) -> None:
        """Change the bytes after a key that occurs exactly once in the header.

        Raises:
            BadInputError: it does not.
        """
        header = self._file[: min(info.offset for info in self._tensors.values())].tobytes()
        if header.count(key) != 1:
            raise BadInputError(f"{self.path.name}: {key!r} occurs {header.count(key)} times in the header")
        part = self._file[header.index(key) + len(key) :][:size_bytes]
        part[:] = np.frombuffer(change(part.copy()).tobytes(), np.uint8)


Damage = Callable[[DamagedModel, str], None]
"""Changes a copy of the file, given the full name of the tap that must become wrong."""


def damaged_copy(source: Path, target: Path) -> DamagedModel:
    """Copy a model file in order to change it."""
    shutil.copyfile(source, target)
    target.chmod(0o600)  # an installed model may be read-only
    return DamagedModel(target)


def codes(packed: Codes) -> Codes:
    """Unpack I2_S bytes ``(rows, cols // 4)`` into codes 0..3 ``(rows, cols)``: byte p of a block of 32 holds
    elements p, p + 32, p + 64, p + 96, high bits first."""
    blocks = packed.reshape(packed.shape[0], -1, 1, 32)
    shifted: Codes = np.bitwise_and(blocks >> np.array([6, 4, 2, 0], np.uint8)[:, None], 3, dtype=np.uint8)
    return shifted.reshape(packed.shape[0], -1)


def pack(values: npt.NDArray[Any]) -> Codes:
    """Pack codes ``(rows, cols)`` as ``codes`` reads them."""
    parts = values.astype(np.uint8).reshape(values.shape[0], -1, 4, 32)
    shifted: Codes = (parts << np.array([6, 4, 2, 0], np.uint8)[:, None]).sum(2, dtype=np.uint8)
    return shifted.reshape(values.shape[0], -1)


def tensor(tap: str) -> str:
    """Return the tensor whose values the operation of a tap reads."""
    name = taps.parse(tap)
    return f"blk.{name.layer}.{TENSORS.get(name.tap, name.tap)}.weight"


def of_codes(change: Callable[[Codes], Codes]) -> Damage:
    """Change the code bytes of the operation's matrix."""

    def damage(model: DamagedModel, tap: str) -> None:
        packed = model.packed(tensor(tap))
        packed[:] = change(packed)

    return damage


def of_scale(change: Callable[[npt.NDArray[np.float32]], npt.NDArray[np.float32] | float]) -> Damage:
    """Change the scale of the operation's matrix."""

    def damage(model: DamagedModel, tap: str) -> None:
        scale = model.scale(tensor(tap))
        scale[:] = change(scale)

    return damage


def of_embedding(change: Callable[[npt.NDArray[np.float16]], npt.NDArray[np.float16]]) -> Damage:
    """Change the embedding table."""

    def damage(model: DamagedModel, tap: str) -> None:
        table = model.f16("token_embd.weight")
        table[:] = change(table.copy())

    return damage


def of_header(key: str, value: float) -> Damage:
    """Change a float32 of the header: an engine that uses its own number instead."""
    return lambda model, tap: model.set_header(key, value)


def swap(first: str, second: str) -> Damage:
    """Swap two tensors of the tap's layer."""

    def damage(model: DamagedModel, tap: str) -> None:
        layer = taps.parse(tap).layer
        a, b = (model.raw(f"blk.{layer}.{name}.weight") for name in (first, second))
        a[:], b[:] = b.copy(), a.copy()

    return damage


def of_next_layer(model: DamagedModel, tap: str) -> None:
    """Replace the operation's tensor by the next layer's; in the last layer, by the first layer's."""
    name = taps.parse(tap)
    assert name.layer is not None
    neighbour = f"blk.{(name.layer + 1) % model.n_layers}.{name.tap}"
    model.raw(tensor(tap))[:] = model.raw(tensor(neighbour))


def read_sequentially(packed: Codes, shifts: tuple[int, ...]) -> Codes:
    """Return what a reader of four consecutive codes per byte sees, packed for a correct reader."""
    read = packed[:, :, None] >> np.array(shifts, np.uint8) & 3
    return pack(read.reshape(packed.shape[0], -1))


def blocks_of_64(packed: Codes) -> Codes:
    """Return what a reader of blocks of 64 codes sees, packed in blocks of 128."""
    groups = packed.reshape(packed.shape[0], -1, 1, 16)
    read = groups >> np.array([6, 4, 2, 0], np.uint8)[:, None] & 3
    return pack(read.reshape(packed.shape[0], -1))


def zero_plus_minus(packed: Codes) -> Codes:
    """Return codes that mean to a correct reader what a reader with the table 0, +1, -1 sees."""
    return pack((codes(packed) + 1) % 3)


def transposed(packed: Codes) -> Codes:
    """Return the codes of a square matrix, transposed."""
    return pack(np.ascontiguousarray(codes(packed).T))


def table_transposed(table: npt.NDArray[np.float16]) -> npt.NDArray[np.float16]:
    """Return a table as a reader with swapped dimensions sees it."""
    other: npt.NDArray[np.float16] = table.reshape(table.shape[::-1]).T
    return other
