"""A compact int8 copy of the LM head, for an exact top-k without reading the whole head.

Every row is kept as ``scale * codes``, with upper bounds of the error. ``csrc/screen.h`` derives from
them an interval around every logit; only rows whose interval reaches high enough are read in
binary16. The results are bit-identical to those of the whole head.
"""

from __future__ import annotations

from collections.abc import Callable
from ctypes import c_void_p
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from bitnet_py import _native

MAX_TOP = 256
"""Most logits one search can return."""
MAX_DIM = 65536
"""Largest dim whose integer products fit 32 bits."""
HEAD_ROWS_AT_ONCE = 8192
"""If the whole head is read while the copy exists, its pages are returned after this many
rows."""


@dataclass(frozen=True, eq=False)
class Screen:
    """The copy: int8 codes and three float32 values per row, about half the size of the head."""

    codes: npt.NDArray[np.int8]
    """``(vocab_size, dim)``, within -127..127."""
    scale: npt.NDArray[np.float32]
    """``(vocab_size,)``: value of code 1."""
    error: npt.NDArray[np.float32]
    """``(vocab_size,)``: upper bound of the Euclidean norm of row - scale * codes."""
    norm: npt.NDArray[np.float32]
    """``(vocab_size,)``: upper bound of the Euclidean norm of scale * codes."""

    @classmethod
    def empty(cls, vocab_size: int, dim: int) -> Screen:
        """Return an empty copy."""
        codes = np.empty((vocab_size, dim), np.int8)
        scale, error, norm = (np.empty(vocab_size, np.float32) for _ in range(3))
        return cls(codes, scale, error, norm)

    @classmethod
    def build(
        cls, engine: c_void_p, vocab_size: int, dim: int, *, after: Callable[[int, int], Any] | None = None
    ) -> Screen:
        """Copy the LM head of an engine with all its threads, reading it once.

        ``after(first, n)`` is called when rows ``first`` to ``first + n`` have been copied.
        """
        screen = cls.empty(vocab_size, dim)
        struct = screen.struct()
        for first in range(0, vocab_size, HEAD_ROWS_AT_ONCE):
            n = min(HEAD_ROWS_AT_ONCE, vocab_size - first)
            screen.codes[first : first + n, 0] = 0  # page faults are faster from one thread
            _native.call("bn_engine_build_screen", engine, first, n, struct)
            if after is not None:
                after(first, n)
        return screen

    def struct(self) -> _native.ScreenStruct:
        """Return the C struct over these arrays; they must outlive it."""
        arrays = (self.codes, self.scale, self.error, self.norm)
        return _native.ScreenStruct(*(_native.address(array) for array in arrays))
