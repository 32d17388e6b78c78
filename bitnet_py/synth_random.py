"""Seeded random numbers that are the same on every platform and NumPy version."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt

T = TypeVar("T")


class Stream:
    """An independent stream of random bits per ``(seed, name)``.

    Only raw PCG64 output is used: NumPy guarantees a bit generator's stream, but not what
    ``Generator`` methods make of it. Everything derived from it here is integer arithmetic.
    """

    def __init__(self, seed: int, name: str) -> None:
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        self._bits = np.random.PCG64(int.from_bytes(digest, "little"))

    def bytes(self, count: int) -> npt.NDArray[np.uint8]:
        """Return ``count`` uniform bytes."""
        raw = np.asarray(self._bits.random_raw(-(-count // 8)), "<u8")
        return raw.view(np.uint8)[:count]

    def uint16(self, count: int) -> npt.NDArray[np.uint16]:
        """Return ``count`` uniform 16-bit integers."""
        return self.bytes(2 * count).view("<u2")

    def below(self, limit: int) -> int:
        """Return an integer from 0 to ``limit - 1`` (bias below 2^-50 for small limits)."""
        return int(self._bits.random_raw()) % limit

    def choice(self, items: Sequence[T]) -> T:
        """Return one of ``items``."""
        return items[self.below(len(items))]
