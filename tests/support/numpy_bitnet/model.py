"""The weights of a GGUF file as the engine multiplies them, read by the reader of ``examples/third_engine.py``."""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tests.support.third_engine import third_engine

EXAMPLE = third_engine()


@dataclass(frozen=True)
class Matrix:
    """A ternary matrix: ``signs`` float32 ``(rows, cols)`` of -1, 0, +1, its scale, and the bytes it lies in."""

    signs: npt.NDArray[np.float32]
    scale: float
    packed: npt.NDArray[np.uint8]
    """``(rows, cols / 4)``; a block of 128 weights lies in 32 bytes."""


class Model:
    """A model file; tensors are decoded once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = EXAMPLE.File(path)
        self._held: dict[str, Any] = {}
        self.arch: str = self._file.metadata["general.architecture"]
        arch = self.arch

        def number(key: str) -> Any:
            return self._file.metadata[f"{arch}.{key}"]

        self.n_layers: int = number("block_count")
        self.dim: int = number("embedding_length")
        self.n_heads: int = number("attention.head_count")
        self.n_kv_heads: int = number("attention.head_count_kv")
        self.hidden_dim: int = number("feed_forward_length")
        self.head_dim: int = self._file.metadata.get(f"{arch}.attention.key_length", self.dim // self.n_heads)
        self.eps: float = number("attention.layer_norm_rms_epsilon")
        self.base: float = float(number("rope.freq_base"))

    @cached_property
    def sha256(self) -> str:
        """Digest of the file."""
        return hashlib.sha256(self._file.bytes).hexdigest()

    @property
    def embedding(self) -> npt.NDArray[np.float32]:
        """``(vocab_size, dim)``; also the head."""
        return self.vector("token_embd")

    def has(self, name: str) -> bool:
        """Return whether the file has a tensor."""
        return f"{name}.weight" in self._file.infos

    def vector(self, name: str) -> npt.NDArray[np.float32]:
        """Return a tensor that is not ternary, in float32."""
        if name not in self._held:
            self._held[name] = self._file.tensor(f"{name}.weight")
        held: npt.NDArray[np.float32] = self._held[name]
        return held

    def matrix(self, name: str) -> Matrix:
        """Return a ternary tensor."""
        if name not in self._held:
            shape, _, offset = self._file.infos[f"{name}.weight"]
            start, size = self._file.data + offset, int(np.prod(shape)) // 4
            (scale,) = struct.unpack_from("<f", self._file.bytes, start + size)
            packed = np.frombuffer(self._file.bytes, np.uint8, size, start).reshape(shape[0], -1)
            signs = np.sign(self._file.tensor(f"{name}.weight")).astype(np.float32)
            self._held[name] = Matrix(signs, scale, packed)
        held: Matrix = self._held[name]
        return held
