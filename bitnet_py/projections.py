"""The types that a ternary matrix may have in a file, and its bytes in each of them."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from bitnet_py.config import I2_S_BLOCK
from bitnet_py.errors import ModelError
from bitnet_py.ggml_types import GGMLType
from bitnet_py.quants import i2_s_tensor, pack_values, unpack_codes
from bitnet_py.tq import TQ_BLOCK, TQ_TYPES, tq_tensor
from bitnet_py.tq import repack as repack_blocks

PROJECTIONS: Mapping[str, GGMLType] = MappingProxyType(
    {ggml_type.name.lower(): ggml_type for ggml_type in (GGMLType.I2_S, *TQ_TYPES, GGMLType.F16, GGMLType.F32)}
)
"""Name on command lines -> type. In F16 and F32 every weight is a number: one of three in a matrix."""


FLOATS: Mapping[GGMLType, str] = MappingProxyType({GGMLType.F16: "<f2", GGMLType.F32: "<f4"})
"""Types without blocks, and how NumPy calls them."""


def repack(data: npt.NDArray[np.uint8], ggml_type: GGMLType, cols: int) -> tuple[npt.NDArray[np.uint8], float]:
    """Return the bytes of a ternary matrix of any type but I2_S as packed I2_S codes, and its scale.

    Raises:
        ModelError: its values are not one number, its negative and zeros.
    """
    if ggml_type in FLOATS:
        return pack_values(data.view(FLOATS[ggml_type]).reshape(-1, cols))
    return repack_blocks(data, ggml_type)


def block_of(ggml_type: GGMLType) -> int:
    """Return how many weights of a row make one block."""
    return TQ_BLOCK if ggml_type in TQ_TYPES else I2_S_BLOCK


def ternary_tensor(packed: npt.NDArray[np.uint8], scale: float, ggml_type: GGMLType) -> npt.NDArray[np.uint8]:
    """Return the bytes of a tensor of packed I2_S codes; TQ1_0, TQ2_0 and F16 round the scale to float16.

    Raises:
        ModelError: the scale is none that the type holds.
    """
    if ggml_type in FLOATS:
        return _floats(packed, scale, FLOATS[ggml_type])
    return tq_tensor(packed, scale, ggml_type) if ggml_type in TQ_TYPES else i2_s_tensor(packed, scale)


def _floats(packed: npt.NDArray[np.uint8], scale: float, dtype: str) -> npt.NDArray[np.uint8]:
    with np.errstate(over="ignore"):
        value = np.array(scale).astype(dtype)
    if not (np.isfinite(value) and value >= np.finfo(dtype).tiny):
        raise ModelError(f"scale: expected one that {dtype} holds, found {scale}")
    table = np.array([-value, 0, value]).astype(dtype)
    return table[unpack_codes(packed)].view(np.uint8)
