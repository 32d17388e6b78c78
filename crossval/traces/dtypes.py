"""What the tensors of a trace are stored in: binary32, binary16 or bfloat16, widened exactly when read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from crossval.formats import FORMATS, Dtype

OF_NAME: Mapping[str, Dtype] = {"F32": "f32", "F16": "f16", "BF16": "bf16"}
"""Name in ``trace.json`` and in a safetensors header -> format."""
NAME_OF: Mapping[Dtype, str] = {dtype: name for name, dtype in OF_NAME.items()}
N_BYTES: Mapping[Dtype, int] = {"f32": 4, "f16": 2, "bf16": 2}


def widened(array: npt.NDArray[Any], dtype: Dtype) -> npt.NDArray[np.float32]:
    """Return a stored tensor in float32, C-contiguous: every value of these formats is one of binary32.

    ``array``: as it lies in the file; of bfloat16, which NumPy lacks, its bits as uint16.
    """
    if dtype == "bf16":
        wide: npt.NDArray[np.float32] = (array.astype(np.uint32, order="C") << np.uint32(16)).view(np.float32)
        return wide
    return np.ascontiguousarray(array, dtype=np.float32)


def stored(array: npt.NDArray[np.float32], dtype: Dtype) -> npt.NDArray[Any]:
    """Return what is written for a tensor, little-endian; of bfloat16 its bits.

    Raises:
        ValueError: a value that is not one of this format: storing it would change it.
    """
    if dtype == "f32":
        return np.ascontiguousarray(array, dtype="<f4")
    if not FORMATS[dtype].holds(array):
        raise ValueError(f"it holds values that are not {NAME_OF[dtype]}; store it as F32")
    if dtype == "f16":
        return np.ascontiguousarray(array, dtype="<f2")
    bits = np.ascontiguousarray(array, "<f4").view(np.uint32) >> np.uint32(16)
    # all digits of a NaN may be cut off
    narrow: npt.NDArray[Any] = np.where(np.isnan(array), np.uint32(0x7FC0), bits).astype("<u2")
    return narrow


def read_bf16(path: Path, key: str) -> npt.NDArray[np.uint16]:
    """Return the bits of a bfloat16 tensor of a safetensors file, which its own library cannot give to NumPy.

    Raises:
        OSError, ValueError, KeyError: the file was changed since its header was checked.
    """
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        entry = json.loads(file.read(size))[key]
        start, end = entry["data_offsets"]
        file.seek(8 + size + start)
        bits: npt.NDArray[np.uint16] = np.frombuffer(file.read(end - start), "<u2").reshape(entry["shape"])
        return bits
