"""What a model file holds, tensor by tensor, before anything is computed with it: codes, scales, norms, sizes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from bitnet_py.config import I2_S_BLOCK
from bitnet_py.errors import ModelError
from bitnet_py.ggml_types import I2_S_TAIL_BYTES
from bitnet_py.gguf import GGMLType, GGUFFile, TensorInfo
from bitnet_py.layout_evidence import NORM_OF, column_shares, correlations
from bitnet_py.tq import TQ_TYPES, repack

FLOATS = {GGMLType.F32: "<f4", GGMLType.F16: "<f2"}
_CHUNK = 4 << 20
_CODES = np.array([[byte >> shift & 3 for shift in (6, 4, 2, 0)] for byte in range(256)])


@dataclass(frozen=True)
class ValueFacts:
    """Values of a float tensor; None where it has no finite one."""

    n_invalid: int
    """NaN and infinities."""
    n_negative: int
    min: float | None
    max: float | None
    rms: float | None


@dataclass(frozen=True)
class TensorFacts:
    """One tensor of a file."""

    name: str
    type: str
    shape: tuple[int, ...]
    """NumPy order."""
    declared_bytes: int
    """By type and shape."""
    stored_bytes: int
    """Up to the next tensor or the end of the file; more than declared where there is padding."""
    histogram: tuple[int, int, int, int] | None = None
    """Ternary types: how often each code occurs; code 3 does not exist."""
    scale: float | None = None
    """Ternary types: the multiplier of the codes, a float32; None where it is not finite."""
    values: ValueFacts | None = None
    """F32 and F16."""
    layout_z: dict[str, float] | None = None
    """Ternary types behind a norm: correlation by layout (``layout_evidence``)."""


def tensor_facts(gguf: GGUFFile) -> Iterator[TensorFacts]:
    """Yield the facts of every tensor in the order of the file; one is in memory at a time."""
    starts = sorted(info.offset for info in gguf.tensors.values())
    ends = dict(zip(starts, [*starts[1:], gguf.size_bytes], strict=True))
    for info in gguf.tensors.values():
        stored = ends[info.offset] - info.offset
        facts = TensorFacts(info.name, info.type.name, info.shape, info.size_bytes, stored)
        if info.type in FLOATS:
            yield replace(facts, values=value_facts(gguf.data(info.name).view(FLOATS[info.type])))
        else:
            yield _of_codes(facts, gguf, info)
        gguf.release_pages(gguf.data(info.name))


def packed_codes(gguf: GGUFFile, info: TensorInfo) -> tuple[npt.NDArray[np.uint8], float]:
    """Return a ternary matrix as I2_S bytes and its scale, which may be unusable.

    Raises:
        ModelError: no ternary type, or one with other values.
    """
    data = gguf.data(info.name)
    if info.type in TQ_TYPES:
        return repack(data, info.type)
    if info.type is not GGMLType.I2_S:
        raise ModelError(f"values of type {info.type.name} are not read as ternary weights")
    n_packed = info.size_bytes - I2_S_TAIL_BYTES
    return data[:n_packed], float(data[n_packed : n_packed + 4].view("<f4")[0])


def _of_codes(facts: TensorFacts, gguf: GGUFFile, info: TensorInfo) -> TensorFacts:
    try:
        packed, scale = packed_codes(gguf, info)
    except ModelError:
        return facts
    of_byte = np.zeros(256, np.int64)
    for start in range(0, packed.size, _CHUNK):
        of_byte += np.bincount(packed[start : start + _CHUNK], minlength=256)
    n0, n1, n2, n3 = (int((of_byte[:, None] * (code == _CODES)).sum()) for code in range(4))
    return replace(
        facts,
        histogram=(n0, n1, n2, n3),
        scale=scale if math.isfinite(scale) else None,
        layout_z=_evidence(facts, gguf, packed),
    )


def _evidence(facts: TensorFacts, gguf: GGUFFile, packed: npt.NDArray[np.uint8]) -> dict[str, float] | None:
    parts = facts.name.split(".")
    if len(parts) != 4 or parts[2] not in NORM_OF or len(facts.shape) != 2 or facts.shape[1] % I2_S_BLOCK:
        return None
    norm = gguf.tensors.get(f"{parts[0]}.{parts[1]}.{NORM_OF[parts[2]]}.weight")
    if norm is None or norm.type not in FLOATS or norm.shape != facts.shape[1:]:
        return None
    weights = gguf.data(norm.name).view(FLOATS[norm.type]).astype(np.float32)
    if not np.isfinite(weights).all():
        return None
    return correlations(column_shares(packed, *facts.shape), weights)


def value_facts(values: npt.NDArray[np.floating]) -> ValueFacts:
    """Return the facts of float values, read in chunks."""
    flat = values.reshape(-1)
    n_invalid = n_negative = 0
    low, high, squares = np.inf, -np.inf, 0.0
    for start in range(0, flat.size, _CHUNK):
        chunk = flat[start : start + _CHUNK]
        finite = np.isfinite(chunk)
        if not finite.all():
            n_invalid += int(chunk.size - np.count_nonzero(finite))
            chunk = chunk[finite]
        if chunk.size:
            n_negative += int(np.count_nonzero(chunk < 0))
            low, high = min(low, float(chunk.min())), max(high, float(chunk.max()))
            squares += float(np.sum(np.square(chunk, dtype=np.float64)))
    n_finite = flat.size - n_invalid
    if not n_finite:
        return ValueFacts(n_invalid, n_negative, None, None, None)
    return ValueFacts(n_invalid, n_negative, low, high, float(np.sqrt(squares / n_finite)))
