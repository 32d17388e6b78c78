"""Model files of the zoo: small synthetic ones, and damaged copies of them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bitnet_py.gguf import GGUFFile
from bitnet_py.synth import SynthConfig, write_model

SHAPE = SynthConfig(n_layers=5, dim=256, n_heads=4, n_kv_heads=2, hidden_dim=512, vocab_size=301, seed=7)
"""Odd enough to tell things apart: 2 query heads per key head, a vocabulary that no tile divides."""
BASES = ("plain", "untied", "large-eps", "saturated", "ties", "pre-default", "pre-none")
"""``untied`` has an ``output.weight``; ``large-eps`` an eps that matters; ``saturated`` drives every int8
activation of layer 0 to 127 at one token; ``ties`` puts activations of layer 0 exactly between two integers there;
the last two name another pre-tokeniser, or none."""
SPECIAL_TOKEN = 100
"""The token whose embedding ``saturated`` and ``ties`` change."""
LOUD = 4
"""Factor of every ``ffn_norm``: gates of ±6 and more, where activation functions with a limit differ."""
TENSORS = {"q": "attn_q", "k": "attn_k", "v": "attn_v", "attn_o_out": "attn_output"}
"""Tap -> tensor of its operation, where the names differ."""


class DamagedModel:
    """A writable GGUF file: tensors by name as bytes, codes, scales."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with GGUFFile.open(path) as gguf:
            self._tensors = dict(gguf.tensors)
        self._file: npt.NDArray[np.uint8] = np.memmap(path, np.uint8, "r+")

    def raw(self, name: str) -> npt.NDArray[np.uint8]:
        """Return the tensor's bytes, writable."""
        info = self._tensors[name]
        return self._file[info.offset : info.offset + info.size_bytes]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the tensor's shape (rows, cols)."""
        return self._tensors[name].shape

    def packed(self, name: str) -> npt.NDArray[np.uint8]:
        """Return the code bytes of a ternary tensor, ``(rows, cols // 4)``, writable."""
        rows, cols = self.shape(name)
        return self.raw(name)[: rows * cols // 4].reshape(rows, cols // 4)

    def scale(self, name: str) -> npt.NDArray[np.float32]:
        """Return the scale of a ternary tensor, ``(1,)``, writable."""
        rows, cols = self.shape(name)
        at = rows * cols // 4
        return self.raw(name)[at : at + 4].view("<f4")

    def f16(self, name: str) -> npt.NDArray[np.float16]:
        """Return an F16 matrix, writable."""
        return self.raw(name).view("<f2").reshape(self.shape(name))

    def f32(self, name: str) -> npt.NDArray[np.float32]:
        """Return an F32 vector, writable."""
        return self.raw(name).view("<f4")

    def replace_once(self, old: bytes, new: bytes) -> None:
        """Replace bytes that occur exactly once, by as many."""
        data = self._file.tobytes()
        assert data.count(old) == 1, f"{old!r} occurs {data.count(old)} times"
        assert len(new) == len(old)
        at = data.index(old)
        self._file[at : at + len(new)] = np.frombuffer(new, np.uint8)

    def change_after(
        self, key: bytes, size_bytes: int, change: Callable[[npt.NDArray[np.uint8]], npt.NDArray[Any]]
    ) -> None:
        """Change the bytes that follow a key which occurs exactly once."""
        data = self._file.tobytes()
        assert data.count(key) == 1, f"{key!r} occurs {data.count(key)} times"
        part = self._file[data.index(key) + len(key) :][:size_bytes]
        part[:] = np.frombuffer(change(part.copy()).tobytes(), np.uint8)


def codes(packed: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Unpack I2_S bytes ``(rows, cols // 4)`` into codes 0..3 ``(rows, cols)``: byte p of a block of 32 holds
    elements p, p + 32, p + 64, p + 96, high bits first."""
    blocks = packed.reshape(packed.shape[0], -1, 1, 32)
    shifted = blocks >> np.array([6, 4, 2, 0], np.uint8)[:, None] & 3
    return shifted.reshape(packed.shape[0], -1)


def pack(values: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Pack codes ``(rows, cols)`` as ``codes`` reads them."""
    parts = values.astype(np.uint8).reshape(values.shape[0], -1, 4, 32)
    return (parts << np.array([6, 4, 2, 0], np.uint8)[:, None]).sum(2, dtype=np.uint8).reshape(values.shape[0], -1)


def write_base(base: str, path: Path) -> None:
    """Write one of ``BASES``."""
    pre = base.removeprefix("pre-") if base.startswith("pre-") else SHAPE.pre
    eps = 1e-2 if base == "large-eps" else SHAPE.rms_eps
    write_model(path, replace(SHAPE, untied_head=base == "untied", pre=pre, rms_eps=eps))
    model = DamagedModel(path)
    for layer in range(SHAPE.n_layers):
        model.f32(f"blk.{layer}.ffn_norm.weight")[:] *= LOUD
    if base in ("saturated", "ties"):
        model.f32("blk.0.attn_norm.weight")[:] = 1
        row = model.f16("token_embd.weight")[SPECIAL_TOKEN]
        row[:] = 0.25 if base == "saturated" else np.where(np.arange(row.size) % 3, -0.125, 0.125)
        row[0] = 0.25


def damaged_copy(source: Path, target: Path) -> DamagedModel:
    """Copy a model file to change it."""
    shutil.copyfile(source, target)
    return DamagedModel(target)
