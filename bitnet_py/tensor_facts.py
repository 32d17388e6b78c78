"""What a model file holds, tensor by tensor, before anything is computed with it: codes, scales, norms, sizes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from bitnet_py.checkpoint import widen_bfloat16
from bitnet_py.config import I2_S_BLOCK
from bitnet_py.errors import ModelError
from bitnet_py.ggml_types import I2_S_TAIL_BYTES
from bitnet_py.gguf import GGMLType, GGUFFile, TensorInfo
from bitnet_py.layout_evidence import NORM_OF, column_shares, correlations
from bitnet_py.projections import PROJECTIONS, repack

FLOATS: Mapping[GGMLType, str] = MappingProxyType({GGMLType.F32: "<f4", GGMLType.F16: "<f2", GGMLType.BF16: "<u2"})
"""Types of single numbers -> how NumPy reads them; BF16 as its bits."""
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
    """Ternary matrices: how often each code occurs; code 3 does not exist."""
    scale: float | None = None
    """Ternary matrices: the multiplier of the codes, a float32; None where it is not finite."""
    values: ValueFacts | None = None
    """Types of single numbers."""
    layout_z: dict[str, float] | None = None
    """I2_S behind a norm: correlation by layout (``layout_evidence``)."""


def tensor_facts(gguf: GGUFFile) -> Iterator[TensorFacts]:
    """Yield the facts of every tensor in the order of the file; one is in memory at a time."""
    starts = sorted(info.offset for info in gguf.tensors.values())
    ends = dict(pairwise([*starts, gguf.size_bytes]))
    for info in gguf.tensors.values():
        stored = ends[info.offset] - info.offset
        facts = TensorFacts(info.name, info.type.name, info.shape, info.size_bytes, stored)
        if info.type in FLOATS:
            facts = replace(facts, values=value_facts(float_values(gguf, info, some) for some in chunks(info)))
        if info.type is GGMLType.I2_S or is_projection(info):
            facts = _of_codes(facts, gguf, info)
        yield facts
        gguf.release_pages(gguf.data(info.name))


def is_projection(info: TensorInfo) -> bool:
    """Return whether a tensor has the name and shape of a layer's ternary matrix."""
    parts = info.name.split(".")
    return len(parts) == 4 and parts[0] == "blk" and parts[2] in NORM_OF and len(info.shape) == 2


def chunks(info: TensorInfo) -> list[slice]:
    """Return slices of a tensor's rows (of a vector, its elements) of a few million values each."""
    n_rows = info.shape[0]
    step = max(1, _CHUNK // max(1, math.prod(info.shape[1:])))
    return [slice(first, min(first + step, n_rows)) for first in range(0, n_rows, step)]


def float_values(gguf: GGUFFile, info: TensorInfo, some: slice) -> npt.NDArray[np.floating]:
    """Return some rows of a tensor of one of ``FLOATS``, BF16 widened to float32."""
    rows = gguf.data(info.name).view(FLOATS[info.type]).reshape(info.shape)[some]
    return widen_bfloat16(rows) if info.type is GGMLType.BF16 else rows


def packed_codes(gguf: GGUFFile, info: TensorInfo) -> tuple[npt.NDArray[np.uint8], float]:
    """Return a ternary matrix as I2_S bytes and its scale, which may be unusable.

    Raises:
        ModelError: not a type of ternary matrices, or other values.
    """
    if info.type is GGMLType.I2_S:
        data, n_packed = gguf.data(info.name), info.size_bytes - I2_S_TAIL_BYTES
        return data[:n_packed], float(data[n_packed : n_packed + 4].view("<f4")[0])
    if info.type not in PROJECTIONS.values():
        raise ModelError(f"values of type {info.type.name} are not read as ternary weights")
    return repack(gguf.data(info.name), info.type, info.shape[-1])


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
        layout_z=_evidence(facts, gguf, packed) if info.type is GGMLType.I2_S else None,
    )


def _evidence(facts: TensorFacts, gguf: GGUFFile, packed: npt.NDArray[np.uint8]) -> dict[str, float] | None:
    if not is_projection(gguf.tensors[facts.name]) or facts.shape[1] % I2_S_BLOCK:
        return None
    parts = facts.name.split(".")
    norm = gguf.tensors.get(f"{parts[0]}.{parts[1]}.{NORM_OF[parts[2]]}.weight")
    if norm is None or norm.type not in FLOATS or norm.shape != facts.shape[1:]:
        return None
    weights = float_values(gguf, norm, slice(None)).astype(np.float32)
    if not np.isfinite(weights).all():
        return None
    return correlations(column_shares(packed, *facts.shape), weights)


def value_facts(parts: Iterable[npt.NDArray[np.floating]]) -> ValueFacts:
    """Return the facts of float values, given in parts."""
    n_values = n_invalid = n_negative = 0
    low, high, squares = np.inf, -np.inf, 0.0
    for part in parts:
        finite = np.isfinite(part)
        chunk = part if finite.all() else part[finite]
        n_values += part.size
        n_invalid += part.size - chunk.size
        if chunk.size:
            n_negative += int(np.count_nonzero(chunk < 0))
            low, high = min(low, float(chunk.min())), max(high, float(chunk.max()))
            squares += float(np.sum(np.square(chunk, dtype=np.float64)))
    n_finite = n_values - n_invalid
    if not n_finite:
        return ValueFacts(n_invalid, n_negative, None, None, None)
    return ValueFacts(n_invalid, n_negative, low, high, float(np.sqrt(squares / n_finite)))
