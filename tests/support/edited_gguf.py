"""Change tensors of a model file in place; where each code of a matrix is stored is written from the layouts'
definitions, element by element, no project code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from bitnet_py.gguf import GGUFFile

Place = Callable[[np.ndarray, np.ndarray, int, int], tuple[np.ndarray, np.ndarray]]
"""Row and column of every element, rows, cols -> its byte and shift."""


def _strided(block: int, *, low: bool = False) -> Place:
    def place(r: np.ndarray, c: np.ndarray, rows: int, cols: int) -> tuple[np.ndarray, np.ndarray]:
        flat = r * cols + c
        stride = flat % block // (block // 4)
        byte = flat // block * (block // 4) + flat % (block // 4)
        return byte, 2 * stride if low else 6 - 2 * stride

    return place


PLACES: dict[str, Place] = {
    "i2_s": _strided(128),
    "sequential": _strided(4),
    "sequential, low bits first": _strided(4, low=True),
    "blocks of 64": _strided(64),
    "strides reversed": _strided(128, low=True),
    "four rows": lambda r, c, rows, cols: (r // 4 * cols + c, 6 - 2 * (r % 4)),
    "four rows, low bits first": lambda r, c, rows, cols: (r // 4 * cols + c, 2 * (r % 4)),
    "four quarters": lambda r, c, rows, cols: (r % (rows // 4) * cols + c, 2 * (r // (rows // 4))),
}


class EditedGGUF:
    """The bytes of a model file; ``save`` writes them back."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bytes = np.fromfile(path, np.uint8)
        with GGUFFile.open(path) as gguf:
            self.infos = dict(gguf.tensors)

    def data(self, name: str) -> np.ndarray:
        info = self.infos[name]
        return self.bytes[info.offset : info.offset + info.size_bytes]

    def matrices(self) -> list[str]:
        return [name for name, info in self.infos.items() if info.type.name == "I2_S"]

    def codes(self, name: str) -> np.ndarray:
        rows, cols = self.infos[name].shape
        r, c = np.divmod(np.arange(rows * cols).reshape(rows, cols), cols)
        byte, shift = PLACES["i2_s"](r, c, rows, cols)
        return (self.data(name)[byte] >> shift & 3).astype(np.uint8)

    def put_codes(self, name: str, codes: np.ndarray, layout: str = "i2_s") -> None:
        rows, cols = codes.shape
        r, c = np.divmod(np.arange(rows * cols).reshape(rows, cols), cols)
        byte, shift = PLACES[layout](r, c, rows, cols)
        packed = np.zeros(rows * cols // 4, np.int64)
        np.add.at(packed, byte, codes.astype(np.int64) << shift)
        self.data(name)[: packed.size] = packed

    def scale(self, name: str) -> np.ndarray:
        rows, cols = self.infos[name].shape
        return self.data(name)[rows * cols // 4 :][:4].view("<f4")

    def norm(self, name: str) -> np.ndarray:
        return self.data(name).view("<f4")

    def save(self) -> Path:
        self.bytes.tofile(self.path)
        return self.path
